// What a store tells of itself.
#include <optional>

#include "csrc/store/store_core.h"

namespace cachedattn {

CachedTokens StoreCore::Count(const Chain& chain, const History& history) const {
  CachedTokens cached;
  cached.total = history.num_tokens;
  for (size_t i = 0; i < history.blocks.size(); ++i) {
    const uint32_t first = history.indices[i] * chain.block_size();
    const uint32_t tokens = std::min(chain.block_size(), history.num_tokens - first);
    cached.by_tier[static_cast<int>(ServingTier(*history.blocks[i]))] += tokens;
  }
  return cached;
}

StoreStats StoreCore::Stats() const {
  StoreStats stats;
  for (Tier tier : {Tier::kDevice, Tier::kDram, Tier::kSsd}) {
    const SlotPool* slots = tiers.slots(tier);
    if (slots == nullptr) continue;
    TierStats& out = stats.tiers[static_cast<int>(tier)];
    out.capacity_slots = slots->capacity();
    out.used_slots = slots->capacity() - slots->num_free();
    out.pinned_slots = directory.num_pinned(tier);
    const uint64_t slot_bytes =
        tier == Tier::kDevice ? options.layout.payload_bytes() : options.layout.host_slot_bytes();
    out.capacity_bytes = slots->capacity() * slot_bytes;
    stats.evictions[static_cast<int>(tier)] =
        tier == Tier::kSsd ? writes.num_evicted() : evictor.num_evicted(tier);
  }
  stats.conversations = policy->num_conversations();
  stats.blocks = directory.num_blocks();
  stats.turns = counters.turns;
  stats.tokens_requested = counters.tokens_requested;
  stats.tokens_from[0] = counters.tokens_from_device;
  stats.tokens_from[1] = counters.tokens_from_dram;
  stats.tokens_from[2] = counters.tokens_from_ssd;
  stats.tokens_recomputed = tokens_recomputed;
  if (tiers.ssd != nullptr) {
    stats.ssd_bytes_read = tiers.ssd->bytes_read();
    stats.ssd_bytes_written = tiers.ssd->bytes_written();
    stats.ssd_read_rate = tiers.ssd->read_rate();
    stats.checksum_failures = tiers.ssd->checksum_failures();
    stats.ssd_state = tiers.ssd_on ? "on" : "off";
    stats.ssd_report = health.report();
  }
  stats.bytes_loaded = preloader.bytes_loaded();
  stats.bytes_saved = saver.bytes_saved();
  stats.stalls = stalls;
  stats.loading_ns = preloader.loading_ns();
  stats.failed_loads = preloader.num_failed();
  stats.failed_saves = writes.num_failed();
  stats.io_errors = health.num_errors();
  stats.late_ios = health.num_late();
  stats.outages = health.num_outages();
  stats.quarantined_slots = preloader.num_quarantined() + writes.num_quarantined();
  stats.resting_slots = writes.num_resting();
  stats.reads_in_flight = preloader.num_reads_in_flight();
  stats.writes_in_flight = writes.num_in_flight();
  if (tiers.pinner != nullptr) {
    stats.pinned_bytes = tiers.pinner->pinned_bytes();
    stats.pin_failure = tiers.pinner->failure();
  }
  stats.saves_waiting = writes.num_waiting() + saver.num_waiting() + saver.num_in_flight();
  return stats;
}

std::array<uint32_t, kNumTiers> StoreCore::TenantUsage(const TenantId& tenant) const {
  std::array<uint32_t, kNumTiers> used{};
  const std::optional<uint32_t> index = directory.FindTenant(tenant);
  for (uint32_t t = 0; index.has_value() && t < kNumTiers; ++t) {
    const SlotPool* slots = tiers.slots(static_cast<Tier>(t));
    if (slots != nullptr) used[t] = slots->num_used(*index);
  }
  return used;
}

StoreCounters StoreCore::TotalCounters() const {
  const StoreCounters before = tiers.ssd->counters();
  return {.turns = before.turns + counters.turns,
          .tokens_requested = before.tokens_requested + counters.tokens_requested,
          .tokens_from_device = before.tokens_from_device + counters.tokens_from_device,
          .tokens_from_dram = before.tokens_from_dram + counters.tokens_from_dram,
          .tokens_from_ssd = before.tokens_from_ssd + counters.tokens_from_ssd};
}

}  // namespace cachedattn
