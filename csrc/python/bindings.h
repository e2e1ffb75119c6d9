// Shared by the pybind11 files of `_core`: errors and token arrays.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "csrc/base/status.h"
#include "csrc/base/types.h"

namespace cachedattn {

// Raises ValueError for kInvalidArgument and StoreError (with `.code`) for the rest.
[[noreturn]] void Raise(const Status& status);

inline void RaiseIfError(const Status& status) {
  if (!status.ok()) Raise(status);
}

// A one-dimensional array or sequence of integers that fit int32, as token ids.
std::vector<TokenId> ToTokens(const pybind11::object& tokens);

void BindErrors(pybind11::module_& module);
void BindStore(pybind11::module_& module);
void BindInspect(pybind11::module_& module);
void BindReplay(pybind11::module_& module);

}  // namespace cachedattn
