#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>

#include "csrc/python/bindings.h"
#include "csrc/python/choices.h"
#include "csrc/store/attention_store.h"

namespace py = pybind11;

namespace cachedattn {
namespace {

// In the order of TraceKind.
constexpr const char* kTraceNames[] = {"read_start", "read_end", "load_start",  "load_end",
                                       "save_start", "save_end", "write_start", "write_end",
                                       "wait_start", "wait_end", "compute_end", "publish",
                                       "evict"};
static_assert(std::size(kTraceNames) == static_cast<size_t>(TraceKind::kEvict) + 1);

py::array_t<TokenId> ToArray(std::span<const TokenId> values) {
  return py::array_t<TokenId>(static_cast<py::ssize_t>(values.size()), values.data());
}

// A store and its handle; sequences hold a reference, so it outlives them.
struct PyStore {
  std::unique_ptr<AttentionStore> store;
  int64_t handle = 0;

  ~PyStore() {
    if (store) UnregisterStore(handle);
  }
  AttentionStore& get() {
    if (!store) Raise(Status(Code::kClosed, "the store is closed"));
    RaiseIfError(store->CheckUsable());
    return *store;
  }
  void Close() {
    if (!store) return;
    Status status;
    {
      py::gil_scoped_release release;
      status = store->Close();
    }
    RaiseIfError(status);
    UnregisterStore(handle);
    store.reset();
  }
};

// Members go in reverse order, so the sequence ends before what it uses.
struct PySequence {
  std::shared_ptr<PyStore> owner;
  std::shared_ptr<Chain> chain;
  std::unique_ptr<Sequence> sequence;

  Sequence& get() {
    if (!sequence) Raise(Status(Code::kClosed, "the sequence has ended"));
    owner->get();
    return *sequence;
  }
  void CheckLayer(uint32_t layer) {
    const uint32_t num_layers = owner->get().layout().num_layers;
    if (layer < num_layers) return;
    throw py::value_error("layer " + std::to_string(layer) + " is not in [0, " +
                          std::to_string(num_layers) + ")");
  }
  // Tokens must fit the reserved slots and agree with what the chain already holds.
  void CheckAppend(std::span<const TokenId> tokens) {
    Sequence& running = get();
    const uint64_t slots = running.block_table().size() * uint64_t{chain->block_size()};
    if (running.context_len() + tokens.size() > slots || tokens.size() > running.room()) {
      throw py::value_error("append of " + std::to_string(tokens.size()) +
                            " tokens without a reserve for them");
    }
    const auto known = chain->tokens().subspan(running.num_computed_tokens());
    const size_t common = std::min(known.size(), tokens.size());
    if (!std::equal(tokens.begin(), tokens.begin() + common, known.begin())) {
      throw py::value_error("appended tokens differ from the chain's next tokens");
    }
  }
};

// `progress` may be called without the GIL held.
std::function<void(uint64_t, uint64_t)> WrapProgress(const py::object& progress) {
  if (progress.is_none()) return {};
  return [progress](uint64_t done, uint64_t total) {
    py::gil_scoped_acquire acquire;
    progress(done, total);
  };
}

std::shared_ptr<PyStore> OpenStore(
    uint32_t num_layers, uint32_t num_kv_heads, uint32_t head_dim, uint32_t block_size,
    const std::string& dtype, const std::string& identity, const std::string& model_name,
    int cuda_device, uint64_t device_bytes, uint64_t dram_bytes, uint64_t ssd_bytes,
    uint64_t tenant_quota_bytes, const std::string& path, const std::string& master_key_file,
    const std::string& policy, double dram_reserve, const std::string& io, uint32_t io_depth,
    int64_t io_deadline_us, uint64_t ssd_read_limit, bool poison, const py::object& progress) {
  StoreOptions options;
  options.layout = {num_layers, num_kv_heads, head_dim, block_size, ParseDType(dtype)};
  if (identity.size() != options.identity.bytes.size()) {
    throw py::value_error("identity must be 32 bytes, not " + std::to_string(identity.size()));
  }
  std::copy(identity.begin(), identity.end(), options.identity.bytes.begin());
  options.model_name = model_name;
  options.gpu = cuda_device;
  options.device_bytes = device_bytes;
  options.dram_bytes = dram_bytes;
  options.ssd_bytes = ssd_bytes;
  options.tenant_quota_bytes = tenant_quota_bytes;
  options.path = path;
  options.master_key_file = master_key_file;
  options.policy.kind = ParsePolicy(policy);
  options.dram_reserve = dram_reserve;
  options.io = ParseIo(io);
  options.io_depth = io_depth;
  options.io_deadline_us = io_deadline_us;
  options.ssd_read_limit = ssd_read_limit;
  options.poison = poison;
  options.progress = WrapProgress(progress);
  auto opened = [&] {
    py::gil_scoped_release release;
    return AttentionStore::Open(options);
  }();
  RaiseIfError(opened.status());
  auto out = std::make_shared<PyStore>();
  out->store = std::move(opened.value());
  out->handle = RegisterStore(out->store.get());
  return out;
}

std::shared_ptr<Chain> NewChain(PyStore& self, const py::object& tokens, const std::string& tenant,
                                uint32_t window, double ratio, uint32_t keep_first,
                                const std::string& conversation) {
  const Truncation truncation{window, ratio, keep_first};
  RaiseIfError(truncation.Validate(self.get().layout().block_size));
  auto chain = self.get().NewChain(tenant, truncation, ConversationName(conversation));
  chain->Append(ToTokens(tokens));
  return chain;
}

std::shared_ptr<PySequence> Begin(const std::shared_ptr<PyStore>& self,
                                  std::shared_ptr<Chain> chain, uint32_t max_history,
                                  const ComputeCost& cost) {
  if (chain->num_tokens() == 0) throw py::value_error("the chain holds no tokens");
  auto begun = self->get().Begin(chain, max_history, cost);
  if (begun.status().code() == Code::kExhausted) return nullptr;
  RaiseIfError(begun.status());
  return std::make_shared<PySequence>(PySequence{self, std::move(chain), std::move(begun.value())});
}

py::array_t<TokenId> ContextTokens(const Chain& chain, uint32_t num_tokens) {
  if (num_tokens > chain.num_tokens()) {
    throw py::value_error("the chain holds " + std::to_string(chain.num_tokens()) +
                          " tokens, not " + std::to_string(num_tokens));
  }
  std::vector<TokenId> out;
  for (const uint32_t block : chain.ContextBlocks(num_tokens)) {
    const uint32_t first = block * chain.block_size();
    const uint32_t last = std::min(first + chain.block_size(), num_tokens);
    const auto tokens = chain.tokens().subspan(first, last - first);
    out.insert(out.end(), tokens.begin(), tokens.end());
  }
  return ToArray(out);
}

template <typename Counts>
py::dict TierCounts(const Counts& values) {
  py::dict out;
  for (uint32_t i = 0; i < kNumTiers; ++i) out[kTierNames[i]] = values[i];
  return out;
}

py::dict ToDict(const Stalls& stalls) {
  py::dict out;
  out["ssd"] = 1e-9 * static_cast<double>(stalls.ssd_ns);
  out["copy"] = 1e-9 * static_cast<double>(stalls.copy_ns);
  return out;
}

py::dict Stats(PyStore& self) {
  const StoreStats stats = self.get().stats();
  py::dict out;
  py::dict tiers;
  for (uint32_t i = 0; i < kNumTiers; ++i) {
    const TierStats& tier = stats.tiers[i];
    py::dict entry;
    entry["capacity_slots"] = tier.capacity_slots;
    entry["used_slots"] = tier.used_slots;
    entry["pinned_slots"] = tier.pinned_slots;
    entry["capacity_bytes"] = tier.capacity_bytes;
    tiers[kTierNames[i]] = entry;
  }
  out["tiers"] = tiers;
  out["turns"] = stats.turns;
  out["tokens_requested"] = stats.tokens_requested;
  out["tokens_from"] = TierCounts(stats.tokens_from);
  out["tokens_recomputed"] = stats.tokens_recomputed;
  out["evictions"] = TierCounts(stats.evictions);
  out["ssd_bytes_read"] = stats.ssd_bytes_read;
  out["ssd_bytes_written"] = stats.ssd_bytes_written;
  out["ssd_read_rate"] = stats.ssd_read_rate;
  out["bytes_loaded"] = stats.bytes_loaded;
  out["bytes_saved"] = stats.bytes_saved;
  out["stall_s"] = ToDict(stats.stalls);
  out["loading_s"] = 1e-9 * static_cast<double>(stats.loading_ns);
  out["failed_loads"] = stats.failed_loads;
  out["failed_saves"] = stats.failed_saves;
  out["checksum_failures"] = stats.checksum_failures;
  out["io_errors"] = stats.io_errors;
  out["late_ios"] = stats.late_ios;
  out["quarantined_slots"] = stats.quarantined_slots;
  out["resting_slots"] = stats.resting_slots;
  out["ssd_state"] = stats.ssd_state;
  out["ssd_report"] = stats.ssd_report;
  out["outages"] = stats.outages;
  out["reads_in_flight"] = stats.reads_in_flight;
  out["writes_in_flight"] = stats.writes_in_flight;
  out["saves_waiting"] = stats.saves_waiting;
  out["pinned_bytes"] = stats.pinned_bytes;
  out["pin_failure"] = stats.pin_failure;
  return out;
}

void BindValues(py::module_& module) {
  py::class_<CachedTokens>(module, "CachedTokens")
      .def_readonly("total", &CachedTokens::total)
      .def_readonly("recomputed", &CachedTokens::recomputed)
      .def_property_readonly("by_tier",
                             [](const CachedTokens& self) { return TierCounts(self.by_tier); });
  py::class_<ComputeCost>(module, "ComputeCost")
      .def(py::init<uint32_t, double, double, double>(), py::kw_only(), py::arg("step_tokens") = 0,
           py::arg("step_s") = 0, py::arg("token_s") = 0, py::arg("pair_s") = 0)
      .def_readonly("step_tokens", &ComputeCost::step_tokens)
      .def_readonly("step_s", &ComputeCost::step_s)
      .def_readonly("token_s", &ComputeCost::token_s)
      .def_readonly("pair_s", &ComputeCost::pair_s);
  py::class_<TraceEvent>(module, "TraceEvent")
      .def_readonly("time_ns", &TraceEvent::time_ns)
      .def_property_readonly(
          "kind",
          [](const TraceEvent& self) { return kTraceNames[static_cast<size_t>(self.kind)]; })
      .def_readonly("sequence", &TraceEvent::sequence)
      .def_readonly("first_layer", &TraceEvent::first_layer)
      .def_readonly("num_layers", &TraceEvent::num_layers)
      .def_readonly("slot", &TraceEvent::slot)
      .def_property_readonly(
          "tier", [](const TraceEvent& self) { return kTierNames[static_cast<int>(self.tier)]; })
      .def_readonly("block", &TraceEvent::block)
      .def_readonly("num_tokens", &TraceEvent::num_tokens);
  py::class_<Chain, std::shared_ptr<Chain>>(module, "Chain")
      .def_property_readonly("num_tokens", &Chain::num_tokens)
      .def("append", [](Chain& self, const py::object& tokens) { self.Append(ToTokens(tokens)); })
      .def("tokens", [](const Chain& self) { return ToArray(self.tokens()); })
      .def("context_tokens", &ContextTokens, py::arg("num_tokens"));
}

void BindSequence(py::module_& module) {
  using Self = PySequence;
  py::class_<Self, std::shared_ptr<Self>>(module, "Sequence")
      .def_property_readonly("id", [](Self& self) { return self.get().id(); })
      .def_property_readonly("cached", [](Self& self) { return self.get().cached(); })
      .def_property_readonly("stall_s", [](Self& self) { return ToDict(self.get().stalls()); })
      .def_property_readonly("num_computed_tokens",
                             [](Self& self) { return self.get().num_computed_tokens(); })
      .def_property_readonly("context_len", [](Self& self) { return self.get().context_len(); })
      .def_property_readonly("room", [](Self& self) { return self.get().room(); })
      .def_property_readonly("loading", [](Self& self) { return self.get().loading(); })
      .def_property_readonly("load_left_s", [](Self& self) { return self.get().load_left_s(); })
      .def("block_table", [](Self& self) { return ToArray(self.get().block_table()); })
      .def("reserve",
           [](Self& self, uint32_t num_tokens) {
             if (num_tokens > self.get().room()) {
               throw py::value_error("num_tokens is " + std::to_string(num_tokens) +
                                     " but the window has room for " +
                                     std::to_string(self.get().room()));
             }
             const Status status = self.get().Reserve(num_tokens);
             if (status.code() == Code::kExhausted) return false;
             RaiseIfError(status);
             return true;
           })
      .def("wait_layer",
           [](Self& self, uint32_t layer) {
             Sequence& sequence = self.get();
             self.CheckLayer(layer);
             py::gil_scoped_release release;
             return sequence.WaitLayer(layer).ok();
           })
      .def("layer_done",
           [](Self& self, uint32_t layer, uint32_t num_tokens) {
             self.CheckLayer(layer);
             self.get().LayerDone(layer, num_tokens);
           })
      .def("append",
           [](Self& self, const py::object& tokens) {
             const std::vector<TokenId> ids = ToTokens(tokens);
             self.CheckAppend(ids);
             self.get().Append(ids);
           })
      .def("truncate",
           [](Self& self) {
             if (self.get().room() != 0) throw py::value_error("the window is not full");
             self.get().Truncate();
           })
      .def(
          "commit",
          [](Self& self, const std::string& finish_reason) {
            self.get().Commit(ParseFinish(finish_reason));
            self.sequence.reset();
          },
          py::arg("finish_reason") = "")
      .def("close", [](Self& self) { self.sequence.reset(); });
}

void BindHints(py::class_<PyStore, std::shared_ptr<PyStore>>* store) {
  store->def(
      "advise",
      [](PyStore& self, const std::string& tenant, const std::string& conversation,
         const std::string& advice, double seconds) {
        self.get().Advise(tenant, ConversationName(conversation), ParseAdvice(advice),
                          static_cast<int64_t>(seconds * 1e9));
      },
      py::arg("tenant"), py::arg("conversation"), py::arg("advice"), py::arg("seconds"));
}

}  // namespace

void BindStore(py::module_& module) {
  BindValues(module);
  BindSequence(module);
  py::class_<PyStore, std::shared_ptr<PyStore>> store(module, "AttentionStore");
  BindHints(&store);
  store
      .def(py::init(&OpenStore), py::kw_only(), py::arg("num_layers"), py::arg("num_kv_heads"),
           py::arg("head_dim"), py::arg("block_size"), py::arg("dtype"), py::arg("identity"),
           py::arg("model_name"), py::arg("cuda_device"), py::arg("device_bytes"),
           py::arg("dram_bytes"), py::arg("ssd_bytes"), py::arg("tenant_quota_bytes"),
           py::arg("path"), py::arg("master_key_file"), py::arg("policy"), py::arg("dram_reserve"),
           py::arg("io"), py::arg("io_depth"), py::arg("io_deadline_us"), py::arg("ssd_read_limit"),
           py::arg("poison"), py::arg("progress") = py::none())
      .def_property_readonly("handle",
                             [](PyStore& self) {
                               self.get();
                               return self.handle;
                             })
      .def_property_readonly("io_report", [](PyStore& self) { return self.get().io_report(); })
      .def("close", &PyStore::Close)
      .def("new_chain", &NewChain, py::arg("tokens"), py::arg("tenant"), py::arg("window"),
           py::arg("ratio"), py::arg("keep_first"), py::arg("conversation") = "")
      .def("set_queue",
           [](PyStore& self, const std::vector<std::shared_ptr<Chain>>& waiting) {
             self.get().SetQueue(waiting);
           })
      .def("lookup", [](PyStore& self, const Chain& chain) { return self.get().Lookup(chain); })
      .def("begin", &Begin, py::arg("chain"), py::arg("max_history") = UINT32_MAX,
           py::arg("cost") = ComputeCost())
      .def("use_stream",
           [](PyStore& self, uintptr_t stream) {
             self.get().UseStream(reinterpret_cast<void*>(stream));
           })
      .def("poll", [](PyStore& self) { self.get().Poll(); })
      .def("drain",
           [](PyStore& self) {
             AttentionStore& store = self.get();
             py::gil_scoped_release release;
             return store.Drain();
           })
      .def(
          "erase_tenant",
          [](PyStore& self, const std::string& tenant) {
            auto erased = self.get().EraseTenant(tenant);
            RaiseIfError(erased.status());
            return erased.value();
          },
          py::arg("tenant"))
      .def("flush",
           [](PyStore& self) {
             AttentionStore& store = self.get();
             py::gil_scoped_release release;
             store.Flush();
           })
      .def("drop_tier",
           [](PyStore& self, const std::string& tier) { self.get().DropTier(ParseTier(tier)); })
      .def("stats", &Stats)
      .def("tenant_usage",
           [](PyStore& self, const std::string& tenant) {
             return TierCounts(self.get().TenantUsage(tenant));
           })
      .def("enable_trace", [](PyStore& self, bool on) { self.get().EnableTrace(on); })
      .def("take_trace", [](PyStore& self) { return self.get().TakeTrace(); })
      .def("check_invariants", [](PyStore& self) { self.get().CheckInvariants(); });
}

}  // namespace cachedattn
