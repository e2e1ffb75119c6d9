// kv_pool_layer: one layer of a store's pool as a tensor, without a copy.
#include <torch/csrc/stable/library.h>

#include "csrc/store/attention_store.h"
#include "csrc/torch/checks.h"

namespace cachedattn {
namespace {

Tensor KvPoolLayerOp(int64_t handle, int64_t layer) {
  const AttentionStore* store = FindStore(handle);
  STD_TORCH_CHECK(store != nullptr, "store: ", handle, " is no open store");
  const KvLayout& layout = store->layout();
  STD_TORCH_CHECK(layer >= 0 && layer < layout.num_layers, "layer: ", layer, " is outside [0, ",
                  layout.num_layers, ")");
  const AttentionStore::PoolView pool = store->pool();
  const int64_t size = SizeOf(layout.dtype), dim = layout.head_dim, block = layout.block_size;
  const int64_t heads = layout.num_kv_heads;
  return torch::stable::from_blob(
      pool.base + layer * pool.layer_stride, {int64_t{pool.num_slots}, 2, heads, block, dim},
      {static_cast<int64_t>(pool.slot_stride) / size, heads * block * dim, block * dim, dim, 1},
      pool.gpu < 0 ? torch::stable::Device(torch::headeronly::DeviceType::CPU)
                   : torch::stable::Device(torch::headeronly::DeviceType::CUDA, pool.gpu),
      ScalarOf(layout.dtype));
}

}  // namespace
}  // namespace cachedattn

STABLE_TORCH_LIBRARY_IMPL(cachedattn, CompositeExplicitAutograd, m) {
  m.impl("kv_pool_layer", TORCH_BOX(&cachedattn::KvPoolLayerOp));
}
