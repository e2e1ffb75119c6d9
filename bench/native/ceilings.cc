// What this machine can do at best, for the limits that bench/attention/ computes:
//
//     ceilings THREADS MEGABYTES
//
// answers every line on stdin with {"read_gbps": .., "fma_gflops": .., "bf16_gflops": ..}: a stream
// read of a buffer of that size, multiply-adds in float32, and dot products of bfloat16 pairs (0
// where the machine has no such instruction). Each is the best of a few short runs of all threads
// at once: what neighbours take away is no property of the machine.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kLine = 64, kAhead = 4096;  // bytes
constexpr int64_t kSteps = 1 << 20;           // of the arithmetic loops: some milliseconds
constexpr int kRuns = 6;                      // of each kind

// Reads `bytes` bytes as `streams` streams, a line of each in turn: the prefetchers of some
// machines do best on one stream, those of others need several.
void Read(const char* data, int64_t bytes, int64_t streams) {
  const int64_t part = bytes / streams / kLine * kLine;
  for (int64_t i = 0; i < part; i += kLine) {
    for (int64_t s = 0; s < streams; ++s) {
      const char* line = data + s * part + i;
      __builtin_prefetch(line + kAhead);
      asm volatile("vmovdqu (%0), %%ymm0\n vmovdqu 32(%0), %%ymm1" ::"r"(line) : "xmm0", "xmm1");
    }
  }
}

// kSteps times twelve independent accumulators, more than latency times issue width anywhere.
#define CA_LOOP(op, reg)                                                                      \
  int64_t n = kSteps;                                                                         \
  asm volatile(                                                                               \
      "vpxor %%xmm12, %%xmm12, %%xmm12\n"                                                     \
      "1:\n"                                                                                  \
      ".irp i,0,1,2,3,4,5,6,7,8,9,10,11\n" op " %%" reg "12, %%" reg "12, %%" reg             \
      "\\i\n"                                                                                 \
      ".endr\n"                                                                               \
      "dec %0\n"                                                                              \
      "jnz 1b\n"                                                                              \
      "vzeroupper"                                                                            \
      : "+r"(n)                                                                               \
      :                                                                                       \
      : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", \
        "xmm10", "xmm11", "xmm12")
void Fma256() { CA_LOOP("vfmadd231ps", "ymm"); }
void Fma512() { CA_LOOP("vfmadd231ps", "zmm"); }
void Bf16() { CA_LOOP("vdpbf16ps", "zmm"); }

// Shortest time of `run(thread)` on all threads, from a common start to the last one's end.
template <typename F>
double Seconds(int num_threads, const F& run) {
  double best = 1e30;
  for (int i = 0; i < kRuns; ++i) {
    std::atomic<int> waiting{num_threads};
    std::atomic<bool> go{false};
    std::vector<std::thread> threads;
    for (int t = 0; t < num_threads; ++t) {
      threads.emplace_back([&, t] {
        --waiting;
        while (!go) std::this_thread::yield();
        run(t);
      });
    }
    while (waiting > 0) std::this_thread::yield();
    const auto start = std::chrono::steady_clock::now();
    go = true;
    for (std::thread& thread : threads) thread.join();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    best = std::min(best, taken.count());
  }
  return best;
}

double ReadGbps(int num_threads, const char* data, int64_t bytes) {
  const int64_t share = bytes / num_threads;
  double best = 1e30;
  for (const int64_t streams : {1, 4, 8}) {
    const auto run = [&](int t) { Read(data + t * share, share, streams); };
    best = std::min(best, Seconds(num_threads, run));
  }
  return static_cast<double>(bytes) / best / 1e9;
}

double Gflops(int num_threads, void (*loop)(), int flops_per_instruction) {
  const double seconds = Seconds(num_threads, [&](int) { loop(); });
  return 12. * kSteps * flops_per_instruction * num_threads / seconds / 1e9;
}

}  // namespace

int main(int argc, char** argv) {
  const int num_threads = argc == 3 ? std::atoi(argv[1]) : 0;
  const int64_t megabytes = argc == 3 ? std::atoll(argv[2]) : 0;
  if (num_threads < 1 || megabytes < 1) {
    std::fprintf(stderr, "usage: ceilings THREADS MEGABYTES\n");
    return 2;
  }
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::fprintf(stderr, "ceilings: needs AVX2 and FMA\n");
    return 1;
  }
  const bool wide = __builtin_cpu_supports("avx512f");
  const bool pairs = wide && __builtin_cpu_supports("avx512bf16");
  const int64_t bytes = megabytes << 20;
  void* data =
      mmap(nullptr, bytes + kAhead, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    std::perror("ceilings");
    return 1;
  }
  madvise(data, bytes, MADV_HUGEPAGE);
  std::memset(data, 1, bytes);
  for (std::string line; std::getline(std::cin, line);) {
    const double read = ReadGbps(num_threads, static_cast<const char*>(data), bytes);
    const double fma = wide ? Gflops(num_threads, Fma512, 32) : Gflops(num_threads, Fma256, 16);
    const double bf16 = pairs ? Gflops(num_threads, Bf16, 64) : 0;
    std::printf("{\"read_gbps\": %.2f, \"fma_gflops\": %.1f, \"bf16_gflops\": %.1f}\n", read, fma,
                bf16);
    std::fflush(stdout);
  }
}
