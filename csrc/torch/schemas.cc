// The ops' schemas. What each does is documented at its wrapper in cachedattn/ops.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(cachedattn, m) {
  m.def("rope_table(Tensor inv_freq, int n, int stride) -> Tensor");
  m.def(
      "rope_apply_(Tensor(a!) x, Tensor positions, Tensor rope_lo, Tensor rope_hi, "
      "bool interleaved=False, bool inverse=False) -> ()");
  m.def("kv_append(Tensor k, Tensor v, Tensor(a!) kv, Tensor slot_mapping) -> ()");
  m.def(
      "attn_plan(Tensor cu_q, Tensor kv_lens, int num_q_heads, int num_kv_heads, int block_size, "
      "int workers) -> Tensor");
  m.def(
      "attn_paged(Tensor q, Tensor kv, Tensor block_table, Tensor kv_lens, Tensor cu_q, "
      "Tensor plan, int max_q_len, Tensor? rope_lo, Tensor? rope_hi, float sm_scale, "
      "bool interleaved=False, int window=0, float softcap=0., Tensor? sinks=None) "
      "-> (Tensor out, Tensor lse)");
  m.def("merge_states(Tensor o, Tensor lse) -> (Tensor, Tensor)");
  m.def("kv_pool_layer(int store, int layer) -> Tensor");
  m.def("cpu_isa() -> str");
}
