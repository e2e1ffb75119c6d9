#include "csrc/store/attention_store.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <new>
#include <system_error>

#include "csrc/io/io_queue.h"
#include "csrc/store/open_store.h"
#include "csrc/store/sequence.h"
#include "csrc/store/store_core.h"

namespace cachedattn {

namespace {

Status Invalid(std::string message) { return Status(Code::kInvalidArgument, std::move(message)); }

Status Validate(const StoreOptions& options) {
  if (Status status = options.layout.Validate(); !status.ok()) return status;
  if (!(options.dram_reserve >= 0 && options.dram_reserve <= 0.5)) {
    return Invalid("dram_reserve: must be from 0 to 0.5, got " +
                   std::to_string(options.dram_reserve));
  }
  if (options.gpu >= 0 && options.device_bytes == 0) {
    return Invalid("device_bytes: a GPU needs a pool for blocks");
  }
  if (options.ssd_bytes == 0 && !options.master_key_file.empty()) {
    return Invalid("encrypt: there is no SSD tier to encrypt");
  }
  if (options.ssd_bytes != 0 && options.path.empty()) {
    return Invalid("path: an SSD tier needs a directory");
  }
  if (options.tenant_quota_bytes != 0 &&
      options.tenant_quota_bytes < options.layout.host_slot_bytes()) {
    return Invalid("tenant_quota_bytes: " + std::to_string(options.tenant_quota_bytes) +
                   " hold no block of " + std::to_string(options.layout.host_slot_bytes()));
  }
  if (options.io_depth < 8 || options.io_depth > 4096) {
    return Invalid("io_depth: must be from 8 to 4096, got " + std::to_string(options.io_depth));
  }
  // The disk gets so much at a time, and has to answer within the deadline.
  const double at_once = 2.0 * IoQueue::kMaxBytes;
  if (options.ssd_read_limit != 0 &&
      at_once * 1e6 > 1.0 * options.ssd_read_limit * options.io_deadline_us) {
    return Invalid("ssd_read_limit: " + std::to_string(options.ssd_read_limit) +
                   " bytes/s needs an io_deadline of " +
                   std::to_string(at_once / options.ssd_read_limit) + " s or more");
  }
  return Status();
}

// The memory that an open takes is not reserved: it may be refused.
template <typename Open>
Result<std::unique_ptr<AttentionStore>> OrExhausted(const Open& open) {
  try {
    return open();
  } catch (const std::bad_alloc&) {
    return Status(Code::kExhausted, "out of memory");
  } catch (const std::system_error& error) {
    return Status(Code::kExhausted, std::string("cannot start the copy threads: ") + error.what());
  }
}

class StoreImpl final : public AttentionStore {
 public:
  StoreImpl(const StoreOptions& options, Tiers&& tiers)
      : core_(new StoreCore(options, std::move(tiers)), &StoreImpl::Delete) {
    const SsdTier* ssd = core_->tiers.ssd.get();
    io_report_ = ssd ? std::string(ssd->io_name()) + ": " + ssd->io_why() : "no SSD tier";
  }
  ~StoreImpl() override {
    core_->abandoned = true;
    (void)Close();
  }

  Status Restore() { return core_->tiers.ssd ? core_->Restore(core_->options.progress) : Status(); }

  Status Close() override { return core_->Close(); }
  Status CheckUsable() const override { return core_->CheckUsable(); }

  std::shared_ptr<Chain> NewChain(std::string_view tenant, const Truncation& truncation,
                                  uint64_t conversation) override {
    const StoreOptions& options = core_->options;
    // A tenant's first use is written down, which is not for a child or after the end.
    KeyRing* keys = core_->usable() ? core_->tiers.keys() : nullptr;
    const BlockKey root =
        keys ? keys->RootOf(options.identity, tenant) : RootKey(options.identity, tenant);
    return std::make_shared<Chain>(core_->tiers.IdOf(tenant), root, options.layout.block_size,
                                   truncation, conversation);
  }

  void SetQueue(std::span<const std::shared_ptr<Chain>> waiting) override {
    const MemoryReserve::Use use(&core_->memory);
    if (core_->usable()) core_->SetQueue(waiting);
  }

  void Advise(std::string_view tenant, uint64_t conversation, Advice advice, int64_t ns) override {
    const MemoryReserve::Use use(&core_->memory);
    if (!core_->usable() || conversation == 0) return;
    const auto index = core_->directory.FindTenant(core_->tiers.IdOf(tenant));
    if (!index) return;  // it has nothing here
    Policy* policy = core_->policy.get();
    const Conversation handle = policy->Hold(conversation, *index);
    if (advice == Advice::kOver) policy->SetOver(handle);
    if (advice == Advice::kTimeToLive) policy->SetTimeToLive(handle, ns);
    if (advice == Advice::kLease) policy->SetLease(handle, ns);
    if (advice == Advice::kReturn) policy->SetReturn(handle, ns);
    policy->Release(handle);
  }

  void UseStream(void* stream) override {
    if (core_->usable() && core_->tiers.gpu != nullptr) core_->tiers.gpu->SetCompute(stream);
  }

  CachedTokens Lookup(const Chain& chain) override {
    const MemoryReserve::Use use(&core_->memory);
    if (!core_->usable() || chain.num_tokens() == 0) return CachedTokens();
    return core_->Count(
        chain, FindHistory(core_->directory, chain, chain.num_tokens() - 1, core_->tiers.ssd_on));
  }

  Result<std::unique_ptr<Sequence>> Begin(std::shared_ptr<Chain> chain, uint32_t max_history,
                                          const ComputeCost& cost) override {
    const MemoryReserve::Use use(&core_->memory);
    return SequenceImpl::Begin(core_, std::move(chain), max_history, cost);
  }

  void Poll() override {
    const MemoryReserve::Use use(&core_->memory);
    if (core_->usable()) core_->Drive(0);
  }
  bool Drain() override {
    const MemoryReserve::Use use(&core_->memory);
    return core_->usable() && core_->Drain();
  }
  void Flush() override {
    const MemoryReserve::Use use(&core_->memory);
    if (core_->usable()) core_->Flush();
  }
  void DropTier(Tier tier) override {
    if (!core_->usable()) return;
    const MemoryReserve::Use use(&core_->memory);
    core_->Flush();
    core_->FinishLoads();
    core_->evictor.DropAll(tier);
  }

  Result<bool> EraseTenant(std::string_view tenant) override {
    if (Status status = core_->CheckUsable(); !status.ok()) return status;
    return core_->EraseTenant(tenant);
  }

  StoreStats stats() const override { return core_->Stats(); }
  std::array<uint32_t, kNumTiers> TenantUsage(std::string_view tenant) const override {
    return core_->TenantUsage(core_->tiers.IdOf(tenant));
  }
  const std::string& io_report() const override { return io_report_; }
  void EnableTrace(bool on) override { core_->trace.Enable(on); }
  std::vector<TraceEvent> TakeTrace() override { return core_->trace.Take(); }
  void CheckInvariants() const override { core_->CheckInvariants(); }

  PoolView pool() const override {
    const MemoryTier& pool = core_->tiers.pool();
    return {pool.payload(0), pool.slots().capacity(), pool.slot_bytes(),
            core_->options.layout.slice_stride(), core_->tiers.gpu ? core_->options.gpu : -1};
  }
  const KvLayout& layout() const override { return core_->options.layout; }

 private:
  // A forked child leaves everything as it is: to end an engine is to wait for its I/O and to take
  // completions off a ring that the parent still uses.
  static void Delete(StoreCore* core) {
    if (!core->forked()) delete core;
  }

  const std::shared_ptr<StoreCore> core_;
  std::string io_report_;
};

// Without a GPU the device pool, if any, is memory of this process.
Result<std::unique_ptr<AttentionStore>> OpenTiers(const StoreOptions& options,
                                                  std::unique_ptr<SsdTier> ssd,
                                                  std::unique_ptr<CopyEngine> copy,
                                                  std::unique_ptr<Gpu> gpu) {
  Tiers tiers;
  tiers.layout = options.layout;
  tiers.gpu = std::move(gpu);
  auto dram = MemoryTier::Open(Tier::kDram, options.dram_bytes, options.layout, options.poison);
  if (!dram.ok()) return dram.status();
  tiers.dram = std::move(dram.value());
  if (options.device_bytes != 0) {
    Gpu* const on = tiers.gpu.get();
    auto device = MemoryTier::Open(
        Tier::kDevice, options.device_bytes, options.layout, options.poison,
        on ? [on](uint64_t bytes) { return on->Allocate(bytes); } : AllocateSlab(MapHostSlab));
    if (!device.ok()) return device.status();
    tiers.device = std::move(device.value());
    tiers.copy = std::move(copy);
    if (on != nullptr) {
      auto engine = NewGpuCopyEngine(on);
      if (!engine.ok()) return engine.status();
      tiers.copy = std::move(engine.value());
      const MemoryTier& dram = *tiers.dram;
      tiers.pinner = std::make_unique<Pinner>(on, dram.slab(), dram.slot_bytes());
    }
  }
  if (ssd != nullptr && ssd->keys() != nullptr) {
    for (MemoryTier* memory : {tiers.dram.get(), tiers.device.get()}) {
      if (memory != nullptr) memory->LeaveOutOfDumps();
    }
  }
  if (ssd != nullptr) {
    tiers.ssd_slots = std::make_unique<SlotPool>(ssd->num_slots());
    tiers.ssd = std::move(ssd);
  }
  auto store = std::make_unique<StoreImpl>(options, std::move(tiers));
  if (Status status = store->Restore(); !status.ok()) return status;
  return std::unique_ptr<AttentionStore>(std::move(store));
}

Result<std::unique_ptr<AttentionStore>> OpenAll(const StoreOptions& options) {
  std::unique_ptr<SsdTier> ssd;
  if (options.ssd_bytes != 0) {
    SsdOptions ssd_options{.directory = options.path,
                           .layout = options.layout,
                           .identity = options.identity,
                           .model_name = options.model_name,
                           .max_bytes = options.ssd_bytes,
                           .io = {.kind = options.io,
                                  .depth = options.io_depth,
                                  .read_bytes_per_s = options.ssd_read_limit},
                           .io_deadline_us = options.io_deadline_us,
                           .clock = options.clock};
    if (!options.master_key_file.empty()) {
      auto keys = KeyRing::Open(options.master_key_file);
      if (!keys.ok()) return keys.status();
      ssd_options.keys = std::move(keys.value());
    }
    auto opened = SsdTier::Open(ssd_options);
    if (!opened.ok()) return opened.status();
    ssd = std::move(opened.value());
  }
  std::unique_ptr<Gpu> gpu;
  if (options.gpu >= 0) {
    auto opened = OpenCudaGpu(static_cast<uint32_t>(options.gpu));
    if (!opened.ok()) return opened.status();
    gpu = std::move(opened.value());
  }
  std::unique_ptr<CopyEngine> copy;
  if (options.device_bytes != 0 && gpu == nullptr) {
    copy = options.io == IoKind::kInline ? NewInlineCopyEngine() : NewHostCopyEngine();
  }
  return OpenTiers(options, std::move(ssd), std::move(copy), std::move(gpu));
}

}  // namespace

Result<std::unique_ptr<AttentionStore>> OpenStoreOn(const StoreOptions& options,
                                                    std::unique_ptr<SsdTier> ssd,
                                                    std::unique_ptr<CopyEngine> copy) {
  if (Status status = Validate(options); !status.ok()) return status;
  return OrExhausted([&] { return OpenTiers(options, std::move(ssd), std::move(copy), nullptr); });
}

Result<std::unique_ptr<AttentionStore>> OpenStoreOnGpu(const StoreOptions& options,
                                                       std::unique_ptr<SsdTier> ssd,
                                                       std::unique_ptr<Gpu> gpu) {
  if (Status status = Validate(options); !status.ok()) return status;
  return OrExhausted([&] { return OpenTiers(options, std::move(ssd), nullptr, std::move(gpu)); });
}

Result<std::unique_ptr<AttentionStore>> AttentionStore::Open(const StoreOptions& options) {
  if (Status status = Validate(options); !status.ok()) return status;
  return OrExhausted([&] {
    (void)FreeParkedStores();
    return OpenAll(options);
  });
}

size_t FreeParkedStores() { return StoreCore::FreeParked(); }

namespace {

struct Registry {
  std::mutex mutex;
  std::map<int64_t, AttentionStore*> stores;
  int64_t next_handle = 1;
};
Registry& TheRegistry() {
  static Registry registry;
  return registry;
}

}  // namespace

int64_t RegisterStore(AttentionStore* store) {
  Registry& registry = TheRegistry();
  const std::lock_guard lock(registry.mutex);
  registry.stores.emplace(registry.next_handle, store);
  return registry.next_handle++;
}

void UnregisterStore(int64_t handle) {
  Registry& registry = TheRegistry();
  const std::lock_guard lock(registry.mutex);
  registry.stores.erase(handle);
}

AttentionStore* FindStore(int64_t handle) {
  Registry& registry = TheRegistry();
  const std::lock_guard lock(registry.mutex);
  const auto it = registry.stores.find(handle);
  return it == registry.stores.end() ? nullptr : it->second;
}

}  // namespace cachedattn
