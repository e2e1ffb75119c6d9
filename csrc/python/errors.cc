#include "csrc/python/bindings.h"

namespace py = pybind11;

namespace cachedattn {
namespace {

PyObject* store_error = nullptr;  // owned by the module

}  // namespace

void BindErrors(py::module_& module) {
  store_error = PyErr_NewExceptionWithDoc(
      "cachedattn.StoreError",
      "An operating error of a store. `code` is one of 'mismatch', 'corrupt', 'exhausted', 'io', "
      "'busy', 'closed'.",
      PyExc_RuntimeError, nullptr);
  if (store_error == nullptr) throw py::error_already_set();
  module.attr("StoreError") = py::handle(store_error);
}

void Raise(const Status& status) {
  if (status.code() == Code::kInvalidArgument) throw py::value_error(status.message());
  py::object error = py::handle(store_error)(status.message());
  error.attr("code") = Name(status.code());
  PyErr_SetObject(store_error, error.ptr());
  throw py::error_already_set();
}

std::vector<TokenId> ToTokens(const py::object& tokens) {
  const py::array array = py::array::ensure(tokens);
  if (!array) throw py::type_error("token ids must be a one-dimensional sequence of integers");
  const char kind = array.dtype().kind();
  const bool integers = kind == 'i' || kind == 'u' || array.size() == 0;
  if (array.ndim() != 1 || !integers) {
    throw py::type_error("token ids must be a one-dimensional sequence of integers");
  }
  const auto wide = py::array_t < int64_t, py::array::c_style | py::array::forcecast > (array);
  std::vector<TokenId> out(static_cast<size_t>(wide.size()));
  for (py::ssize_t i = 0; i < wide.size(); ++i) {
    const int64_t token = wide.data()[i];
    if (token < 0 || token > INT32_MAX) {
      throw py::value_error("token id " + std::to_string(token) + " at index " + std::to_string(i) +
                            " is not in [0, 2**31)");
    }
    out[static_cast<size_t>(i)] = static_cast<TokenId>(token);
  }
  return out;
}

}  // namespace cachedattn
