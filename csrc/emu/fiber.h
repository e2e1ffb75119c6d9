// Fibers: each runs on a stack of its own until it hands control to another one. x86-64 only, by a
// hand-written switch: a block of 256 threads switches some 50000 times a key tile, and ucontext
// would spend a system call on each. AddressSanitizer is told of every switch.
#pragma once

#include <cstddef>

namespace cachedattn::emu {

struct Fiber {
  void (*entry)() = nullptr;
  void* stack_pointer = nullptr;  // while it does not run
  const void* stack = nullptr;    // lowest address
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// The fiber that is the caller's own thread.
Fiber& MainFiber();

// `fiber`, one of at least `n` whose stacks stay from call to call, will run `entry` when switched
// to for the first time; `entry` never returns.
Fiber& NewFiber(int i, void (*entry)());

// Continues `to`; returns when something continues `from`, which never happens when it `ends`.
void SwitchFiber(Fiber& from, Fiber& to, bool ends);

}  // namespace cachedattn::emu
