// inspect_store and check_store: what lies in a store's file, without a model and without writing.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <set>

#include "csrc/python/bindings.h"
#include "csrc/tier/check_store.h"
#include "csrc/tier/ssd_format.h"

namespace py = pybind11;

namespace cachedattn {
namespace {

using Progress = std::function<void(uint64_t, uint64_t)>;

py::dict InspectStore(const std::string& directory) {
  const auto read = ReadSsdInfo(directory);
  RaiseIfError(read.status());
  const SsdInfo& info = read.value();
  SsdOptions options;
  options.directory = directory;
  options.layout = info.layout;
  options.identity = info.identity;
  options.model_name = info.model_name;
  options.read_only = true;
  const auto tier = SsdTier::Open(options);
  RaiseIfError(tier.status());
  const auto scanned = tier.value()->Scan({});
  RaiseIfError(scanned.status());
  std::set<TenantId> tenants;
  for (const ScannedBlock& block : scanned.value()) tenants.insert(block.header.tenant);

  py::dict out;
  out["format_version"] = kSsdVersion;
  out["model_name"] = info.model_name;
  out["identity"] = info.identity.Hex();
  out["dtype"] = Name(info.layout.dtype);
  out["num_layers"] = info.layout.num_layers;
  out["num_kv_heads"] = info.layout.num_kv_heads;
  out["head_dim"] = info.layout.head_dim;
  out["block_size"] = info.layout.block_size;
  out["block_bytes"] = info.layout.host_slot_bytes();
  out["num_slots"] = info.num_slots;
  out["used_slots"] = scanned.value().size();
  out["used_bytes"] = scanned.value().size() * info.layout.host_slot_bytes();
  out["tenants"] = tenants.size();
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
  for (const ScannedBlock& block : scanned.value()) {
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

py::dict Check(const std::string& directory, bool deep, const std::string& master_key_file,
               const Progress& progress) {
  CheckOptions options;
  options.directory = directory;
  options.deep = deep;
  if (!master_key_file.empty()) {
    auto keys = KeyRing::Open(master_key_file);
    RaiseIfError(keys.status());
    options.keys = std::move(keys.value());
  }
  options.progress = [&](uint64_t done, uint64_t total) {
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (progress) progress(done, total);
  };
  const auto checked = CheckStore(options);
  RaiseIfError(checked.status());
  const CheckReport& report = checked.value();
  py::list damage;
  for (const Damage& found : report.damage) {
    py::dict entry;
    entry["slot"] = found.slot == kNoSlot ? py::object(py::none()) : py::int_(found.slot);
    entry["key"] = found.key ? py::object(py::str(found.key->Hex())) : py::none();
    entry["what"] = found.what;
    damage.append(entry);
  }
  py::dict out;
  out["checked"] = report.num_blocks;
  out["indexed"] = report.indexed;
  out["erased"] = report.num_erased;
  out["damage"] = damage;
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
  module.def("check_store", &Check, py::arg("path"), py::arg("deep"),
             py::arg("master_key_file") = "", py::arg("progress") = Progress());
}

}  // namespace cachedattn
