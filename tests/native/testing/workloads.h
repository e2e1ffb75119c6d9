// Fixed workloads for sweeps: small worlds (sim_world.h) that differ in tiers, policy, cuts,
// tenants and restarts. Each runs the same way every time.
#pragma once

#include <ostream>
#include <vector>

#include "tests/native/testing/sim_world.h"

namespace cachedattn {

struct Workload {
  const char* name;
  WorldOptions world;
};

inline void PrintTo(const Workload& workload, std::ostream* out) { *out << workload.name; }

inline std::vector<Workload> Workloads() {
  WorldOptions base;
  base.steps = 60;
  const auto change = [&base](const char* name, auto&& edit) {
    Workload workload{name, base};
    edit(&workload.world);
    return workload;
  };
  using World = WorldOptions*;
  std::vector<Workload> workloads = {
      {"dram_and_ssd", base},
      change("lru", [](World w) { w->policy.kind = PolicyKind::kLru; }),
      change("fifo", [](World w) { w->policy.kind = PolicyKind::kFifo; }),
      change("hazard", [](World w) { w->policy.kind = PolicyKind::kHazard, w->named = true; }),
      change("device", [](World w) { w->device = 10; }),
      change("device_lru", [](World w) { w->device = 8, w->policy.kind = PolicyKind::kLru; }),
      change("small_dram", [](World w) { w->dram = 7, w->max_blocks = 4, w->ssd = 20; }),
      change("small_ssd", [](World w) { w->ssd = 4; }),
      change("window", [](World w) { w->truncation = {20, 0.5, 4}; }),
      change("window_on_device", [](World w) { w->truncation = {18, 0.3, 0}, w->device = 9; }),
      change("tenants", [](World w) { w->tenants = 3, w->conversations = 5; }),
      change("restarts", [](World w) { w->reopen_chance = 100; }),
      change("crashes", [](World w) { w->crash_chance = 100; }),
      change("reserve", [](World w) { w->dram_reserve = 0.3; }),
      change("layers", [](World w) { w->layout = {4, 1, 8, 2, DType::kBFloat16}; }),
  };
  for (size_t i = 0; i < workloads.size(); ++i) workloads[i].world.seed = 100 + i;
  return workloads;
}

}  // namespace cachedattn
