// SimWorld: the real store on a simulated disk and a simulated copy engine, under random control
// steps, where everything follows from a seed. It checks every byte that a turn reads, the
// invariants, the caps, and that every call ends in time.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "csrc/store/open_store.h"
#include "tests/native/testing/player.h"
#include "tests/native/testing/sim_disk.h"
#include "tests/native/testing/sim_keys.h"

namespace cachedattn {

struct WorldOptions {
  uint64_t seed = 1;  // of the steps and of the disk
  bool hostile = false;
  KvLayout layout = {2, 1, 8, 4, DType::kBFloat16};
  uint32_t dram = 12, ssd = 12, device = 0;  // slots; 0: no such tier
  PolicyOptions policy;
  bool keep_on_device = true;
  bool named = false;  // conversations have names
  double dram_reserve = 0;
  Truncation truncation;
  uint32_t io_depth = 8;
  uint32_t tenants = 1, conversations = 4;
  uint32_t quota = 0;       // of a tenant, in slots; 0: none
  uint32_t max_blocks = 8;  // of a history, before it begins anew
  uint32_t steps = 100;
  uint32_t crash_chance = 0, reopen_chance = 10;  // of 1000 steps
  int64_t deadline_us = 20'000;
  bool poison = true;
  bool encrypt = false;
  DiskFaults faults;
};

// A world of the sizes, rules and faults that `seed` draws.
WorldOptions RandomWorld(uint64_t seed, bool hostile);

struct WorldReport {
  std::string wrong;  // what was found to be wrong; empty: nothing
  uint64_t checksum_failures = 0;
  uint64_t hits[kNumTiers] = {};  // tokens
  uint64_t recomputed = 0;        // tokens that could have been loaded
  uint64_t failed_turns = 0;
};

class SimWorld {
 public:
  // `disk` is formatted, and keeps the counts of the faults that fired; `keys` too, which only an
  // encrypted world needs.
  SimWorld(const WorldOptions& options, SimClock* clock, SimDisk* disk, SimKeys* keys = nullptr);

  // Once. Afterwards the store is closed.
  WorldReport Play();

 private:
  struct Conversation {
    std::string tenant;
    uint64_t name = 0;
    Tokens history;
    std::unique_ptr<Player> turn;
  };

  bool right() const { return report_.wrong.empty(); }
  void Wrong(const std::string& what);
  void Allow(int64_t us);
  Status OpenTier(std::unique_ptr<SsdTier>* ssd);
  Status TryOpen();
  void AwaitLate();
  void Open();
  void End();
  void Crash();
  void Reopen();
  void StepOnce();
  ComputeCost RandomCost();
  void Start(Conversation* conversation);
  void Advance(Conversation* conversation);
  void EndTurn(Conversation* conversation, bool commit);
  void Queue();
  void Advise();
  void Check();
  void Recover();
  Status StepWithPatience(Player* turn);
  void ReadAll();
  Tokens NewTokens(uint32_t count, uint32_t root);
  bool Harmless() const;

  const WorldOptions options_;
  SimClock* const clock_;
  SimDisk* const disk_;
  SimKeys* const keys_;
  SimRandom random_;
  StoreOptions store_options_;
  std::unique_ptr<AttentionStore> store_;
  std::vector<std::string> tenants_;
  std::vector<Conversation> conversations_;
  uint32_t next_token_ = 100;
  bool damaged_ = false;  // a fault has fired, or the power has failed
  WorldReport report_;
};

}  // namespace cachedattn
