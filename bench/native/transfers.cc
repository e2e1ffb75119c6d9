// Moves a history between the tiers, through the store and without it, for bench_transfer.py:
//
//     transfers DIRECTORY LAYERS KV_HEADS HEAD_DIM MEGABYTES [MASTER_KEY]
//
// (with a file that holds a master key: of an encrypted store)
// prints {"pieces": .., "blocks": .., "write": ..}: the requests that the store issues for each
// (depth reached, and a count of every size), then answers each line on stdin with
// {"bytes": .., "seconds": .., "cpu": ..}; cpu is that of this process, all its threads.
//
//     pieces, blocks       SSD -> DRAM: the preloader's reads, the prefetcher's
//     write                DRAM -> SSD: publishing a history until the last block has landed
//     device, memcpy       DRAM -> an emulated device; the same bytes copied by a plain loop
//     uring WHAT, pread WHAT   WHAT = pieces, blocks: the same requests in the same order at the
//                          same depth (pread: one by one) into the same memory, not looked at;
//                          WHAT = write: as many blocks to a file beside the store's, like that
//                          of three histories, one after the other
#include <fcntl.h>
#include <liburing.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "csrc/store/attention_store.h"

namespace cachedattn {
namespace {

// The text and no more: a benchmark that cannot go on has nothing to clean up.
[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "transfers: %s\n", what.c_str());
  std::exit(1);
}

template <typename T>
T Must(Result<T> result) {
  if (!result.ok()) Die(result.status().message());
  return std::move(result.value());
}
void Must(const Status& status) {
  if (!status.ok()) Die(status.message());
}

struct Request {
  uint64_t offset = 0;  // in the file
  std::byte* data = nullptr;
  uint32_t size = 0;
};
constexpr uint32_t kHistories = 3;  // on the SSD
constexpr uint32_t kDepth = 64;     // of the store's I/O engine, its default
struct Load {
  std::vector<Request> requests;
  uint32_t depth = 0;  // most in flight at a time
};

double CpuSeconds() {
  rusage used;
  getrusage(RUSAGE_SELF, &used);
  const auto seconds = [](const timeval& t) { return t.tv_sec + 1e-6 * t.tv_usec; };
  return seconds(used.ru_utime) + seconds(used.ru_stime);
}

template <typename F>
void Report(uint64_t bytes, const F& work) {
  const double cpu = CpuSeconds();
  const auto start = std::chrono::steady_clock::now();
  work();
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  std::printf("{\"bytes\": %lu, \"seconds\": %.6f, \"cpu\": %.6f}\n", bytes, taken.count(),
              CpuSeconds() - cpu);
  std::fflush(stdout);
}

// Pages that are there, huge where the system has them, of bytes that do not repeat.
void Fill(std::byte* data, uint64_t bytes) {
  static uint64_t state = 88172645463325252ull;
  for (uint64_t i = 0; i + 8 <= bytes; i += 8) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    std::memcpy(data + i, &state, 8);
  }
}
std::byte* Memory(uint64_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) Die("no memory");
  madvise(data, bytes, MADV_HUGEPAGE);
  Fill(static_cast<std::byte*>(data), bytes);
  return static_cast<std::byte*>(data);
}

// The plain loops.
int OpenFile(const std::string& path, int flags) {
  const int fd = open(path.c_str(), flags | O_DIRECT | O_CLOEXEC, 0600);
  if (fd < 0) Die("cannot open " + path + ": " + std::strerror(errno));
  return fd;
}

void OneByOne(int fd, const Load& load, bool write) {
  for (const Request& r : load.requests) {
    const auto offset = static_cast<off_t>(r.offset);
    const ssize_t moved =
        write ? pwrite(fd, r.data, r.size, offset) : pread(fd, r.data, r.size, offset);
    if (moved != static_cast<ssize_t>(r.size)) Die("a plain request fell short");
  }
}

void ByRing(io_uring* ring, int fd, const Load& load, bool write) {
  size_t next = 0, done = 0;
  while (done < load.requests.size()) {
    for (; next < load.requests.size() && next - done < load.depth; ++next) {
      const Request& r = load.requests[next];
      io_uring_sqe* sqe = io_uring_get_sqe(ring);
      if (write) {
        io_uring_prep_write(sqe, fd, r.data, r.size, r.offset);
      } else {
        io_uring_prep_read(sqe, fd, r.data, r.size, r.offset);
      }
      io_uring_sqe_set_data64(sqe, r.size);
    }
    io_uring_submit_and_wait(ring, 1);
    for (io_uring_cqe* cqe; io_uring_peek_cqe(ring, &cqe) == 0; ++done) {
      if (cqe->res != static_cast<int64_t>(io_uring_cqe_get_data64(cqe))) {
        Die("a plain request fell short");
      }
      io_uring_cqe_seen(ring, cqe);
    }
  }
}

// A store with a history on its SSD, or with one in DRAM below a device.
class Bench {
 public:
  Bench(const std::string& directory, const KvLayout& layout, uint64_t bytes, bool device,
        const std::string& master_key_file)
      : layout_(layout),
        blocks_(static_cast<uint32_t>(std::max<uint64_t>(bytes / layout.host_slot_bytes(), 8))) {
    StoreOptions options;
    options.layout = layout;
    options.model_name = "transfers";
    options.io_depth = kDepth;
    options.dram_bytes = (blocks_ + blocks_ / 4 + 2) * layout.host_slot_bytes();
    if (device) {
      options.device_bytes = (blocks_ + 2) * layout.payload_bytes();
    } else {
      // Each new history takes the places of the oldest, as in a store that is full.
      options.ssd_bytes = kHistories * blocks_ * (layout.host_slot_bytes() + 256) + 2 * kHugePage;
      options.path = directory;
      options.master_key_file = master_key_file;
    }
    store_ = Must(AttentionStore::Open(options));
    const AttentionStore::PoolView pool = store_->pool();
    // Header pages included, which lie before the payloads.
    Fill(pool.base, pool.num_slots * pool.slot_stride - layout.host_slot_bytes());
    for (int i = 0; i < (device ? 1 : 4); ++i) Publish(false);
  }

  uint64_t bytes() const { return blocks_ * layout_.host_slot_bytes(); }
  uint64_t payload_bytes() const { return blocks_ * layout_.payload_bytes(); }
  uint32_t num_blocks() const { return blocks_; }
  std::byte* host_slot(uint64_t i) const {  // of a store without a device
    const AttentionStore::PoolView pool = store_->pool();
    return pool.base - KvLayout::kHeaderBytes + i % pool.num_slots * pool.slot_stride;
  }

  // A history of its own, from computed to landed.
  void Publish(bool report) {
    store_->DropTier(Tier::kDevice);
    if (store_->stats().tiers[2].capacity_slots > 0) store_->DropTier(Tier::kDram);
    const uint32_t count = blocks_ * layout_.block_size;
    tokens_.assign(count + 1, ++seed_);
    auto sequence = Must(store_->Begin(HistoryAndOneToken(), 0));
    Must(sequence->Reserve(count));
    const auto publish = [&] {
      for (uint32_t l = 0; l < layout_.num_layers; ++l) sequence->LayerDone(l, count);
      sequence->Append(std::span(tokens_).first(count));
      sequence->Commit();
      store_->Flush();
    };
    report ? Report(bytes(), publish) : publish();
    sequence.reset();
  }

  // Brings the history back for a turn: from `away` down it is not there.
  void Bring(Tier away, bool report) {
    store_->DropTier(away);
    const auto chain = HistoryAndOneToken();
    const auto bring = [&] {
      auto sequence = Must(store_->Begin(chain, UINT32_MAX));
      if (sequence->num_computed_tokens() != blocks_ * layout_.block_size) Die("no history");
      for (uint32_t l = 0; l < layout_.num_layers; ++l) {
        if (sequence->loading()) Must(sequence->WaitLayer(l));
      }
      if (sequence->loading()) Die("the last layer came before another one");
    };
    report ? Report(away == Tier::kDevice ? payload_bytes() : bytes(), bring) : bring();
    CheckNothingFailed();
  }

  void Prefetch(bool report) {
    store_->DropTier(Tier::kDram);
    const auto chain = HistoryAndOneToken();
    const uint64_t until = store_->stats().ssd_bytes_read + bytes();
    const auto prefetch = [&] {
      const std::shared_ptr<Chain> waiting[] = {chain};
      store_->SetQueue(waiting);
      for (store_->Poll(); store_->stats().ssd_bytes_read < until; store_->Poll()) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));  // an engine would compute
      }
    };
    report ? Report(bytes(), prefetch) : prefetch();
    store_->SetQueue({});
    CheckNothingFailed();
  }

  // What `work` makes the store read or write; the places of a write are not told.
  template <typename F>
  Load Watch(TraceKind start, TraceKind end, const F& work) {
    store_->EnableTrace(true);
    work();
    Load load;
    std::map<SlotId, uint64_t> target;  // of the blocks, in the order of their first request
    uint32_t in_flight = 0;
    for (const TraceEvent& event : store_->TakeTrace()) {
      if (event.kind == end) --in_flight;
      if (event.kind != start) continue;
      load.depth = std::clamp(++in_flight, load.depth, kDepth);  // the rest waits in the store
      std::byte* slot = host_slot(target.try_emplace(event.slot, target.size()).first->second);
      uint64_t begin = layout_.host_slice_offset(event.first_layer);
      uint64_t size = event.num_layers * layout_.slice_stride();
      if (event.first_layer == 0) begin = 0, size += KvLayout::kHeaderBytes;
      load.requests.push_back({kHugePage + event.slot * layout_.host_slot_bytes() + begin,
                               slot + begin, static_cast<uint32_t>(size)});
    }
    store_->EnableTrace(false);
    return load;
  }

 private:
  std::shared_ptr<Chain> HistoryAndOneToken() {
    auto chain = store_->NewChain("", {});
    chain->Append(tokens_);
    return chain;
  }

  void CheckNothingFailed() const {
    const StoreStats stats = store_->stats();
    if (stats.failed_loads + stats.failed_saves + stats.checksum_failures > 0) Die("I/O failed");
  }

  const KvLayout layout_;
  const uint32_t blocks_;
  std::unique_ptr<AttentionStore> store_;
  std::vector<TokenId> tokens_;  // of the newest history, and one more
  TokenId seed_ = 0;
};

void Describe(const std::map<std::string, Load>& loads) {
  const char* separator = "{";
  for (const auto& [name, load] : loads) {
    std::map<uint32_t, uint32_t> sizes;
    for (const Request& r : load.requests) ++sizes[r.size];
    std::printf("%s\"%s\": {\"depth\": %u, \"sizes\": {", separator, name.c_str(), load.depth);
    separator = "";
    for (const auto& [size, count] : sizes) {
      std::printf("%s\"%u\": %u", separator, size, count);
      separator = ", ";
    }
    std::printf("}}");
    separator = ", ";
  }
  std::printf("}\n");
  std::fflush(stdout);
}

void CopySlices(std::byte* target, const std::byte* source, uint64_t bytes, uint64_t slice) {
  for (uint64_t i = 0; i < bytes; i += slice) std::memcpy(target + i, source + i, slice);
}

void Serve(const std::string& directory, const KvLayout& layout, uint64_t bytes,
           const std::string& master_key_file) {
  Bench ssd(directory + "/store", layout, bytes, false, master_key_file);
  std::map<std::string, Load> loads;
  using enum TraceKind;
  loads["write"] = ssd.Watch(kWriteStart, kWriteEnd, [&] { ssd.Publish(false); });
  loads["pieces"] = ssd.Watch(kReadStart, kReadEnd, [&] { ssd.Bring(Tier::kDram, false); });
  loads["blocks"] = ssd.Watch(kReadStart, kReadEnd, [&] { ssd.Prefetch(false); });

  const int file = OpenFile(directory + "/store/blocks", O_RDONLY);
  const int beside = OpenFile(directory + "/plain", O_RDWR | O_CREAT);
  const uint64_t beside_bytes = kHistories * ssd.bytes();
  if (posix_fallocate(beside, 0, static_cast<off_t>(beside_bytes)) != 0) Die("the disk is full");
  for (uint64_t i = 0; Request & r : loads["write"].requests) {
    r.offset = i * layout.host_slot_bytes();
    r.data = ssd.host_slot(i++);
  }
  const auto next_history = [&] {
    for (Request& r : loads["write"].requests) r.offset = (r.offset + ssd.bytes()) % beside_bytes;
  };
  for (uint32_t i = 0; i < kHistories; ++i) {  // as the store's file, it has been written to before
    next_history();
    OneByOne(beside, loads["write"], true);
  }

  Bench device("", layout, bytes, true, "");
  std::byte* const source = Memory(device.payload_bytes());
  std::byte* const target = Memory(device.payload_bytes());
  uint32_t depth = 1;
  for (const auto& [name, load] : loads) depth = std::max(depth, load.depth);
  io_uring ring;
  if (io_uring_queue_init(depth, &ring, IORING_SETUP_COOP_TASKRUN) != 0) Die("no io_uring");

  Describe(loads);
  for (std::string line; std::getline(std::cin, line);) {
    const size_t space = line.find(' ');
    const std::string way = line.substr(0, space);
    const std::string what = space == std::string::npos ? "" : line.substr(space + 1);
    if (way == "pieces") {
      ssd.Bring(Tier::kDram, true);
    } else if (way == "blocks") {
      ssd.Prefetch(true);
    } else if (way == "write") {
      ssd.Publish(true);
    } else if (way == "device") {
      device.Bring(Tier::kDevice, true);
    } else if (way == "memcpy") {
      Report(device.payload_bytes(),
             [&] { CopySlices(target, source, device.payload_bytes(), layout.slice_stride()); });
    } else if (loads.contains(what) && (way == "uring" || way == "pread")) {
      const bool write = what == "write";
      const int fd = write ? beside : file;
      if (write) next_history();
      Report(ssd.bytes(), [&] {
        way == "uring" ? ByRing(&ring, fd, loads[what], write) : OneByOne(fd, loads[what], write);
      });
    } else {
      Die("what is \"" + line + "\"?");
    }
  }
}

}  // namespace
}  // namespace cachedattn

int main(int argc, char** argv) {
  if (argc != 6 && argc != 7) {
    std::fprintf(stderr,
                 "usage: transfers DIRECTORY LAYERS KV_HEADS HEAD_DIM MEGABYTES [MASTER_KEY]\n");
    return 2;
  }
  const auto number = [argv](int i) { return static_cast<uint32_t>(std::atoi(argv[i])); };
  const cachedattn::KvLayout layout{number(2), number(3), number(4)};
  cachedattn::Must(layout.Validate());
  cachedattn::Serve(argv[1], layout, uint64_t{number(5)} << 20, argc == 7 ? argv[6] : "");
}
