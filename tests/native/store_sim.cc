// Seeded schedules of the whole store on a simulated disk (testing/sim_world.h).
//
//   store_sim --mode=hostile|honest [--n=N] [--seed=S] [--processes=P]
//
// Runs the schedules of the seeds S, S + 1, ... and ends with one line. One store in four is
// encrypted; a tag that does not fit counts as a checksum. Half of the turns may compute history
// again instead of loading it. A hostile disk also lies;
// no turn may ever read a wrong byte. An honest disk reports what fails; then no checksum may ever
// fail either. Exit status 1: something was wrong, or a kind of fault never fired in many runs.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string_view>

#include "tests/native/testing/sim_world.h"

namespace cachedattn {
namespace {

// Fewer schedules may leave a kind of fault out.
constexpr uint64_t kManySchedules = 1000;

struct Arguments {
  bool hostile = true;
  uint64_t schedules = 1000;
  uint64_t seed = 1;
  uint32_t processes = 1;
};

// What a process has found, in memory that its parent sees.
struct Tally {
  uint64_t schedules, encrypted, wrong, checksum_failures, failed_turns;
  uint64_t hits[kNumTiers];
  uint64_t recomputed;
  uint64_t fired[kNumDiskFaults];
  uint64_t running_seed;  // for a run that ends in an abort
};

const char* ModeOf(const Arguments& arguments) { return arguments.hostile ? "hostile" : "honest"; }

void PrintFailure(const Arguments& arguments, uint64_t seed, const char* what) {
  std::fprintf(stderr, "seed %llu: %s\n  repeat it: store_sim --mode=%s --n=1 --seed=%llu\n",
               static_cast<unsigned long long>(seed), what, ModeOf(arguments),
               static_cast<unsigned long long>(seed));
}

void RunSchedules(const Arguments& arguments, uint32_t process, Tally* tally) {
  SimClock clock;
  SimDisk disk(&clock);
  SimKeys keys;
  for (uint64_t i = process; i < arguments.schedules; i += arguments.processes) {
    const uint64_t seed = arguments.seed + i;
    tally->running_seed = seed;
    const WorldOptions options = RandomWorld(seed, arguments.hostile);
    const WorldReport report = SimWorld(options, &clock, &disk, &keys).Play();
    ++tally->schedules;
    tally->encrypted += options.encrypt && options.ssd != 0;
    tally->checksum_failures += report.checksum_failures;
    tally->failed_turns += report.failed_turns;
    tally->recomputed += report.recomputed;
    for (uint32_t t = 0; t < kNumTiers; ++t) tally->hits[t] += report.hits[t];
    for (uint32_t f = 0; f < kNumDiskFaults; ++f) {
      tally->fired[f] += disk.fired(static_cast<DiskFault>(f));
    }
    std::string wrong = report.wrong;
    if (!arguments.hostile && report.checksum_failures != 0 && wrong.empty()) {
      wrong = "a checksum failed on an honest disk";
    }
    if (wrong.empty()) continue;
    ++tally->wrong;
    PrintFailure(arguments, seed, wrong.c_str());
    if (tally->wrong == 10) return;
  }
}

// Runs all processes; true when none of them died.
bool RunProcesses(const Arguments& arguments, Tally* tallies) {
  std::fflush(nullptr);
  for (uint32_t p = 0; p < arguments.processes; ++p) {
    const pid_t pid = ::fork();
    if (pid < 0) std::abort();
    if (pid != 0) continue;
    RunSchedules(arguments, p, &tallies[p]);
    tallies[p].running_seed = 0;
    std::_Exit(0);
  }
  bool ended = true;
  for (uint32_t p = 0; p < arguments.processes; ++p) {
    int status = 0;
    ::wait(&status);
    ended = ended && status == 0;
  }
  for (uint32_t p = 0; p < arguments.processes && !ended; ++p) {
    if (tallies[p].running_seed == 0) continue;
    PrintFailure(arguments, tallies[p].running_seed, "the process died");
    ++tallies[p].wrong;
  }
  return ended;
}

Tally Sum(const Arguments& arguments, const Tally* tallies) {
  Tally sum{};
  for (uint32_t p = 0; p < arguments.processes; ++p) {
    sum.schedules += tallies[p].schedules;
    sum.encrypted += tallies[p].encrypted;
    sum.wrong += tallies[p].wrong;
    sum.checksum_failures += tallies[p].checksum_failures;
    sum.failed_turns += tallies[p].failed_turns;
    sum.recomputed += tallies[p].recomputed;
    for (uint32_t t = 0; t < kNumTiers; ++t) sum.hits[t] += tallies[p].hits[t];
    for (uint32_t f = 0; f < kNumDiskFaults; ++f) sum.fired[f] += tallies[p].fired[f];
  }
  return sum;
}

// Prints the line; false when a kind of fault or a tier was left out.
bool PrintLine(const Arguments& arguments, const Tally& sum) {
  bool complete = sum.encrypted != 0;
  std::printf("schedules=%llu encrypted=%llu wrong=%llu checksum=%llu faults=",
              static_cast<unsigned long long>(sum.schedules),
              static_cast<unsigned long long>(sum.encrypted),
              static_cast<unsigned long long>(sum.wrong),
              static_cast<unsigned long long>(sum.checksum_failures));
  for (uint32_t f = 0; f < kNumDiskFaults; ++f) {
    const auto fault = static_cast<DiskFault>(f);
    if (Silent(fault) && !arguments.hostile) continue;
    std::printf("%s%s:%llu", f == 0 ? "" : ",", Name(fault),
                static_cast<unsigned long long>(sum.fired[f]));
    complete = complete && sum.fired[f] != 0;
  }
  std::printf(" failed_turns=%llu hits=", static_cast<unsigned long long>(sum.failed_turns));
  const char* names[] = {"device", "dram", "ssd"};
  for (uint32_t t = 0; t < kNumTiers; ++t) {
    std::printf("%s%s:%llu", t == 0 ? "" : ",", names[t],
                static_cast<unsigned long long>(sum.hits[t]));
    complete = complete && sum.hits[t] != 0;
  }
  complete = complete && sum.recomputed != 0;
  std::printf(" recomputed=%llu mode=%s\n", static_cast<unsigned long long>(sum.recomputed),
              ModeOf(arguments));
  return complete || sum.schedules < kManySchedules;
}

bool Parse(int argc, char** argv, Arguments* arguments) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view text = argv[i];
    const size_t equals = text.find('=');
    if (equals == std::string_view::npos) return false;
    const std::string_view name = text.substr(0, equals), value = text.substr(equals + 1);
    char* end = nullptr;
    const uint64_t number = std::strtoull(value.data(), &end, 10);
    const bool is_number = !value.empty() && *end == '\0';
    if (name == "--mode" && (value == "hostile" || value == "honest")) {
      arguments->hostile = value == "hostile";
    } else if (name == "--n" && is_number) {
      arguments->schedules = number;
    } else if (name == "--seed" && is_number) {
      arguments->seed = number;
    } else if (name == "--processes" && is_number && number >= 1 && number <= 256) {
      arguments->processes = static_cast<uint32_t>(number);
    } else {
      return false;
    }
  }
  return true;
}

int Main(int argc, char** argv) {
  Arguments arguments;
  if (!Parse(argc, argv, &arguments)) {
    std::fprintf(stderr, "usage: %s [--mode=hostile|honest] [--n=N] [--seed=S] [--processes=P]\n",
                 argv[0]);
    return 2;
  }
  void* shared = ::mmap(nullptr, arguments.processes * sizeof(Tally), PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED) return 2;
  auto* tallies = static_cast<Tally*>(shared);
  const bool ended = RunProcesses(arguments, tallies);
  const Tally sum = Sum(arguments, tallies);
  const bool complete = PrintLine(arguments, sum);
  if (!complete)
    std::fprintf(stderr,
                 "a kind of fault never fired, a tier was never hit, no store was encrypted, or "
                 "nothing was computed again\n");
  return ended && complete && sum.wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace cachedattn

int main(int argc, char** argv) { return cachedattn::Main(argc, argv); }
