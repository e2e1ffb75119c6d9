// What metadata costs as blocks grow from a thousand to a million: memory for each, lookups of a
// history of 32k tokens, and an engine's step over a queue of 32 of them. The disk does nothing. A
// model computes between two steps, so each begins with caches that hold nothing of ours.
//
//   directory_bench               the table
//   directory_bench DIR BLOCKS    a real file of so many small blocks in DIR: time to open it after
//                                 a crash (every header is read) and a clean close (the index)
#include <malloc.h>
#include <sys/resource.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "csrc/store/attention_store.h"
#include "csrc/store/open_store.h"
#include "csrc/tier/memory_tier.h"
#include "csrc/tier/ssd_format.h"

namespace cachedattn {
namespace {

constexpr uint32_t kConversation = 512;                      // blocks: 32k tokens
constexpr uint32_t kWaiting = 32;                            // requests
constexpr KvLayout kLayout{1, 1, 16, 64, DType::kBFloat16};  // slots of 8 KiB

double Seconds(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}
double Now() { return Seconds(CLOCK_MONOTONIC); }
// What is measured in memory does not wait, and other load must not count.
double CpuNow() { return Seconds(CLOCK_THREAD_CPUTIME_ID); }

std::vector<TokenId> TokensOf(uint32_t conversation, uint32_t num_tokens) {
  std::vector<TokenId> tokens(num_tokens);
  for (uint32_t i = 0; i < num_tokens; ++i) {
    tokens[i] = static_cast<TokenId>((conversation * 2654435761u + i * 40503u) >> 8);
  }
  return tokens;
}

// Header `block` of all conversations, one after the other.
class Headers {
 public:
  BlockHeader Next() {
    if (block_ % kConversation == 0) {
      chain_ = Chain(TenantIdOf(""), RootKey({}, ""), kLayout.block_size, {});
      chain_.Append(TokensOf(block_ / kConversation, kConversation * kLayout.block_size));
    }
    const uint32_t depth = block_++ % kConversation;
    return {.key = chain_.key(depth),
            .parent = chain_.parent_key(depth),
            .tenant = chain_.tenant(),
            .num_tokens = kLayout.block_size,
            .depth = depth,
            .generation = block_};
  }

 private:
  Chain chain_{TenantIdOf(""), RootKey({}, ""), kLayout.block_size, {}};
  uint32_t block_ = 0;
};

// Holds `num_blocks` blocks and moves nothing.
class NullSsd final : public SsdTier {
 public:
  NullSsd(uint32_t num_blocks, double* scan_s) : num_blocks_(num_blocks), scan_s_(scan_s) {}

  uint32_t num_slots() const override { return num_blocks_ + kConversation; }
  const std::array<uint8_t, 16>& uuid() const override { return uuid_; }
  Result<std::vector<ScannedBlock>> Scan(const ScanProgress&) override {
    const double start = CpuNow();
    std::vector<ScannedBlock> blocks(num_blocks_);
    Headers headers;
    for (SlotId slot = 0; slot < num_blocks_; ++slot) blocks[slot] = {slot, headers.Next()};
    *scan_s_ = CpuNow() - start;
    return blocks;
  }
  Result<std::vector<ScannedBlock>> ScanHeaders(const ScanProgress& progress) override {
    return Scan(progress);
  }
  const std::vector<ScannedBlock>* index() const override { return nullptr; }
  const std::vector<SlotDamage>& damaged() const override { return damaged_; }
  bool Seal(const BlockKey&, std::byte*) override { return false; }
  void StartWrite(SlotId, const BlockHeader&, bool, std::byte*, uint64_t tag) override {
    Done(tag);
  }
  void StartRead(SlotId, const BlockHeader&, uint32_t, uint32_t, std::byte*,
                 uint64_t tag) override {
    Done(tag);
  }
  void StartProbe(uint64_t tag) override { Done(tag); }
  bool can_submit() const override { return done_.size() < 64; }
  uint32_t in_flight() const override { return static_cast<uint32_t>(done_.size()); }
  uint32_t num_late() const override { return 0; }
  void Poll(std::vector<SsdCompletion>* out, int64_t) override {
    std::ranges::move(done_, std::back_inserter(*out));
    done_.clear();
  }
  Status Sync(const StoreCounters&, std::span<const ScannedBlock>) override { return Status(); }
  KeyRing* keys() const override { return nullptr; }
  StoreCounters counters() const override { return {}; }
  uint64_t bytes_read() const override { return 0; }
  double read_rate() const override { return 0; }
  uint64_t bytes_written() const override { return 0; }
  uint64_t checksum_failures() const override { return 0; }
  const char* io_name() const override { return "none"; }
  const std::string& io_why() const override { return why_; }

 private:
  void Done(uint64_t tag) { done_.push_back({tag, Status(), false}); }

  const uint32_t num_blocks_;
  double* const scan_s_;
  std::vector<SsdCompletion> done_;
  const std::array<uint8_t, 16> uuid_{};
  std::vector<SlotDamage> damaged_;
  const std::string why_ = "a benchmark";
};

struct Row {
  uint32_t blocks = 0;
  double bytes = 0, open_s = 0, lookup_us = 0, queue_us = 0, turn_us = 0;
};

double MallocBytes() {
  const struct mallinfo2 info = mallinfo2();
  return static_cast<double>(info.uordblks + info.hblkhd);
}

// What a model's step leaves of the caches.
void EmptyCaches() {
  static std::vector<uint64_t> other((256 << 20) / sizeof(uint64_t));
  for (size_t i = 0; i < other.size(); i += 8) ++other[i];
}

// Median CPU time of `run` in microseconds.
template <typename Run>
double Median(int repeats, const Run& run) {
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    EmptyCaches();
    const double start = CpuNow();
    run(i);
    times.push_back((CpuNow() - start) * 1e6);
  }
  std::ranges::nth_element(times, times.begin() + repeats / 2);
  return times[repeats / 2];
}

Row Measure(uint32_t num_conversations) {
  Row row{.blocks = num_conversations * kConversation};
  StoreOptions options;
  options.layout = kLayout;
  // For one conversation: a turn finds its history on SSD alone, however few blocks there are.
  options.dram_bytes = (kConversation + kConversation / 4) * kLayout.host_slot_bytes();
  const double memory = MallocBytes(), start = CpuNow();
  double scan_s = 0;
  auto opened = OpenStoreOn(options, std::make_unique<NullSsd>(row.blocks, &scan_s), nullptr);
  CA_CHECK(opened.ok());
  row.open_s = CpuNow() - start - scan_s;
  AttentionStore* store = opened.value().get();
  row.bytes = (MallocBytes() - memory) / row.blocks;

  // A queue that moves up: each time the head has left and another conversation joins the end.
  std::vector<std::shared_ptr<Chain>> chains;
  for (uint32_t i = 0; i < 4 * kWaiting; ++i) {
    chains.push_back(store->NewChain("", {}));
    chains.back()->Append(
        TokensOf(i * 2654435761u % num_conversations, kConversation * kLayout.block_size));
    chains.back()->Append(std::vector<TokenId>{static_cast<TokenId>(i)});
  }
  const auto chain = [&](size_t i) { return chains[i % chains.size()]; };
  row.lookup_us = Median(101, [&](int i) {
    CA_CHECK(store->Lookup(*chain(i)).total == kConversation * kLayout.block_size);
  });
  const auto set_queue = [&](size_t first) {
    std::vector<std::shared_ptr<Chain>> waiting;
    for (uint32_t i = 0; i < kWaiting; ++i) waiting.push_back(chain(first + i));
    store->SetQueue(waiting);
  };
  row.queue_us = Median(101, set_queue);
  row.turn_us = Median(101, [&](int i) {
    const std::vector<TokenId> token = {static_cast<TokenId>(1000 + i)};
    auto begun = store->Begin(chain(i), UINT32_MAX);
    for (; !begun.ok(); begun = store->Begin(chain(i), UINT32_MAX)) {
      CA_CHECK(begun.status().code() == Code::kExhausted);
      store->Poll();  // the tail of an earlier turn is on its way out
    }
    const auto sequence = std::move(begun.value());
    CA_CHECK(sequence->num_computed_tokens() == kConversation * kLayout.block_size);
    CA_CHECK(sequence->Reserve(1).ok());
    CA_CHECK(sequence->WaitLayer(0).ok());
    sequence->LayerDone(0, 1);
    sequence->Append(chain(i)->tokens().last(1));
    sequence->Commit();
    store->Poll();
  });
  return row;
}

void PrintTable() {
  std::printf("%9s %12s %8s %12s %12s %12s %12s\n", "blocks", "bytes/block", "open s", "lookup us",
              "lookups/s", "queue us", "turn us");
  std::vector<Row> rows;
  for (uint32_t conversations : {2u, 20u, 200u, 2000u}) {
    const Row row = rows.emplace_back(Measure(conversations));
    std::printf("%9u %12.0f %8.3f %12.1f %12.0f %12.1f %12.1f\n", row.blocks, row.bytes, row.open_s,
                row.lookup_us, 1e6 / row.lookup_us, row.queue_us, row.turn_us);
  }
  const Row &first = rows.front(), &last = rows.back();
  std::printf("last / first%55.2f%26.2f%13.2f\n", last.lookup_us / first.lookup_us,
              last.queue_us / first.queue_us, last.turn_us / first.turn_us);
}

void Die(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

void WriteBlocks(const SsdOptions& options, uint32_t num_blocks) {
  auto opened = SsdTier::Open(options);
  Die(opened.status());
  SsdTier* ssd = opened.value().get();
  auto buffers = MemoryTier::Open(Tier::kDram, 64 * kLayout.host_slot_bytes(), kLayout);
  Die(buffers.status());
  Headers headers;
  std::vector<SsdCompletion> done;
  std::vector<uint64_t> free;
  for (uint64_t i = 0; i < 64; ++i) free.push_back(i);
  for (SlotId slot = 0; slot < num_blocks || ssd->in_flight() > 0;) {
    while (slot < num_blocks && !free.empty() && ssd->can_submit()) {
      const auto buffer = static_cast<SlotId>(free.back());
      free.pop_back();
      ssd->StartWrite(slot++, headers.Next(), false, buffers.value()->slot(buffer), buffer);
    }
    done.clear();
    ssd->Poll(&done, 1000);
    for (const SsdCompletion& completion : done) {
      Die(completion.status);
      free.push_back(completion.tag);
    }
  }
}  // and no Sync: as after a crash

void MeasureOpen(const std::string& directory, uint32_t num_blocks) {
  StoreOptions options;
  options.layout = kLayout;
  options.dram_bytes = 1 << 20;
  options.ssd_bytes = SsdFileBytes(kLayout, num_blocks);
  options.path = directory;
  double start = Now();
  SsdOptions ssd_options;
  ssd_options.directory = directory;
  ssd_options.layout = kLayout;
  ssd_options.max_bytes = options.ssd_bytes;
  WriteBlocks(ssd_options, num_blocks);
  std::printf("%u blocks written in %.1f s\n", num_blocks, Now() - start);
  for (const char* after : {"a crash", "a clean close"}) {
    uint64_t reports = 0;
    options.progress = [&](uint64_t, uint64_t) { ++reports; };
    start = Now();
    auto opened = AttentionStore::Open(options);
    Die(opened.status());
    const double open_s = Now() - start;
    CA_CHECK(opened.value()->stats().tiers[static_cast<int>(Tier::kSsd)].used_slots == num_blocks);
    start = Now();
    Die(opened.value()->Close());
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    std::printf("open after %-13s %7.2f s, %lu reports of progress; close %.2f s; memory %ld MiB\n",
                after, open_s, static_cast<unsigned long>(reports), Now() - start,
                usage.ru_maxrss / 1024);
  }
}

}  // namespace
}  // namespace cachedattn

int main(int argc, char** argv) {
  if (argc == 1) {
    cachedattn::PrintTable();
  } else if (argc == 3 && std::atoi(argv[2]) > 0) {
    cachedattn::MeasureOpen(argv[1], static_cast<uint32_t>(std::atoi(argv[2])));
  } else {
    std::fprintf(stderr, "usage: directory_bench [DIR BLOCKS]\n");
    return 2;
  }
  return 0;
}
