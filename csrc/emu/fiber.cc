#include "csrc/emu/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// void ca_emu_switch(void** save, void* to): saves what a callee must keep, and swaps stacks.
asm(R"(
.text
.globl ca_emu_switch
.type ca_emu_switch, @function
ca_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ca_emu_switch, .-ca_emu_switch
)");
extern "C" void ca_emu_switch(void** save, void* to);

namespace cachedattn::emu {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 << 10;  // frames are several times larger
#else
constexpr size_t kStackBytes = 128 << 10;
#endif
constexpr size_t kGuardBytes = 4096;

Fiber main_fiber;
Fiber* switched_to = nullptr;

Fiber& Pooled(size_t i) {
  static std::deque<Fiber> pool;
  while (pool.size() <= i) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      std::perror("emulation: no memory for the stack of a fiber");
      std::abort();
    }
    Fiber& fiber = pool.emplace_back();
    fiber.stack = static_cast<char*>(memory) + kGuardBytes;
    fiber.stack_bytes = kStackBytes;
  }
  return pool[i];
}

// Tells AddressSanitizer that a switch has ended on the stack of `self`.
void FinishSwitch([[maybe_unused]] Fiber& self) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(self.fake_stack, &stack, &bytes);
  if (main_fiber.stack == nullptr) main_fiber.stack = stack, main_fiber.stack_bytes = bytes;
#endif
}

void Enter() {
  FinishSwitch(*switched_to);
  switched_to->entry();
}

}  // namespace

Fiber& MainFiber() { return main_fiber; }

Fiber& NewFiber(int i, void (*entry)()) {
  Fiber& fiber = Pooled(i);
  fiber.entry = entry;
  fiber.fake_stack = nullptr;
  // As ca_emu_switch leaves a stack: six registers and where to return. A function starts with the
  // stack pointer 8 bytes past a multiple of 16.
  const uintptr_t top = reinterpret_cast<uintptr_t>(fiber.stack) + fiber.stack_bytes;
  auto* frame = reinterpret_cast<uintptr_t*>(top) - 8;
  for (int j = 0; j < 8; ++j) frame[j] = 0;
  frame[6] = reinterpret_cast<uintptr_t>(&Enter);
  fiber.stack_pointer = frame;
  return fiber;
}

void SwitchFiber(Fiber& from, Fiber& to, bool ends) {
  switched_to = &to;
  if (&from == &main_fiber) main_fiber.stack = nullptr;  // it may be another thread each time
#if defined(__SANITIZE_ADDRESS__)
  if (ends) __asan_handle_no_return();  // it never leaves its frames: forget them
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#else
  (void)ends;
#endif
  ca_emu_switch(&from.stack_pointer, to.stack_pointer);
  FinishSwitch(from);
}

}  // namespace cachedattn::emu
