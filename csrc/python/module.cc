// The `_core` extension: pybind11 classes over the store. No torch here (design D10).
#include "csrc/python/bindings.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "C++ store of cachedattn; see cachedattn.AttentionStore";
  cachedattn::BindErrors(module);
  cachedattn::BindStore(module);
  cachedattn::BindInspect(module);
  cachedattn::BindReplay(module);
}
