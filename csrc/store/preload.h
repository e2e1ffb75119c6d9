// Preloader: brings blocks layer by layer into the tier that block tables index.
//
//   SSD -> DRAM     in pieces of adjacent layer slices, small ones first, so that layer 0 of the
//                   whole history is there early; straight into the DRAM slot
//   DRAM -> device  one layer slice at a time, as soon as the slice is in DRAM
//
// Among everything that waits, the lowest layer goes first.
#pragma once

#include <bitset>
#include <deque>
#include <unordered_map>

#include "csrc/base/rate_meter.h"
#include "csrc/store/directory.h"
#include "csrc/store/load_plan.h"
#include "csrc/store/tiers.h"
#include "csrc/store/trace.h"

namespace cachedattn {

// One block on its way into a slot, shared by all who wait for it. It owns what it writes: a
// sequence may go while bytes are still landing.
struct Fill {
  BlockRef block;               // whose bytes
  BlockPin source;              // keeps the source copy in its place
  Tier tier = Tier::kDram;      // of the target slot
  Transfer transfer;            // the copy being filled; without block: a private slot
  Slot private_slot;            // the sequence takes it when the fill is done
  std::byte* target = nullptr;  // start of the target slot
  uint64_t sequence = 0;        // who asked, for traces
  bool urgent = false;          // a running turn waits for it
  std::bitset<KvLayout::kMaxLayers> landed;
  std::vector<uint64_t> load_tags;  // by layer, of copies that were started; empty: none was
  std::bitset<KvLayout::kMaxLayers> visible;  // to computing that is started from now on
  uint32_t pieces_left = 0;                   // queued or in flight, or to be queued
  uint32_t late_pieces = 0;                   // failed, but the disk may still write to the slot
  bool done = false;
  Status status;
  std::vector<std::shared_ptr<Fill>> followers;  // device fills that this DRAM fill feeds
};
using FillRef = std::shared_ptr<Fill>;

// Work that starts in the order of layers, then of arrival.
template <typename T>
class LayerQueue {
 public:
  explicit LayerQueue(uint32_t num_layers) : by_layer_(num_layers) {}

  void Push(uint32_t layer, T item) {
    by_layer_[layer].push_back(std::move(item));
    ++size_;
  }
  T Pop() {
    for (auto& items : by_layer_) {
      if (items.empty()) continue;
      T item = std::move(items.front());
      items.pop_front();
      --size_;
      return item;
    }
    CA_CHECK(false);
    __builtin_unreachable();
  }
  bool empty() const { return size_ == 0; }

 private:
  std::vector<std::deque<T>> by_layer_;
  size_t size_ = 0;
};

class Preloader {
 public:
  Preloader(Tiers* tiers, Directory* directory, Trace* trace, const Clock* clock);

  // SSD -> DRAM into a copy that others find and wait for. `whole`: as one piece (prefetch).
  FillRef StartRead(const BlockRef& block, Slot slot, bool whole, uint64_t sequence);
  // SSD -> a private DRAM slot.
  FillRef StartPrivateRead(const BlockRef& block, Slot slot, uint64_t sequence);

  // DRAM -> device, for a copy that others find, or into a private slot. The DRAM copy is kReady
  // or being filled by StartRead.
  FillRef StartLoad(const BlockRef& block, Slot slot, uint64_t sequence);
  FillRef StartPrivateLoad(const BlockRef& block, Slot slot, uint64_t sequence);

  // What loading these blocks into the pool would take, by the rates measured so far. False: the
  // disk would have to be read, and its rate is not known.
  bool Estimate(std::span<const BlockRef> blocks, TurnLoad* turn) const;

  // Until these have landed, if nothing else is loaded; infinity: a rate is not known.
  double SecondsLeft(std::span<const Fill* const> fills) const;

  // Starts what the engines have room for. Reads that wait fail while the SSD tier is off.
  void Pump();

  // Whether computing that starts from now on sees `layer` of the fill.
  bool Visible(Fill* fill, uint32_t layer);
  // What `layer` of a fill that has not landed waits for is the disk, not a copy.
  bool WaitsForSsd(const Fill& fill, uint32_t layer) const;

  // The fill under way of a shared copy; nullptr: none, or it is a save or a write.
  FillRef FillOf(const Block& block, Tier tier) const;
  void MakeUrgent(Fill* fill);

  // A late piece fails the fill at once; its slots are held until the disk has let go of them.
  void OnRead(const SsdCompletion& done);
  void OnLoad(uint64_t tag);

  bool reads_waiting() const { return !reads_.empty(); }
  // Nothing is to come but late reads.
  bool idle() const { return reads_.empty() && loads_.empty() && started_.size() == num_late_; }
  uint32_t num_quarantined() const { return num_quarantined_; }  // slots held by late reads
  uint32_t num_reads_in_flight() const { return num_reads_in_flight_; }
  uint64_t num_failed() const { return num_failed_; }
  uint64_t bytes_loaded() const { return bytes_loaded_; }
  // During which a running turn's history was on its way.
  int64_t loading_ns() const {
    return loading_ns_ + (num_urgent_ > 0 ? clock_->NowNs() - loading_since_ns_ : 0);
  }

  // For the invariants: the private slots that no sequence has taken over yet.
  void AddPlaces(std::vector<SlotId> (*places)[kNumTiers]) const;

 private:
  struct Piece {
    FillRef fill;
    uint32_t first_layer = 0;
    uint32_t num_layers = 0;
    bool late = false;
  };

  FillRef NewFill(const BlockRef& block, Tier target, SlotId slot, uint64_t sequence);
  void Share(const FillRef& fill, Slot slot, Tier tier);
  void KeepPrivate(const FillRef& fill, Slot slot);
  void QueueRead(const FillRef& fill, bool whole);
  void StartLoads();
  void Follow(const FillRef& fill);
  void StartReadPiece(Piece piece);
  void Landed(const Piece& piece);
  void EndPiece(const Piece& piece);
  void Finish(Fill* fill);
  void Fail(Fill* fill, const Status& status);

  Tiers* const tiers_;
  Directory* const directory_;
  Trace* const trace_;
  const Clock* const clock_;
  std::vector<std::pair<uint32_t, uint32_t>> groups_;  // (first layer, layers) of a read's pieces
  LayerQueue<Piece> reads_;
  LayerQueue<Piece> loads_;
  std::unordered_map<uint64_t, Piece> started_;
  std::unordered_map<const Copy*, FillRef> fills_;  // of shared copies
  std::vector<std::weak_ptr<Fill>> private_fills_;  // for the invariants alone
  uint32_t num_reads_in_flight_ = 0;
  uint64_t read_bytes_waiting_ = 0;
  uint64_t read_bytes_in_flight_ = 0;
  uint32_t num_loads_in_flight_ = 0;
  RateMeter load_rate_;
  uint64_t bytes_loaded_ = 0;
  uint64_t bytes_rated_ = 0;  // of these, by load_rate_
  uint32_t num_urgent_ = 0;   // fills for running turns that are not finished
  int64_t loading_ns_ = 0, loading_since_ns_ = 0;
  uint32_t num_late_ = 0;  // of started_
  uint32_t num_quarantined_ = 0;
  uint64_t next_tag_ = 0;
  uint64_t num_failed_ = 0;
};

}  // namespace cachedattn
