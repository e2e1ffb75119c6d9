// MemoryReserve: memory held back so that a call which has begun can end.
//
// Inside a Use, an allocation that the system refuses is served from the reserve, piece by piece.
// Who holds a reserve looks at full() before new work: while it is not, memory is short.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace cachedattn {

class MemoryReserve {
 public:
  explicit MemoryReserve(size_t bytes);
  MemoryReserve(const MemoryReserve&) = delete;
  MemoryReserve& operator=(const MemoryReserve&) = delete;

  bool full() const { return num_held_ == pieces_.size(); }

  // The calling thread's allocations may draw on the reserve while this lives. Begins by filling
  // it up, as far as there is memory. When even the reserve is used up the process aborts: nobody
  // may go on with a store that stopped halfway.
  class Use {
   public:
    explicit Use(MemoryReserve* reserve);
    ~Use();
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;

   private:
    MemoryReserve* const outer_;
  };
  // The calling thread is inside a Use.
  static bool in_use();

 private:
  struct Free {
    void operator()(void* piece) const { ::operator delete(piece); }
  };

  static void OnNoMemory();
  void Refill();

  std::vector<std::unique_ptr<void, Free>> pieces_;  // the first num_held_ are held
  size_t num_held_ = 0;
};

}  // namespace cachedattn
