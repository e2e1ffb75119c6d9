// inspect_store and check_store: what lies in a store's file, without a model and without writing.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <new>

#include "csrc/python/bindings.h"
#include "csrc/tier/ssd_tier.h"

namespace py = pybind11;

namespace cachedattn {
namespace {

struct OpenedStore {
  SsdInfo info;
  std::unique_ptr<SsdTier> tier;
  std::vector<ScannedBlock> blocks;
};

OpenedStore OpenForReading(const std::string& directory, const std::string& master_key_file) {
  auto info = ReadSsdInfo(directory);
  RaiseIfError(info.status());
  SsdOptions options;
  options.directory = directory;
  options.layout = info.value().layout;
  options.identity = info.value().identity;
  options.model_name = info.value().model_name;
  options.read_only = true;
  if (!master_key_file.empty()) {
    auto keys = KeyRing::Open(master_key_file);
    RaiseIfError(keys.status());
    options.keys = std::move(keys.value());
  }
  auto tier = SsdTier::Open(options);
  RaiseIfError(tier.status());
  auto blocks = tier.value()->ScanHeaders({});
  RaiseIfError(blocks.status());
  return {info.value(), std::move(tier.value()), std::move(blocks.value())};
}

py::dict InspectStore(const std::string& directory) {
  const OpenedStore store = OpenForReading(directory, "");
  const SsdInfo& info = store.info;
  py::dict out;
  out["model_name"] = info.model_name;
  out["identity"] = info.identity.Hex();
  out["dtype"] = Name(info.layout.dtype);
  out["num_layers"] = info.layout.num_layers;
  out["num_kv_heads"] = info.layout.num_kv_heads;
  out["head_dim"] = info.layout.head_dim;
  out["block_size"] = info.layout.block_size;
  out["block_bytes"] = info.layout.host_slot_bytes();
  out["num_slots"] = info.num_slots;
  out["used_slots"] = store.blocks.size();
  out["used_bytes"] = store.blocks.size() * info.layout.host_slot_bytes();
  out["closed_clean"] = info.clean;
  out["encrypted"] = info.encrypted;
  py::dict counters;
  counters["turns"] = info.counters.turns;
  counters["tokens_requested"] = info.counters.tokens_requested;
  counters["tokens_from_device"] = info.counters.tokens_from_device;
  counters["tokens_from_dram"] = info.counters.tokens_from_dram;
  counters["tokens_from_ssd"] = info.counters.tokens_from_ssd;
  out["counters"] = counters;
  py::list blocks;
  for (const ScannedBlock& block : store.blocks) {
    py::dict entry;
    entry["slot"] = block.slot;
    entry["key"] = block.header.key.Hex();
    entry["parent"] = block.header.parent.Hex();
    entry["num_tokens"] = block.header.num_tokens;
    entry["depth"] = block.header.depth;
    entry["generation"] = block.header.generation;
    blocks.append(entry);
  }
  out["blocks"] = blocks;
  return out;
}

struct AlignedDelete {
  void operator()(std::byte* data) const { ::operator delete[](data, std::align_val_t(kPage)); }
};

// Reads every block whole, one at a time, and returns the slots that fail.
std::vector<SlotId> ReadAll(OpenedStore& store,
                            const std::function<void(uint64_t, uint64_t)>& progress) {
  const KvLayout& layout = store.info.layout;
  const std::unique_ptr<std::byte[], AlignedDelete> buffer(new (std::align_val_t(kPage))
                                                               std::byte[layout.host_slot_bytes()]);
  std::vector<SlotId> corrupt;
  std::vector<SsdCompletion> done;
  for (size_t i = 0; i < store.blocks.size(); ++i) {
    const ScannedBlock& block = store.blocks[i];
    store.tier->StartRead(block.slot, block.header, 0, layout.num_layers, buffer.get(), i);
    done.clear();
    while (done.empty()) store.tier->Poll(&done, 1000000);
    if (!done[0].status.ok()) corrupt.push_back(block.slot);
    if (progress) progress(i + 1, store.blocks.size());
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  }
  return corrupt;
}

py::dict CheckStore(const std::string& directory, bool deep, const std::string& master_key_file,
                    const std::function<void(uint64_t, uint64_t)>& progress) {
  OpenedStore store = OpenForReading(directory, deep ? master_key_file : "");
  if (deep && store.info.encrypted && master_key_file.empty()) {
    throw py::value_error(
        "the store is encrypted: its blocks can be read with its master key only");
  }
  std::vector<SlotId> corrupt;
  for (const SlotDamage& damage : store.tier->damaged()) corrupt.push_back(damage.slot);
  const size_t checked = store.blocks.size() + corrupt.size();
  if (deep) {
    const std::vector<SlotId> unreadable = ReadAll(store, progress);
    corrupt.insert(corrupt.end(), unreadable.begin(), unreadable.end());
  }
  py::dict out;
  out["checked"] = checked;
  out["corrupt"] = corrupt;
  return out;
}

}  // namespace

void BindInspect(py::module_& module) {
  module.def("inspect_store", &InspectStore, py::arg("path"));
  module.def(
      "erase_tenant",
      [](const std::string& path, const std::string& master_key_file, const std::string& tenant) {
        auto erased = EraseTenant(path, master_key_file, tenant);
        RaiseIfError(erased.status());
        return erased.value();
      },
      py::arg("path"), py::arg("master_key_file"), py::arg("tenant"));
  module.def("check_store", &CheckStore, py::arg("path"), py::arg("deep"),
             py::arg("master_key_file") = "",
             py::arg("progress") = std::function<void(uint64_t, uint64_t)>());
}

}  // namespace cachedattn
