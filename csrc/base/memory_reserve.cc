#include "csrc/base/memory_reserve.h"

#include <atomic>
#include <new>

#include "csrc/base/check.h"

namespace cachedattn {

namespace {

constexpr size_t kPieceBytes = 64 << 10;

thread_local MemoryReserve* current = nullptr;

// The handler that was there before ours, for everything outside of a Use. Ours stays: threads
// that enter and leave could not agree on which one to put back.
std::atomic<std::new_handler> previous = nullptr;

}  // namespace

MemoryReserve::MemoryReserve(size_t bytes) : pieces_((bytes + kPieceBytes - 1) / kPieceBytes) {
  Refill();
  if (!full()) throw std::bad_alloc();
}

void MemoryReserve::OnNoMemory() {
  if (current == nullptr) {
    const std::new_handler handler = previous;
    if (handler == nullptr) throw std::bad_alloc();
    return handler();
  }
  CA_CHECK(current->num_held_ > 0);  // out of memory inside of a call, the reserve included
  current->pieces_[--current->num_held_].reset();
}

void MemoryReserve::Refill() {
  while (!full()) {
    void* piece = ::operator new(kPieceBytes, std::nothrow);
    if (piece == nullptr) return;
    pieces_[num_held_++].reset(piece);
  }
}

MemoryReserve::Use::Use(MemoryReserve* reserve) : outer_(current) {
  const std::new_handler handler = std::get_new_handler();
  if (handler != &OnNoMemory) previous = std::set_new_handler(&OnNoMemory);
  current = nullptr;
  reserve->Refill();
  current = reserve;
}

MemoryReserve::Use::~Use() { current = outer_; }

bool MemoryReserve::in_use() { return current != nullptr; }

}  // namespace cachedattn
