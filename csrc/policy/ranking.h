// Ranking: the conversations that have a copy that may go from one tier, in the order they go.
//
// They stand in cells. Within a cell the lowest key goes first; the cells themselves have an order
// that all tiers share and that a bitmap over it finds the first occupied one in. A member that
// comes with the highest key of its cell joins a list; one that comes late, which is rare, is a
// stray: those are kept in a set. So almost every call is constant time, and all are exact.
#pragma once

#include <set>
#include <tuple>

#include "csrc/policy/records.h"

namespace cachedattn {

using CellId = uint16_t;

// The order of the cells: a permutation of those that may be occupied.
struct CellOrder {
  static constexpr uint16_t kUnused = UINT16_MAX;

  explicit CellOrder(size_t num_cells) : position_of(num_cells, kUnused) {}
  std::vector<uint16_t> position_of;
  std::vector<CellId> cell_at;
};

class Ranking {
 public:
  Ranking(uint32_t tier, Records* records, const CellOrder* order);

  void Insert(Conversation id, CellId cell);
  void Erase(Conversation id, CellId cell);
  // After the order of the cells has changed.
  void Reorder();

  bool empty(CellId cell) const { return cells_[cell].empty(); }
  // The last of its list.
  Conversation tail(CellId cell) const { return cells_[cell].list.tail; }
  // The first position in the order whose cell is occupied; CellOrder::kUnused: none is.
  uint16_t FirstPosition() const;
  Conversation First(CellId cell) const;

  uint64_t bytes() const;
  // Calls `visit(id, cell)` for every member, and aborts where order or links are broken.
  template <typename Visit>
  void Check(const Visit& visit) const;

 private:
  struct Cell {
    RecordList list;
    uint32_t num_strays = 0;
    bool empty() const { return list.empty() && num_strays == 0; }
  };
  using Stray = std::tuple<CellId, uint64_t, Conversation>;

  uint8_t bit() const { return static_cast<uint8_t>(1u << tier_); }
  bool Less(Conversation a, Conversation b) const {
    return std::pair((*records_)[a].key, a) < std::pair((*records_)[b].key, b);
  }
  void Mark(CellId cell);

  const uint32_t tier_;
  Records* const records_;
  const CellOrder* const order_;
  std::vector<Cell> cells_;
  std::set<Stray> strays_;
  std::vector<uint64_t> occupied_;  // a bit for each position
  std::vector<uint64_t> summary_;   // a bit for each word of those
};

template <typename Visit>
void Ranking::Check(const Visit& visit) const {
  size_t num_strays = 0;
  for (const CellId cell : order_->cell_at) {
    const uint16_t position = order_->position_of[cell];
    const bool marked =
        position != CellOrder::kUnused && (occupied_[position / 64] >> (position % 64) & 1) != 0;
    CA_CHECK(marked == !empty(cell));
    CA_CHECK(!marked || (summary_[position / 4096] >> (position / 64 % 64) & 1) != 0);
    num_strays += cells_[cell].num_strays;
    Conversation last = kNoConversation;
    for (Conversation id = cells_[cell].list.head; id != kNoConversation;) {
      const Record& record = (*records_)[id];
      CA_CHECK((record.listed & bit()) != 0);
      CA_CHECK(last == kNoConversation || (Less(last, id) && record.links[tier_].prev == last));
      visit(id, cell);
      last = id;
      id = record.links[tier_].next;
    }
    CA_CHECK(cells_[cell].list.tail == last);
  }
  CA_CHECK(strays_.size() == num_strays);
  for (const auto& [cell, key, id] : strays_) {
    CA_CHECK((*records_)[id].key == key && ((*records_)[id].listed & bit()) == 0);
    visit(id, cell);
  }
}

}  // namespace cachedattn
