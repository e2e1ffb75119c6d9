"""vLLM's CPU attention alone: the ops of its extension library, without the engine.

K lies rotated in vLLM's own paged layout, blocks of 128. Its schedule, like our plan, serves every
layer of a step and is not timed.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from attention.cases import Inputs, in_huge_pages
from attention.peers import UnavailableError, Way

BLOCK = 128


@cache
def load(folder: Path) -> None:
    """Loads the library that vLLM itself would take on this machine."""
    name = "_C_AVX2"
    if torch.cpu._is_avx512_supported():
        name = "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"
    path = folder / f"{name}.abi3.so"
    try:
        torch.ops.load_library(path)
        torch.ops._C.cpu_attention_with_kv_cache  # noqa: B018
    except (OSError, AttributeError) as error:
        raise UnavailableError(f"{path}: {error}") from None


def vllm(inputs: Inputs, folder: Path) -> Way:
    load(folder)
    vllm_ops, case, shape = torch.ops._C, inputs.case, inputs.case.shape
    amx = torch.cpu._is_amx_tile_supported() and inputs.dtype == torch.bfloat16
    isa = "amx" if amx else "vec" if shape.dim % 32 == 0 else "vec16"
    blocks = -(-case.length // BLOCK)
    table = torch.randperm(case.batch * blocks, dtype=torch.int32).reshape(case.batch, blocks)
    token = torch.arange(case.length)
    slots = (table.long()[:, token // BLOCK] * BLOCK + token % BLOCK).reshape(-1)

    k_rows, v_rows = (inputs.to_rows(x) for x in (inputs.one_k_rotated, inputs.one_v))
    size = (case.batch * blocks, shape.kv_heads, 2 * BLOCK, shape.dim)
    caches = []
    for _ in range(inputs.sets):
        k, v = in_huge_pages(torch.zeros(size, dtype=inputs.dtype)).chunk(2, dim=2)
        vllm_ops.cpu_attn_reshape_and_cache(k_rows, v_rows, k, v, slots, isa, 1.0, 1.0, "auto")
        caches.append((k, v))
    q = inputs.to_rows(inputs.q_rotated)
    out = torch.empty_like(q)
    lens, cu_q = inputs.kv_lens, inputs.cu_q
    sizes = (case.batch, shape.q_heads, shape.kv_heads, shape.dim)
    schedule = vllm_ops.get_scheduler_metadata(
        *sizes, lens, inputs.dtype, cu_q, True, -1, isa, True, None, "auto"
    )
    last = (True, None, -1, table, 0.0, schedule, None, None, 1.0, 1.0, "auto")

    def call(i: int) -> Tensor:
        vllm_ops.cpu_attention_with_kv_cache(q, *caches[i], out, cu_q, lens, inputs.scale, *last)
        return out

    return Way("vllm", call, lambda x: x, False, f"CPU attention, {isa}", add_rope_pass=True)
