// The replay of traces: workload in arrays, results in arrays.
#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <memory>

#include "csrc/python/bindings.h"
#include "csrc/replay/generator.h"
#include "csrc/replay/optimum.h"
#include "csrc/replay/replay.h"

namespace py = pybind11;

namespace cachedattn {
namespace {

template <typename T>
using Column = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <typename T>
py::array_t<T> ToArray(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

// A workload as it is replayed, and its schedule.
struct PyReplay {
  Workload workload;
  std::unique_ptr<TokenTree> tree;
  Schedule schedule;
};

std::unique_ptr<PyReplay> NewReplay(const Column<int32_t>& parent, const Column<uint32_t>& shared,
                                    const Column<uint32_t>& prompt, const Column<uint32_t>& answer,
                                    const Column<uint32_t>& session,
                                    const Column<int32_t>& previous, const Column<uint8_t>& finish,
                                    const Column<double>& arrival_s, const Column<double>& think_s,
                                    const Column<double>& service_s, uint32_t granularity,
                                    uint32_t window, uint32_t slots, double load, double span_s,
                                    double turns_per_second) {
  auto out = std::make_unique<PyReplay>();
  const py::ssize_t n = parent.size();
  for (const py::array& column : {py::array(shared), py::array(prompt), py::array(answer),
                                  py::array(session), py::array(previous), py::array(finish),
                                  py::array(arrival_s), py::array(think_s), py::array(service_s)}) {
    if (column.size() != n) throw py::value_error("the columns are not of one length");
  }
  out->workload.reserve(static_cast<size_t>(n));
  for (py::ssize_t i = 0; i < n; ++i) {
    out->workload.push_back({.parent = parent.data()[i],
                             .shared = shared.data()[i],
                             .prompt = prompt.data()[i],
                             .answer = answer.data()[i],
                             .session = session.data()[i],
                             .previous = previous.data()[i],
                             .finish = static_cast<Finish>(finish.data()[i]),
                             .arrival_s = arrival_s.data()[i],
                             .think_s = think_s.data()[i],
                             .service_s = service_s.data()[i]});
  }
  RaiseIfError(Validate(out->workload));
  if (slots == 0) throw py::value_error("slots must be at least 1");
  if (granularity == 0) throw py::value_error("granularity must be at least 1");
  if (window != 0 && window / granularity < 2 * TokenTree::kBlockSize) {
    throw py::value_error("window: " + std::to_string(window) + " tokens are less than two blocks");
  }
  py::gil_scoped_release release;
  out->tree = std::make_unique<TokenTree>(out->workload, granularity, window);
  out->schedule = MakeSchedule(
      out->workload,
      {.slots = slots, .span_s = span_s, .load = load, .turns_per_second = turns_per_second});
  return out;
}

// A replay's progress, reported by `call`. What that raises ends the replay, and is kept.
template <typename Call>
std::function<bool(const ReplayProgress&)> Reporter(std::exception_ptr* error, Call call) {
  return [error, call](const ReplayProgress& now) {
    const py::gil_scoped_acquire acquire;
    try {
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      call(now);
      return true;
    } catch (...) {
      *error = std::current_exception();
      return false;
    }
  };
}

void AddTotals(const ReplayTotals& totals, py::dict* out) {
  (*out)["ssd_bytes_read"] = totals.ssd_bytes_read;
  (*out)["ssd_bytes_written"] = totals.ssd_bytes_written;
  (*out)["device_evictions"] = totals.device_evictions;
  (*out)["dram_evictions"] = totals.dram_evictions;
  (*out)["ssd_evictions"] = totals.ssd_evictions;
  (*out)["without_history"] = totals.without_history;
  (*out)["not_saved"] = totals.not_saved;
}

py::dict Play(const PyReplay& self, const std::string& policy, uint64_t device_bytes,
              uint64_t dram_bytes, uint64_t ssd_bytes, uint64_t token_bytes, double dram_reserve,
              double ssd_read_bytes_s, double ssd_write_bytes_s, double ssd_latency_s,
              uint32_t ssd_depth, double copy_bytes_s, bool events, const py::object& progress) {
  ReplayOptions options{.policy = policy,
                        .device_bytes = device_bytes,
                        .dram_bytes = dram_bytes,
                        .ssd_bytes = ssd_bytes,
                        .token_bytes = token_bytes,
                        .dram_reserve = dram_reserve,
                        .ssd = {ssd_read_bytes_s, ssd_write_bytes_s, ssd_latency_s, ssd_depth},
                        .copy_bytes_s = copy_bytes_s,
                        .events = events};
  std::exception_ptr error;
  options.progress = Reporter(&error, [&](const ReplayProgress& now) {
    if (!progress.is_none()) progress(now.ended);
  });
  auto played = [&] {
    const py::gil_scoped_release release;
    return Replay(*self.tree, self.schedule, options);
  }();
  if (error) std::rethrow_exception(error);
  RaiseIfError(played.status());
  const ReplayResult& result = played.value();
  py::dict out;
  out["hit_tokens"] = ToArray(result.hit_tokens);
  out["dram_tokens"] = ToArray(result.dram_tokens);
  out["device_tokens"] = ToArray(result.device_tokens);
  out["load_s"] = ToArray(result.load_s);
  AddTotals(result, &out);
  out["events"] = py::cast(result.events);
  return out;
}

py::dict PlayGenerated(const GeneratorOptions& generator, ReplayOptions options,
                       const py::object& progress) {
  RaiseIfError(Validate(generator));
  GeneratedSource source(generator);
  std::exception_ptr error;
  options.progress = Reporter(&error, [&](const ReplayProgress& now) {
    py::dict out;
    out["ended"] = source.found().conversations;
    out["turns"] = now.ended;
    out["live"] = now.sessions;
    out["conversations"] = now.conversations;
    out["blocks"] = now.blocks;
    out["evictions"] = now.evictions;
    if (!progress.is_none()) progress(out);
  });
  auto played = [&] {
    const py::gil_scoped_release release;
    return Replay(&source, options);
  }();
  if (error) std::rethrow_exception(error);
  RaiseIfError(played.status());
  const GeneratedSource::Found& found = source.found();
  py::dict out;
  out["turns"] = found.turns;
  out["later_turns"] = found.later_turns;
  out["prompt_tokens"] = found.prompt_tokens;
  out["ideal_tokens"] = found.ideal_tokens;
  out["hit_tokens"] = found.hit_tokens;
  out["dram_tokens"] = found.dram_tokens;
  out["half"] = found.half;
  out["full"] = found.full;
  out["ssd_wait_s"] = found.ssd_wait_s;
  out["mean_queue"] = source.mean_queue();
  out["span_s"] = source.now_s();
  AddTotals(played.value(), &out);
  return out;
}

}  // namespace

void BindReplay(py::module_& module) {
  module.def("check_policy", [](const std::string& name) {
    PolicyOptions policy;
    SessionHints hints;
    RaiseIfError(SetPolicy(name, &policy, &hints));
  });
  module.def(
      "play_generated",
      [](uint64_t conversations, uint64_t seed, double turns, double prompt, double answer,
         double think_s, uint32_t context, uint32_t slots, double load, uint32_t granularity,
         const std::string& policy, uint64_t dram_bytes, uint64_t ssd_bytes, uint64_t token_bytes,
         double dram_reserve, double ssd_read_bytes_s, double ssd_write_bytes_s,
         double ssd_latency_s, double copy_bytes_s, const py::object& progress) {
        return PlayGenerated({conversations, seed, turns, prompt, answer, think_s, context, slots,
                              load, granularity},
                             {.policy = policy,
                              .dram_bytes = dram_bytes,
                              .ssd_bytes = ssd_bytes,
                              .token_bytes = token_bytes,
                              .dram_reserve = dram_reserve,
                              .ssd = {ssd_read_bytes_s, ssd_write_bytes_s, ssd_latency_s},
                              .copy_bytes_s = copy_bytes_s},
                             progress);
      },
      py::kw_only(), py::arg("conversations"), py::arg("seed"), py::arg("turns"), py::arg("prompt"),
      py::arg("answer"), py::arg("think_s"), py::arg("context"), py::arg("slots"), py::arg("load"),
      py::arg("granularity"), py::arg("policy"), py::arg("dram_bytes"), py::arg("ssd_bytes"),
      py::arg("token_bytes"), py::arg("dram_reserve"), py::arg("ssd_read_bytes_s"),
      py::arg("ssd_write_bytes_s"), py::arg("ssd_latency_s"), py::arg("copy_bytes_s"),
      py::arg("progress") = py::none());
  py::class_<PyReplay>(module, "Replay")
      .def(py::init(&NewReplay), py::kw_only(), py::arg("parent"), py::arg("shared"),
           py::arg("prompt"), py::arg("answer"), py::arg("session"), py::arg("previous"),
           py::arg("finish"), py::arg("arrival_s"), py::arg("think_s"), py::arg("service_s"),
           py::arg("granularity"), py::arg("window"), py::arg("slots"), py::arg("load"),
           py::arg("span_s"), py::arg("turns_per_second"))
      .def_property_readonly("arrival",
                             [](const PyReplay& self) { return ToArray(self.schedule.arrival); })
      .def_property_readonly("start",
                             [](const PyReplay& self) { return ToArray(self.schedule.start); })
      .def_property_readonly("completion",
                             [](const PyReplay& self) { return ToArray(self.schedule.completion); })
      .def_property_readonly("factor", [](const PyReplay& self) { return self.schedule.factor; })
      .def_property_readonly("mean_queue",
                             [](const PyReplay& self) { return self.schedule.mean_queue; })
      .def_property_readonly_static("block_size",
                                    [](const py::object&) { return TokenTree::kBlockSize; })
      .def("ideal",
           [](const PyReplay& self) { return ToArray(IdealTokens(*self.tree, self.schedule)); })
      .def(
          "optimum",
          [](const PyReplay& self, uint64_t capacity) {
            const auto hits = [&] {
              const py::gil_scoped_release release;
              return OptimalTokens(*self.tree, self.schedule, capacity);
            }();
            return ToArray(hits);
          },
          py::arg("capacity"))
      .def("play", &Play, py::kw_only(), py::arg("policy"), py::arg("device_bytes"),
           py::arg("dram_bytes"), py::arg("ssd_bytes"), py::arg("token_bytes"),
           py::arg("dram_reserve"), py::arg("ssd_read_bytes_s"), py::arg("ssd_write_bytes_s"),
           py::arg("ssd_latency_s"), py::arg("ssd_depth"), py::arg("copy_bytes_s"),
           py::arg("events") = false, py::arg("progress") = py::none());
}

}  // namespace cachedattn
