// Gpu on the CUDA runtime.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "csrc/copy/gpu.h"
#include "csrc/kernels/params.h"

namespace cachedattn {

namespace {

// A process that ends unloads the runtime before the last objects go.
bool Unloading(cudaError_t error) { return error == cudaErrorCudartUnloading; }

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess || Unloading(error)) return;
  std::fprintf(stderr, "cachedattn: the GPU failed: %s: %s\n", what, cudaGetErrorString(error));
  std::abort();
}

Status ErrorOf(cudaError_t error, const std::string& what) {
  (void)cudaGetLastError();  // it is told here, and not to who calls next
  const bool memory = error == cudaErrorMemoryAllocation;
  return Status(memory ? Code::kExhausted : Code::kIo, what + ": " + cudaGetErrorString(error));
}

// The calling thread's current GPU is another one meanwhile.
class OnGpu {
 public:
  explicit OnGpu(int index) {
    Check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != index) Check(cudaSetDevice(index), "cudaSetDevice");
    changed_ = before_ != index;
  }
  ~OnGpu() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  OnGpu(const OnGpu&) = delete;
  OnGpu& operator=(const OnGpu&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

class CudaGpu final : public Gpu {
 public:
  explicit CudaGpu(int index) : index_(index) {}
  ~CudaGpu() override {
    const OnGpu on(index_);
    for (cudaStream_t stream : streams_) {
      if (stream == nullptr) continue;
      Check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
      (void)cudaStreamDestroy(stream);
    }
    for (const Event& event : events_) (void)cudaEventDestroy(event.event);
  }

  Status Open() {
    const OnGpu on(index_);
    for (cudaStream_t& stream : streams_) {
      const cudaError_t error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
      if (error != cudaSuccess) return ErrorOf(error, "cannot make a stream");
    }
    return Status();
  }

  Result<std::unique_ptr<Slab>> Allocate(uint64_t bytes) override;
  Result<std::unique_ptr<Slab>> AllocateHost(uint64_t bytes) override;
  Status Pin(std::span<std::byte> host) override {
    const OnGpu on(index_);
    const cudaError_t error = cudaHostRegister(host.data(), host.size(), cudaHostRegisterPortable);
    if (error != cudaSuccess) {
      return ErrorOf(error, "cannot pin " + std::to_string(host.size()) + " bytes of DRAM");
    }
    if (pinned_begin_ == nullptr) pinned_begin_ = host.data();
    pinned_end_ = host.data() + host.size();
    return Status();
  }
  void Unpin(std::span<std::byte> host) override {
    const OnGpu on(index_);
    pinned_end_ = nullptr;
    Check(cudaHostUnregister(host.data()), "cudaHostUnregister");
  }

  void SetCompute(void* stream) override {
    if (stream == compute_) return;
    // What the old one waits for, the new one sees, too.
    const Mark before = Record(Queue::kCompute);
    compute_ = static_cast<cudaStream_t>(stream);
    Wait(Queue::kCompute, before);
    Forget(before);
  }

  void Copy(Queue queue, std::span<const CopyRequest> copies) override;
  void Sum(std::span<const CopyRequest> copies, std::span<uint64_t* const> leaf_sums) override;
  Mark Record(Queue queue) override { return RecordEvent(queue, false); }
  Mark RecordTime() override { return RecordEvent(Queue::kCompute, true); }
  int64_t NsBetween(Mark first, Mark last) override {
    const OnGpu on(index_);
    float ms = 0;
    Check(cudaEventElapsedTime(&ms, events_[first].event, events_[last].event),
          "cudaEventElapsedTime");
    return static_cast<int64_t>(1e6 * static_cast<double>(ms));
  }
  void Wait(Queue queue, Mark mark) override {
    const OnGpu on(index_);
    Check(cudaStreamWaitEvent(StreamOf(queue), events_[mark].event, 0), "cudaStreamWaitEvent");
  }
  bool Reached(Mark mark) override {
    const OnGpu on(index_);
    const cudaError_t error = cudaEventQuery(events_[mark].event);
    if (error == cudaErrorNotReady) {
      (void)cudaGetLastError();  // no error, but kept as one
      return false;
    }
    Check(error, "cudaEventQuery");
    return true;
  }
  void Forget(Mark mark) override { free_events_[events_[mark].timed].push_back(mark); }

  // In the order of the loads, and of the computing.
  void Fill(std::byte* at, int value, uint64_t size) {
    Order(Queue::kCompute, Queue::kLoad);
    const OnGpu on(index_);
    Check(cudaMemsetAsync(at, value, size, StreamOf(Queue::kLoad)), "cudaMemsetAsync");
    Order(Queue::kLoad, Queue::kCompute);
  }
  void Free(std::byte* base) {
    const OnGpu on(index_);
    Check(cudaFree(base), "cudaFree");
  }
  void FreeHost(std::byte* base) {
    const OnGpu on(index_);
    Check(cudaFreeHost(base), "cudaFreeHost");
  }

 private:
  struct Event {
    cudaEvent_t event = nullptr;
    bool timed = false;
  };

  Mark RecordEvent(Queue queue, bool timed) {
    const OnGpu on(index_);
    std::vector<Mark>& unused = free_events_[timed];
    if (unused.empty()) {
      unused.push_back(static_cast<Mark>(events_.size()));
      events_.push_back({nullptr, timed});
      Check(cudaEventCreateWithFlags(&events_.back().event,
                                     timed ? cudaEventDefault : cudaEventDisableTiming),
            "cudaEventCreate");
    }
    const Mark mark = unused.back();
    unused.pop_back();
    Check(cudaEventRecord(events_[mark].event, StreamOf(queue)), "cudaEventRecord");
    return mark;
  }
  cudaStream_t StreamOf(Queue queue) const {
    return queue == Queue::kCompute ? compute_ : streams_[static_cast<int>(queue)];
  }
  void Order(Queue first, Queue second) {
    const Mark mark = Record(first);
    Wait(second, mark);
    Forget(mark);
  }
  bool CopyBatch(Queue queue, std::span<const CopyRequest> copies);

  const int index_;
  cudaStream_t compute_ = nullptr;  // torch's default
  cudaStream_t streams_[2] = {};
  std::vector<Event> events_;
  std::vector<Mark> free_events_[2];  // without and with times
  bool batches_ = true;               // false: the driver has no cudaMemcpyBatchAsync
  // What Pin has done so far, on another thread.
  std::atomic<std::byte*> pinned_begin_ = nullptr, pinned_end_ = nullptr;
  std::vector<void*> targets_, sources_;  // of one batch
  std::vector<size_t> sizes_;
};

class CudaSlab final : public Slab {
 public:
  CudaSlab(CudaGpu* gpu, std::span<std::byte> bytes) : Slab(bytes), gpu_(gpu) {}
  ~CudaSlab() override { gpu_->Free(bytes().data()); }
  CudaSlab(const CudaSlab&) = delete;
  CudaSlab& operator=(const CudaSlab&) = delete;

  bool on_host() const override { return false; }
  void Fill(std::byte* at, int value, uint64_t size) override { gpu_->Fill(at, value, size); }

 private:
  CudaGpu* const gpu_;
};

class PinnedSlab final : public Slab {
 public:
  PinnedSlab(CudaGpu* gpu, std::span<std::byte> bytes) : Slab(bytes), gpu_(gpu) {}
  ~PinnedSlab() override { gpu_->FreeHost(bytes().data()); }
  PinnedSlab(const PinnedSlab&) = delete;
  PinnedSlab& operator=(const PinnedSlab&) = delete;

  bool on_host() const override { return true; }
  void Fill(std::byte* at, int value, uint64_t size) override { std::memset(at, value, size); }

 private:
  CudaGpu* const gpu_;
};

Result<std::unique_ptr<Slab>> CudaGpu::AllocateHost(uint64_t bytes) {
  const OnGpu on(index_);
  void* base = nullptr;
  const cudaError_t error = cudaHostAlloc(&base, bytes, cudaHostAllocPortable);
  if (error != cudaSuccess) {
    return ErrorOf(error, "cannot take " + std::to_string(bytes) + " bytes of pinned DRAM");
  }
  return std::unique_ptr<Slab>(
      std::make_unique<PinnedSlab>(this, std::span(static_cast<std::byte*>(base), bytes)));
}

Result<std::unique_ptr<Slab>> CudaGpu::Allocate(uint64_t bytes) {
  const OnGpu on(index_);
  void* base = nullptr;
  if (const cudaError_t error = cudaMalloc(&base, bytes); error != cudaSuccess) {
    return ErrorOf(error, "cannot take " + std::to_string(bytes) + " bytes of GPU memory");
  }
  return std::unique_ptr<Slab>(
      std::make_unique<CudaSlab>(this, std::span(static_cast<std::byte*>(base), bytes)));
}

void CudaGpu::Copy(Queue queue, std::span<const CopyRequest> copies) {
  const OnGpu on(index_);
  if (batches_ && CopyBatch(queue, copies)) return;
  for (const CopyRequest& copy : copies) {
    Check(cudaMemcpyAsync(copy.target, copy.source, copy.size, cudaMemcpyDefault, StreamOf(queue)),
          "cudaMemcpyAsync");
  }
}

void CudaGpu::Sum(std::span<const CopyRequest> copies, std::span<uint64_t* const> leaf_sums) {
  const OnGpu on(index_);
  LeafSumsParams params;
  const LeafSecret& secret = TheLeafSecret();
  std::ranges::copy(secret.words, params.secret);
  std::ranges::copy(secret.last, params.secret_last);
  std::ranges::copy(secret.end, params.secret_end);
  params.size = copies.front().rows.size;  // slices of one store are all alike
  params.row_bytes = copies.front().rows.row_bytes;
  for (size_t begin = 0; begin < copies.size(); begin += params.num_slices) {
    const size_t count = std::min<size_t>(copies.size() - begin, LeafSumsParams::kMaxSlices);
    params.num_slices = static_cast<int>(count);
    for (size_t i = 0; i < count; ++i) {
      params.slices[i] = copies[begin + i].source;
      params.sums[i] = leaf_sums[begin + i];
      params.used_bytes[i] = copies[begin + i].rows.used_bytes;
    }
    if (const char* error = CudaLeafSums(params, compute_); error != nullptr) {
      std::fprintf(stderr, "cachedattn: the GPU failed: sums: %s\n", error);
      std::abort();
    }
  }
}

// False: not all of the host memory is pinned yet, or the driver cannot.
bool CudaGpu::CopyBatch(Queue queue, std::span<const CopyRequest> copies) {
  targets_.clear();
  sources_.clear();
  sizes_.clear();
  std::byte* const begin = pinned_begin_;
  std::byte* const end = pinned_end_;
  for (const CopyRequest& copy : copies) {
    const std::byte* host = copy.stream == CopyStream::kLoad ? copy.source : copy.target;
    if (host < begin || host >= end) return false;
    targets_.push_back(copy.target);
    sources_.push_back(const_cast<std::byte*>(copy.source));
    sizes_.push_back(copy.size);
  }
  cudaMemcpyAttributes attributes = {};
  attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
  size_t first = 0;
#if CUDART_VERSION >= 13000
  const cudaError_t error =
      cudaMemcpyBatchAsync(targets_.data(), sources_.data(), sizes_.data(), sizes_.size(),
                           &attributes, &first, 1, StreamOf(queue));
#else
  size_t failed = 0;
  const cudaError_t error =
      cudaMemcpyBatchAsync(targets_.data(), sources_.data(), sizes_.data(), sizes_.size(),
                           &attributes, &first, 1, &failed, StreamOf(queue));
#endif
  if (error == cudaErrorNotSupported || error == cudaErrorCallRequiresNewerDriver) {
    (void)cudaGetLastError();
    batches_ = false;
    return false;
  }
  Check(error, "cudaMemcpyBatchAsync");
  return true;
}

}  // namespace

Result<std::unique_ptr<Gpu>> OpenCudaGpu(uint32_t index) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  const std::string name = "cuda:" + std::to_string(index);
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    return Status(Code::kInvalidArgument,
                  "device: " + name + " cannot be used: " + cudaGetErrorString(error));
  }
  if (index >= static_cast<uint32_t>(count)) {
    return Status(Code::kInvalidArgument, "device: there is no " + name + ", the machine has " +
                                              std::to_string(count) + " CUDA GPUs");
  }
  auto gpu = std::make_unique<CudaGpu>(static_cast<int>(index));
  if (Status status = gpu->Open(); !status.ok()) return status;
  return std::unique_ptr<Gpu>(std::move(gpu));
}

}  // namespace cachedattn
