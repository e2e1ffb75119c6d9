// Fails the k-th I/O of each workload, for every k, once and from there on for ever: every run
// ends, no turn reads a wrong byte, and without faults the store is whole again.
#include <gtest/gtest.h>

#include <csignal>
#include <cstdio>

#include "tests/native/testing/workloads.h"

namespace cachedattn {
namespace {

constexpr DiskFault kKinds[] = {DiskFault::kEio, DiskFault::kNoSpace, DiskFault::kShort,
                                DiskFault::kAgain, DiskFault::kHang};

// Of the run under way, for one that ends in an abort.
char running[200];
void PrintRunning(int) { std::fputs(running, stderr); }

class SweepTest : public ::testing::TestWithParam<Workload> {
 protected:
  // How often the fault has fired.
  uint64_t Run(DiskFault fault, uint64_t k, bool forever) {
    WorldOptions options = GetParam().world;
    options.faults.rule = fault;
    options.faults.rule_from = k;
    options.faults.rule_forever = forever;
    std::snprintf(running, sizeof(running), "%s: %s at request %llu%s\n", GetParam().name,
                  Name(fault), static_cast<unsigned long long>(k), forever ? " and later" : "");
    const WorldReport report = SimWorld(options, &clock_, &disk_).Play();
    EXPECT_EQ(report.wrong, "") << running;
    EXPECT_EQ(report.checksum_failures, 0u) << running;
    return disk_.fired(fault);
  }

  // All k, until the workload ends before the k-th request.
  void Sweep(DiskFault fault, bool forever) {
    for (uint64_t k = 0;; ++k, ++runs_) {
      const uint64_t fired = Run(fault, k, forever);
      fired_ += fired;
      if (HasFailure()) return;
      if (fired > 0) continue;
      EXPECT_GT(k, 5u) << "the fault never fired";
      return;
    }
  }

  SimClock clock_;
  SimDisk disk_{&clock_};
  uint64_t runs_ = 0, fired_ = 0;
};

INSTANTIATE_TEST_SUITE_P(Workloads, SweepTest, ::testing::ValuesIn(Workloads()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(SweepTest, EveryRequestMayFail) {
  std::signal(SIGABRT, PrintRunning);
  for (DiskFault fault : kKinds) {
    Sweep(fault, false);
    Sweep(fault, true);
    if (HasFailure()) return;
  }
  std::printf("%s: runs=%llu faults=%llu\n", GetParam().name,
              static_cast<unsigned long long>(runs_), static_cast<unsigned long long>(fired_));
}

}  // namespace
}  // namespace cachedattn
