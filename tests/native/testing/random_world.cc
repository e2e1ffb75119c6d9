// The worlds that seeds draw.
#include <algorithm>

#include "tests/native/testing/sim_world.h"

namespace cachedattn {

namespace {

KvLayout RandomLayout(SimRandom* random) {
  switch (random->Below(8)) {
    case 0:
      return {1, 1, 16, 8, DType::kFloat16};
    case 1:
      return {3, 2, 4, 4, DType::kBFloat16};
    case 2:
      return {2, 4, 64, 4, DType::kBFloat16};  // slices of a page, without padding
    case 3:
      return {4, 1, 8, 2, DType::kBFloat16};
    default:
      return {2, 1, 8, 4, DType::kBFloat16};
  }
}

Truncation RandomTruncation(SimRandom* random, uint32_t block, uint32_t max_blocks) {
  Truncation truncation;
  if (max_blocks < 3 || random->Below(10) < 6) return truncation;
  truncation.window = (3 + random->Below(max_blocks - 2)) * block + random->Below(block);
  const double ratios[] = {0.3, 0.5, 1.0};
  truncation.ratio = ratios[random->Below(3)];
  const uint32_t keep[] = {0, 1, block, 2 * block};
  truncation.keep_first = keep[random->Below(4)];
  return truncation;
}

void RandomFaults(SimRandom* random, bool hostile, DiskFaults* faults) {
  if (random->OneIn(5)) return;
  const auto first = static_cast<uint32_t>(DiskFault::kEio);
  for (uint32_t i = first; i < kNumDiskFaults; ++i) {
    if (Silent(static_cast<DiskFault>(i)) && !hostile) break;
    if (random->OneIn(3)) faults->rate[i] = static_cast<uint16_t>(random->Scale(6));
  }
}

PolicyOptions RandomPolicy(SimRandom* random) {
  PolicyOptions policy;
  if (random->OneIn(2)) policy.kind = static_cast<PolicyKind>(random->Below(4));
  policy.whole_conversation = random->OneIn(4);
  policy.drop_in_service = random->OneIn(4);
  policy.per_token = random->OneIn(4);
  return policy;
}

}  // namespace

WorldOptions RandomWorld(uint64_t seed, bool hostile) {
  SimRandom random(seed ^ 0x5EED);
  WorldOptions options;
  options.seed = seed;
  options.hostile = hostile;
  options.layout = RandomLayout(&random);
  options.dram = 6 + random.Below(16);
  options.ssd = random.OneIn(16) ? 0 : 4 + random.Below(24);
  options.device = random.OneIn(3) ? 5 + random.Below(12) : 0;
  options.policy = RandomPolicy(&random);
  options.keep_on_device = !random.OneIn(4);
  options.named = random.OneIn(2);
  options.dram_reserve = random.Below(3) * 0.1;
  const uint32_t pool = options.device ? std::min(options.device, options.dram) : options.dram;
  options.max_blocks = 2 + random.Below(std::min(pool - 3, 9u));
  options.truncation = RandomTruncation(&random, options.layout.block_size, options.max_blocks);
  options.io_depth = 8 + random.Below(24);
  options.tenants = 1 + random.Below(3);
  options.conversations = 2 + random.Below(4);
  options.steps = 100 + random.Below(50);
  options.crash_chance = random.OneIn(2) ? 10 + random.Below(20) : 0;
  options.reopen_chance = random.Below(20);
  options.deadline_us = 5000 + random.Below(40'000);
  options.poison = random.OneIn(2);
  RandomFaults(&random, hostile, &options.faults);
  options.quota = random.OneIn(3) ? 2 + random.Below(10) : 0;
  options.encrypt = random.OneIn(4);
  return options;
}

}  // namespace cachedattn
