#include "csrc/policy/ranking.h"

#include <algorithm>
#include <bit>

namespace cachedattn {

Ranking::Ranking(uint32_t tier, Records* records, const CellOrder* order)
    : tier_(tier),
      records_(records),
      order_(order),
      cells_(order->position_of.size()),
      occupied_((cells_.size() + 63) / 64),
      summary_((occupied_.size() + 63) / 64) {}

void Ranking::Insert(Conversation id, CellId cell) {
  Record& record = (*records_)[id];
  Cell& at = cells_[cell];
  if (at.empty()) Mark(cell);
  if (at.list.empty() || Less(at.list.tail, id)) {
    at.list.PushBack(records_, tier_, id);
    record.listed |= bit();
  } else {
    strays_.emplace(cell, record.key, id);
    ++at.num_strays;
  }
}

void Ranking::Erase(Conversation id, CellId cell) {
  Record& record = (*records_)[id];
  Cell& at = cells_[cell];
  if ((record.listed & bit()) != 0) {
    at.list.Erase(records_, tier_, id);
    record.listed &= static_cast<uint8_t>(~bit());
  } else {
    CA_CHECK(strays_.erase({cell, record.key, id}) == 1);
    --at.num_strays;
  }
  if (!at.empty()) return;
  const uint16_t position = order_->position_of[cell];
  uint64_t& word = occupied_[position / 64];
  word &= ~(uint64_t{1} << (position % 64));
  if (word == 0) summary_[position / 4096] &= ~(uint64_t{1} << (position / 64 % 64));
}

void Ranking::Mark(CellId cell) {
  const uint16_t position = order_->position_of[cell];
  CA_CHECK(position != CellOrder::kUnused);
  occupied_[position / 64] |= uint64_t{1} << (position % 64);
  summary_[position / 4096] |= uint64_t{1} << (position / 64 % 64);
}

void Ranking::Reorder() {
  std::ranges::fill(occupied_, 0);
  std::ranges::fill(summary_, 0);
  for (const CellId cell : order_->cell_at) {
    if (!cells_[cell].empty()) Mark(cell);
  }
}

uint16_t Ranking::FirstPosition() const {
  for (size_t i = 0; i < summary_.size(); ++i) {
    if (summary_[i] == 0) continue;
    const size_t word = 64 * i + std::countr_zero(summary_[i]);
    return static_cast<uint16_t>(64 * word + std::countr_zero(occupied_[word]));
  }
  return CellOrder::kUnused;
}

Conversation Ranking::First(CellId cell) const {
  const Cell& at = cells_[cell];
  if (at.num_strays == 0) return at.list.head;
  const Conversation stray = std::get<2>(*strays_.lower_bound({cell, 0, 0}));
  return at.list.empty() || Less(stray, at.list.head) ? stray : at.list.head;
}

uint64_t Ranking::bytes() const {
  constexpr uint64_t kStrayBytes = 64;  // with the links of the tree
  return cells_.size() * sizeof(Cell) + occupied_.size() * sizeof(uint64_t) +
         strays_.size() * kStrayBytes;
}

}  // namespace cachedattn
