// The memory of the process ends: for every k, the k-th allocation inside of the store fails, once
// or with all that would need more memory from then on. No call stops halfway: nothing crashes,
// every byte that a turn reads is right, the invariants hold, and the store closes.
//
// CACHEDATTN_SWEEP_STRIDE takes every n-th k only (default 1, under a sanitizer 10).
#include <malloc.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <functional>
#include <new>
#include <thread>

#include "csrc/base/memory_reserve.h"
#include "tests/native/testing/faulty_engine.h"
#include "tests/native/testing/store_fixture.h"
#include "tests/native/testing/temp_dir.h"

namespace cachedattn {
namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr uint64_t kStride = 10;
#else
constexpr uint64_t kStride = 1;
#endif

enum class Shortage { kNone, kOnce, kForEver };

// What operator new below obeys. Only the store's own allocations fail: those inside of a call
// that may use the reserve, and those of an open.
struct Memory {
  std::atomic<Shortage> shortage{Shortage::kNone};
  std::atomic<bool> opening{false};
  std::atomic<uint64_t> count{0}, fail_at{0}, refused{0}, by_workers{0};
  std::atomic<int64_t> live{0}, limit{INT64_MAX};
  std::thread::id control;

  bool Refuses(size_t size) {
    if (shortage == Shortage::kNone) return false;
    if (std::this_thread::get_id() != control) {
      ++by_workers;
      return false;
    }
    if (!opening && !MemoryReserve::in_use()) return false;
    const bool now = ++count == fail_at;
    if (now && shortage == Shortage::kForEver) limit = live.load();
    const bool refuse = now || live + static_cast<int64_t>(size) > limit;
    refused += refuse;
    return refuse;
  }
  void Start(Shortage kind, uint64_t k) {
    control = std::this_thread::get_id();
    count = 0;
    refused = 0;
    fail_at = k;
    limit = INT64_MAX;
    shortage = kind;
  }
  void End() {
    shortage = Shortage::kNone;
    limit = INT64_MAX;
  }
};
Memory memory;

void* Allocate(size_t size, size_t alignment) {
  while (true) {
    if (!memory.Refuses(size)) {
      void* data = alignment > 16 ? std::aligned_alloc(alignment, AlignUp(size, alignment))
                                  : std::malloc(size);
      if (data != nullptr) {
        memory.live += static_cast<int64_t>(malloc_usable_size(data));
        return data;
      }
    }
    const std::new_handler handler = std::get_new_handler();
    if (handler == nullptr) throw std::bad_alloc();
    handler();
  }
}

void Free(void* data) {
  if (data != nullptr) memory.live -= static_cast<int64_t>(malloc_usable_size(data));
  std::free(data);
}

}  // namespace
}  // namespace cachedattn

void* operator new(size_t size) { return cachedattn::Allocate(size, 0); }
void* operator new(size_t size, std::align_val_t alignment) {
  return cachedattn::Allocate(size, static_cast<size_t>(alignment));
}
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  try {
    return cachedattn::Allocate(size, 0);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void operator delete(void* data) noexcept { cachedattn::Free(data); }
void operator delete(void* data, size_t) noexcept { cachedattn::Free(data); }
void operator delete(void* data, std::align_val_t) noexcept { cachedattn::Free(data); }
void operator delete(void* data, size_t, std::align_val_t) noexcept { cachedattn::Free(data); }

namespace cachedattn {
namespace {

// A small store on a disk that may be broken. Every call copes with a store that has no memory.
class Rig {
 public:
  explicit Rig(const Sizes& sizes) : options_(TinyOptions(sizes, dir_ / "kv")) {
    options_.dram_reserve = 0.1;
    options_.clock = &clock_;
    options_.io = IoKind::kThreads;
    plan.set_clock(&clock_);
  }
  ~Rig() { Close(); }

  void Open() {
    const bool outer = memory.opening.exchange(true);
    auto opened = TryOpen();
    memory.opening = outer;
    if (opened.ok()) {
      store_ = std::move(opened.value());
    } else {
      EXPECT_EQ(opened.status().code(), Code::kExhausted) << opened.status().message();
    }
  }
  void Close() {
    if (store_ == nullptr) return;
    store_->CheckInvariants();
    const Status status = store_->Close();
    EXPECT_TRUE(status.ok() || status.code() == Code::kExhausted || plan.fired() > 0)
        << status.message();
    store_.reset();
    plan.Release();
    while (FreeParkedStores() > 0) usleep(100);
  }

  // A turn as far as the store has room and memory for it.
  void Play(const Tokens& tokens, const Truncation& truncation = {}, uint32_t most_steps = 99) {
    if (store_ == nullptr) return;
    Turn turn(store_.get(), tokens, truncation);
    if (!turn.Begin()) return;
    for (uint32_t step = 0; turn.sequence()->num_computed_tokens() < tokens.size(); ++step) {
      if (step == most_steps) return;
      Status status = turn.Step(24);
      if (status.code() == Code::kExhausted) {
        store_->Flush();
        status = turn.Step(24);
      }
      if (!status.ok()) return;
      store_->Poll();
    }
    turn.Commit();
  }
  void Queue(const Tokens& tokens) {
    if (store_ == nullptr) return;
    const auto chain = store_->NewChain("t", {});
    chain->Append(tokens);
    const std::shared_ptr<Chain> waiting[] = {chain};
    (void)store_->Lookup(*chain);
    store_->SetQueue(waiting);
    for (int i = 0; i < 20; ++i) store_->Poll();
  }
  void Forget() {
    if (store_ == nullptr) return;
    store_->Flush();
    store_->DropTier(Tier::kDevice);
    store_->DropTier(Tier::kDram);
  }
  void Wait(int64_t seconds) {
    clock_.Advance(seconds * ManualClock::kSecond);
    for (int i = 0; i < 20 && store_ != nullptr; ++i) store_->Poll();
  }
  AttentionStore* store() { return store_.get(); }

  FaultPlan plan;

 private:
  Result<std::unique_ptr<AttentionStore>> TryOpen() {
    if (options_.ssd_bytes == 0) return AttentionStore::Open(options_);
    try {
      SsdOptions ssd_options = SsdOptionsOf(options_);
      ssd_options.io.kind = options_.io;
      ssd_options.io.wrap = plan.Wrap();
      auto tier = SsdTier::Open(ssd_options);
      if (!tier.ok()) return tier.status();
      return OpenStoreOn(options_, std::move(tier.value()), NewHostCopyEngine());
    } catch (const std::bad_alloc&) {
      return Status(Code::kExhausted, "out of memory");
    }
  }

  TempDir dir_;
  ManualClock clock_;
  StoreOptions options_;
  std::unique_ptr<AttentionStore> store_;
};

struct Workload {
  const char* name;
  Sizes sizes;
  std::function<void(Rig*)> play;
};

const Tokens kFirst = MakeTokens(3 * kBlock + 3, 1);
const Tokens kSecond = MakeTokens(2 * kBlock + 1, 2);

const Workload kWorkloads[] = {
    {"dram",
     {8, 0, 0},
     [](Rig* rig) {
       rig->Play(kFirst);
       rig->Play(kFirst + kSecond);
     }},
    {"ssd",
     {8, 16, 0},
     [](Rig* rig) {
       rig->Play(kFirst);
       rig->Forget();
       rig->Play(kFirst + kSecond);
     }},
    {"device",
     {8, 16, 8},
     [](Rig* rig) {
       rig->Play(kFirst);
       rig->Forget();
       rig->Play(kFirst + kSecond);
     }},
    {"evict",
     {6, 8, 0},
     [](Rig* rig) {
       for (uint32_t i = 0; i < 4; ++i) rig->Play(MakeTokens(3 * kBlock, 10 + i));
     }},
    {"evict_device",
     {6, 8, 6},
     [](Rig* rig) {
       for (uint32_t i = 0; i < 4; ++i) rig->Play(MakeTokens(3 * kBlock, 10 + i));
     }},
    {"truncate",
     {8, 16, 0},
     [](Rig* rig) {
       const Truncation truncation{3 * kBlock, 0.5, 0};
       rig->Play(kFirst + kSecond, truncation);
       rig->Play(kFirst + kSecond + kSecond, truncation);
     }},
    {"queue",
     {12, 16, 0},
     [](Rig* rig) {
       rig->Play(kFirst);
       rig->Forget();
       rig->Queue(kFirst + kSecond);
       rig->Play(kFirst + kSecond);
     }},
    {"reopen",
     {8, 16, 0},
     [](Rig* rig) {
       rig->Play(kFirst);
       rig->Close();
       rig->Open();
       rig->Play(kFirst + kSecond);
     }},
    {"cancel",
     {8, 16, 8},
     [](Rig* rig) {
       rig->Play(kFirst);
       rig->Forget();
       rig->Play(kFirst + kSecond, {}, 0);
       rig->Play(kFirst + kSecond, {}, 1);
     }},
    {"read_error",
     {8, 16, 0},
     [](Rig* rig) {
       rig->Play(kFirst);
       rig->Forget();
       rig->plan.Add({.op = IoOp::kRead, .kind = FaultKind::kError, .skip = 4, .count = 2});
       rig->Play(kFirst + kSecond);
       rig->Play(kFirst + kSecond);
     }},
    {"outage",
     {8, 16, 8},
     [](Rig* rig) {
       rig->plan.Add({.op = IoOp::kWrite, .kind = FaultKind::kError, .count = 6});
       rig->Play(kFirst + kSecond);
       rig->Wait(31);
       rig->Wait(31);
       rig->Play(kFirst + kSecond + kSecond);
     }},
    {"hang",
     {8, 16, 0},
     [](Rig* rig) {
       rig->plan.Add({.op = IoOp::kWrite, .kind = FaultKind::kHold, .skip = 1, .count = 9});
       rig->Play(kFirst);
     }},
};

class SweepAllocTest : public ::testing::TestWithParam<Workload> {
 protected:
  // Thousands of stores are made and synced: in memory, where there is a place for files.
  static void SetUpTestSuite() {
    const char* place = "/dev/shm";
    if (access(place, W_OK) == 0) setenv("TEST_TMPDIR", place, 0);
  }
};
INSTANTIATE_TEST_SUITE_P(Workloads, SweepAllocTest, ::testing::ValuesIn(kWorkloads),
                         [](const auto& info) { return info.param.name; });

TEST_P(SweepAllocTest, EveryAllocationMayFail) {
  const char* text = std::getenv("CACHEDATTN_SWEEP_STRIDE");
  const uint64_t stride = text == nullptr ? kStride : std::strtoull(text, nullptr, 10);
  uint64_t runs = 0, refused = 0;
  for (const Shortage shortage : {Shortage::kOnce, Shortage::kForEver}) {
    for (uint64_t k = 1;; k += stride) {
      SCOPED_TRACE(std::string("k = ") + std::to_string(k) +
                   (shortage == Shortage::kOnce ? ", once" : ", for ever"));
      {
        Rig rig(GetParam().sizes);
        memory.Start(shortage, k);
        rig.Open();
        GetParam().play(&rig);
        rig.Close();
        memory.End();
        // There is memory again.
        rig.plan.Clear();
        rig.Open();
        ASSERT_NE(rig.store(), nullptr);
        rig.Play(kFirst);
        rig.store()->CheckInvariants();
      }
      ASSERT_FALSE(HasFailure());
      refused += memory.refused;
      if (memory.refused == 0) break;  // it takes fewer than k
      ++runs;
    }
  }
  std::printf("%s: runs=%llu refused=%llu\n", GetParam().name,
              static_cast<unsigned long long>(runs), static_cast<unsigned long long>(refused));
  EXPECT_GE(refused, runs);
  EXPECT_GT(runs, 100u / stride);
  EXPECT_EQ(memory.by_workers, 0u) << "a worker has nobody to tell";
}

}  // namespace
}  // namespace cachedattn
