"""The tensor ops, `torch.ops.cachedattn.*`, with their meaning, shapes and errors.

Words: Tq query rows in all, B sequences, Hq query heads, H KV heads, D head_dim, P tokens in a
block, r rotary dims. K is stored before RoPE and rotated as it is read: token j of a sequence is
block `block_table[b, j // P]`, place `j % P`, and its position is j. Query row i of sequence b
stands at position `kv_lens[b] - q_len[b] + i` and attends to keys up to its own position.

Two tables hold the angles: `rope_lo = rope_table(inv_freq, 256, 1)` and
`rope_hi = rope_table(inv_freq, ceil(max_positions / 256), 256)`.

All tensors of a call lie on one device, CPU or CUDA; `rope_table` and `attn_plan` work on CPU
tensors, and their result is moved to where it is needed. On CUDA the ops use torch's current
stream, never wait for it, and can be captured in a CUDA graph.

Bad arguments raise RuntimeError naming the argument. Ids, lengths, positions and the plan are
checked on the CPU only: on CUDA reading them would wait for the device, so the caller vouches.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

torch.ops.load_library(Path(__file__).parent / "libcachedattn_torch.so")
_ops = torch.ops.cachedattn


def cpu_isa() -> str:
    """The CPU kernels in use: 'reference', 'avx2', 'avx512' or 'avx512_bf16'.

    The fastest that this machine has, or what CACHEDATTN_CPU_ISA named when this was imported.
    """
    return _ops.cpu_isa.default()


if os.environ.get("CACHEDATTN_CPU_ISA", cpu_isa()) != cpu_isa():
    raise ImportError(
        f"CACHEDATTN_CPU_ISA={os.environ['CACHEDATTN_CPU_ISA']}: unknown, or not on this machine; "
        f"without it, {cpu_isa()} is used"
    )


def has_cuda() -> bool:
    """Whether this build has the CUDA kernels."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("cachedattn::attn_paged", "CUDA")


def rope_table(inv_freq: Tensor, n: int, stride: int) -> Tensor:
    """cos and sin of `i * stride * inv_freq` for i < n, computed in float64.

    inv_freq: float64 [r / 2] on the CPU, scaling (llama3, linear, yarn) already applied.
    Returns float32 [n, r / 2, 2].
    """
    return _ops.rope_table.default(inv_freq, n, stride)


def rope_apply_(
    x: Tensor,
    positions: Tensor,
    rope_lo: Tensor,
    rope_hi: Tensor,
    interleaved: bool = False,
    inverse: bool = False,
) -> None:
    """Rotates x [N, heads, D] in place to `positions` (int32 [N]); dims from r on are untouched.

    Pairs are (i, i + r / 2), or (2i, 2i + 1) when `interleaved`. `inverse` rotates back.
    """
    _ops.rope_apply_.default(x, positions, rope_lo, rope_hi, interleaved, inverse)


def kv_append(k: Tensor, v: Tensor, kv: Tensor, slot_mapping: Tensor) -> None:
    """Writes k, v [N, H, D] (k before RoPE) into kv [slots, 2, H, P, D].

    slot_mapping: int64 [N], `slot * P + place` of each token; -1 skips it.
    """
    _ops.kv_append.default(k, v, kv, slot_mapping)


def attn_plan(
    cu_q: Tensor,
    kv_lens: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    block_size: int,
    workers: int,
) -> Tensor:
    """How one step's attention is split into work items; serves every layer of the step.

    cu_q: int32 [B + 1], first row of each sequence. kv_lens: int32 [B], tokens in the context with
    this step's. Split boundaries depend on a sequence's own lengths only, so its output does not
    depend on its batch mates; `workers` affects the order of the items only. Both are on the CPU,
    where a scheduler has them.
    Returns an opaque int32 vector; `.to("cuda")` for attention there.
    """
    return _ops.attn_plan.default(cu_q, kv_lens, num_q_heads, num_kv_heads, block_size, workers)


def attn_paged(
    q: Tensor,
    kv: Tensor,
    block_table: Tensor,
    kv_lens: Tensor,
    cu_q: Tensor,
    plan: Tensor,
    max_q_len: int,
    rope_lo: Tensor | None,
    rope_hi: Tensor | None,
    sm_scale: float,
    interleaved: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of any mix of prefill, extend and decode rows over paged, un-rotated K.

    q: [Tq, Hq, D] before RoPE, kv's dtype. kv: [slots, 2, H, P, D]. block_table: int32
    [B, max_blocks]. plan: `attn_plan` of the same cu_q and kv_lens. max_q_len: rows of the longest
    sequence, or more. rope_lo, rope_hi: None for no rotation. window: attend to the last `window`
    tokens only; 0 for all. softcap: logits become `softcap * tanh(logit / softcap)`; 0 for none.
    sinks: float32 [Hq], logits that join the denominator once.
    Returns out [Tq, Hq, D] and lse float32 [Tq, Hq] (natural log). Rows that attend to nothing
    give 0 and -inf.
    """
    return _ops.attn_paged.default(
        q,
        kv,
        block_table,
        kv_lens,
        cu_q,
        plan,
        max_q_len,
        rope_lo,
        rope_hi,
        sm_scale,
        interleaved,
        window,
        softcap,
        sinks,
    )


def merge_states(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merges attention over disjoint sets of keys: o [S, N, H, D], lse float32 [S, N, H].

    Returns o [N, H, D] and lse [N, H]. States with lse = -inf are ignored, whatever their o holds.
    """
    return _ops.merge_states.default(o, lse)


def kv_pool_layer(store: int, layer: int) -> Tensor:
    """Layer `layer` of a store's pool as kv [slots, 2, H, P, D]: a view, nothing is copied.

    store: `AttentionStore.handle`. The store must outlive the tensor. Not traceable: call it
    outside of compiled code and pass the tensor in.
    """
    return _ops.kv_pool_layer.default(store, layer)


@torch.library.register_fake("cachedattn::rope_table")
def _(inv_freq: Tensor, n: int, stride: int) -> Tensor:
    return inv_freq.new_empty((n, inv_freq.shape[0], 2), dtype=torch.float32)


@torch.library.register_fake("cachedattn::rope_apply_")
def _(x, positions, rope_lo, rope_hi, interleaved=False, inverse=False) -> None:
    return None


@torch.library.register_fake("cachedattn::kv_append")
def _(k, v, kv, slot_mapping) -> None:
    return None


@torch.library.register_fake("cachedattn::attn_plan")
def _(cu_q: Tensor, kv_lens, num_q_heads, num_kv_heads, block_size, workers) -> Tensor:
    return cu_q.new_empty((torch.library.get_ctx().new_dynamic_size(),))


@torch.library.register_fake("cachedattn::attn_paged")
def _(
    q: Tensor,
    kv,
    block_table,
    kv_lens,
    cu_q,
    plan,
    max_q_len,
    rope_lo,
    rope_hi,
    sm_scale,
    interleaved=False,
    window=0,
    softcap=0.0,
    sinks=None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake("cachedattn::merge_states")
def _(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape[1:]), lse.new_empty(lse.shape[1:])
