// Trace: timed events of the movers and of the sequences, for tests and charts. Off by default.
#pragma once

#include <vector>

#include "csrc/store/attention_store.h"
#include "csrc/store/block.h"

namespace cachedattn {

class Trace {
 public:
  explicit Trace(const Clock* clock) : clock_(clock) {}

  static constexpr size_t kMaxEvents = 1 << 20;  // later ones are lost

  void Enable(bool on) {
    on_ = on;
    events_.clear();
    if (on) events_.reserve(kMaxEvents);  // Add takes no memory
  }
  std::vector<TraceEvent> Take() {
    std::vector<TraceEvent> taken(events_);
    events_.clear();
    return taken;
  }

  // `block`: nullptr for none.
  void Add(TraceKind kind, uint64_t sequence, uint32_t first_layer, uint32_t num_layers,
           SlotId slot, const Block* block, Tier tier = Tier::kDevice) {
    if (!on_ || events_.size() >= kMaxEvents) return;
    events_.push_back({.time_ns = clock_->NowNs(),
                       .kind = kind,
                       .sequence = sequence,
                       .first_layer = first_layer,
                       .num_layers = num_layers,
                       .slot = slot,
                       .tier = tier,
                       .block = block != nullptr ? DigestHash()(block->key) : 0,
                       .num_tokens = block != nullptr ? block->num_tokens : 0});
  }
  // A copy of `block` in `tier` goes.
  void AddEvict(const Block& block, Tier tier) {
    Add(TraceKind::kEvict, 0, 0, 0, block.copy(tier).slot.id(), &block, tier);
  }

 private:
  const Clock* const clock_;
  bool on_ = false;
  std::vector<TraceEvent> events_;
};

}  // namespace cachedattn
