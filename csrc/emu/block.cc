#include "csrc/emu/block.h"

#include <bit>
#include <cstdio>

namespace cachedattn::emu {

Block block;

bool Block::Run(void (*body)(const void*), const void* context, Index3 index, int threads,
                int shared_bytes, uint64_t seed) {
  body_ = body, context_ = context, index_ = index;
  random_ = seed;
  failed_ = false;
  error_.clear();
  threads_.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Thread& thread = threads_[i];
    thread.fiber = &NewFiber(i, &Block::ThreadMain);
    thread.started = thread.ended = thread.fenced = false;
    thread.copies.clear();
    thread.open_group = 0;
  }
  warps_.assign(threads / 32, {});
  for (Warp& warp : warps_) warp.runnable = kAllLanes, warp.order = Random() & 31;
  barriers_.fill({});
  shared_.Reset(shared_bytes, threads / 32);
  hopper_.Reset(threads / 32);
  current_ = static_cast<int>(Random() % threads);
  threads_[current_].started = true;
  SwitchFiber(MainFiber(), *threads_[current_].fiber, false);
  if (failed_) Abandon();
  return !failed_;
}

// Ends every thread where it stands, so that AddressSanitizer forgets its stack.
void Block::Abandon() {
  for (int i = 0; i < num_threads(); ++i) {
    if (!threads_[i].started || threads_[i].ended) continue;
    current_ = i;
    SwitchFiber(MainFiber(), *threads_[i].fiber, false);
  }
}

void Block::ThreadMain() {
  block.body_(block.context_);
  Warp& warp = block.warp();
  if (warp.arrived != 0) {
    block.Fail(Location::current(), "divergent warp: the thread ends while others are at %s",
               warp.collective);
  }
  block.EndThread();
}

void Block::EndThread() {
  Warp& warp = warps_[current_ / 32];
  self().ended = true;
  warp.runnable &= ~(1u << lane());
  warp.ended |= 1u << lane();
  const int next = failed_ ? -1 : PickNext();
  SwitchTo(next, true);
  __builtin_unreachable();
}

void Block::SwitchTo(int thread, bool ends) {
  Fiber& from = *self().fiber;
  if (thread < 0) {
    SwitchFiber(from, MainFiber(), ends);
  } else {
    current_ = thread;
    threads_[thread].started = true;
    SwitchFiber(from, *threads_[thread].fiber, ends);
  }
  if (failed_) EndThread();
}

int Block::PickWarp() {
  if (warps_[current_ / 32].runnable != 0) return current_ / 32;
  if (!hopper_.copies.empty() && Random() % 2 == 0) hopper_.Progress();
  int chosen = -1, seen = 0;
  do {
    for (int i = 0; i < static_cast<int>(warps_.size()); ++i) {
      if (warps_[i].runnable != 0 && Random() % ++seen == 0) chosen = i;
    }
  } while (chosen < 0 && hopper_.Progress());
  return chosen;
}

int Block::PickNext() {
  const int chosen = PickWarp();
  if (chosen < 0) {
    for (const Thread& thread : threads_) {
      if (!thread.ended) FailDeadlock();
    }
    hopper_.CheckEnd();
    return -1;
  }
  // The first runnable lane in the warp's order.
  const Warp& warp = warps_[chosen];
  for (uint32_t i = 0;; ++i) {
    const uint32_t lane = i ^ warp.order;
    if (warp.runnable >> lane & 1) return 32 * chosen + static_cast<int>(lane);
  }
}

void Block::FailDeadlock() {
  constexpr int kNamed = 6;
  char text[1000];
  size_t length = 0;
  int others = 0;
  const Thread* first = nullptr;
  for (int i = 0; i < num_threads(); ++i) {
    const Thread& thread = threads_[i];
    if (thread.ended) continue;
    // A thread that waits for the same as the one before it adds nothing.
    const Thread* before = i > 0 && !threads_[i - 1].ended ? &threads_[i - 1] : nullptr;
    if (before != nullptr && before->waits_for == thread.waits_for &&
        before->at.line() == thread.at.line() && i % 32 != 0) {
      continue;
    }
    if (first == nullptr) first = &thread;
    if (others++ >= kNamed) continue;
    length += std::snprintf(text + length, sizeof(text) - length, "; thread %d waits for %s (%u)",
                            i, thread.waits_for, thread.at.line());
  }
  const Location at = first->at;
  Fail(at, "deadlock%s%s", text, others > kNamed ? "; .." : "");
}

uint64_t Block::Random() {  // splitmix64
  uint64_t x = random_ += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

void Block::Fail(const Location& at, const char* format, ...) {
  va_list args;
  va_start(args, format);
  Describe(current_, at, format, args);
  va_end(args);
  failed_ = true;
  EndThread();
}

void Block::Describe(int thread, const Location& at, const char* format, va_list args) {
  char what[1200], where[400];
  std::vsnprintf(what, sizeof(what), format, args);
  std::snprintf(where, sizeof(where), "%s:%u: thread %d of block (%d, %d, %d): ", at.file_name(),
                at.line(), thread, index_.x, index_.y, index_.z);
  error_.assign(where).append(what);
}

void Block::Suspend(const char* waits_for, const Location& at) {
  Thread& thread = self();
  thread.waits_for = waits_for, thread.at = at;
  warp().runnable &= ~(1u << lane());
  const int next = PickNext();
  if (next != current_) SwitchTo(next, false);
}

void Block::Wake(int thread) { warps_[thread / 32].runnable |= 1u << (thread % 32); }

void Block::WakeWarp(int warp) {
  warps_[warp].runnable = kAllLanes;
  warps_[warp].order = Random() & 31;
}

void Block::SuspendWarp(const char* waits_for, const Location& at) {
  warp().runnable = 0;
  Suspend(waits_for, at);
}

bool Block::Arrive(const char* name, uint64_t key, void* args, const Location& at) {
  Warp& mine = warp();
  if (mine.ended != 0) {
    Fail(at, "divergent warp: at %s after thread %d has ended", name,
         32 * warp_index() + std::countr_zero(mine.ended));
  }
  if (mine.arrived == 0) {
    mine.collective = name, mine.key = key;
  } else if (mine.collective != name || mine.key != key) {
    Fail(at, "divergent warp: at %s (%llu) while thread %d is at %s (%llu), line %u", name,
         static_cast<unsigned long long>(key), 32 * warp_index() + std::countr_zero(mine.arrived),
         mine.collective, static_cast<unsigned long long>(mine.key),
         threads_[32 * warp_index() + std::countr_zero(mine.arrived)].at.line());
  }
  mine.args[lane()] = args;
  mine.arrived |= 1u << lane();
  if (mine.arrived != kAllLanes) {
    Suspend(name, at);
    return false;
  }
  mine.arrived = 0;
  return true;
}

bool Block::ArriveAtBarrier(int id, int threads, bool waits, const Location& at) {
  if (id < 0 || id > 15) Fail(at, "barrier %d: there are 16", id);
  if (threads <= 0 || threads % 32 != 0 || threads > num_threads()) {
    Fail(at, "barrier %d of %d threads, in a block of %d", id, threads, num_threads());
  }
  NamedBarrier& barrier = barriers_[id];
  if (barrier.arrived == 0) {
    barrier.expected = threads;
  } else if (barrier.expected != threads) {
    Fail(at, "barrier %d of %d threads, but others came to it for %d", id, threads,
         barrier.expected);
  }
  shared_.SyncLanes(warp_index());
  shared_.Release(warp_index(), barrier.clock);
  barrier.arrived += 32;
  if (waits) barrier.waiting.push_back(warp_index());
  if (barrier.arrived < barrier.expected) return !waits;
  for (const int warp : barrier.waiting) {
    shared_.Acquire(warp, barrier.clock);
    if (warp != warp_index()) WakeWarp(warp);
  }
  barrier = {};
  return true;
}

}  // namespace cachedattn::emu
