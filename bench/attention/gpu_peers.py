"""The peers on a GPU: torch SDPA by backend, FlashInfer and flash-attn where they are installed."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attention.cases import BLOCK, THETA, Inputs
from attention.peers import (
    Attend,
    UnavailableError,
    Way,
    best_rotate_into,
    causal_bias,
    folded,
    rotating,
    sdpa,
)


def torch_sdpa(inputs: Inputs, backend: SDPBackend, rotates_k: bool) -> Way:
    """One backend, forced. K rotated before, or by a pass that is part of the time."""
    case = inputs.case
    if case.phase == "decode":
        attend: Attend = folded(inputs, None)
    elif case.history == 0:
        attend = lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    elif backend == SDPBackend.FLASH_ATTENTION:  # it takes no other mask than this one
        from torch.nn.attention.bias import causal_lower_right  # takes seconds to import

        bias = causal_lower_right(case.new, case.length)
        attend = lambda q, k, v: sdpa(q, k, v, attn_mask=bias, enable_gqa=True)  # noqa: E731
    else:
        bias = causal_bias(case.new, case.length, inputs.dtype, inputs.device)
        attend = folded(inputs, bias)

    if rotates_k:
        run = rotating(inputs, best_rotate_into(inputs.device))
    else:
        k_rotated = inputs.k_rotated

        def run(i: int) -> tuple[Tensor, Tensor]:
            return inputs.q_rotated, k_rotated[i]

    def call(i: int) -> Tensor:
        with sdpa_kernel(backend):
            return attend(*run(i), inputs.v[i])

    kind = {SDPBackend.FLASH_ATTENTION: "flash", SDPBackend.CUDNN_ATTENTION: "cuDNN"}[backend]
    suffix = "after RoPE" if rotates_k else "K rotated before"
    return Way(f"torch {kind}, {suffix}", call, inputs.to_rows, rotates_k)


def flashinfer(inputs: Inputs, rotates_k: bool, tensor_cores: bool) -> Way:
    """Its paged attention on our blocks. `tensor_cores` picks one of its two decode kernels."""
    try:
        import flashinfer as library
    except ImportError as error:
        raise UnavailableError("not installed") from error
    case, shape = inputs.case, inputs.case.shape
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device="cuda")
    counts = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda")
    last = torch.full_like(counts[1:], (case.length - 1) % BLOCK + 1)
    pages = (counts * inputs.blocks, inputs.block_table.reshape(-1), last)
    sizes = (shape.q_heads, shape.kv_heads, shape.dim, BLOCK)
    options = {
        "pos_encoding_mode": "ROPE_LLAMA" if rotates_k else "NONE",
        "rope_theta": THETA,
        "sm_scale": inputs.scale,
        "q_data_type": inputs.dtype,
        "kv_data_type": inputs.dtype,
    }
    if case.phase == "decode":
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=tensor_cores
        )
        wrapper.plan(*pages, *sizes, **options)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(inputs.cu_q, *pages, *sizes, causal=True, **options)
    q = inputs.to_rows(inputs.q if rotates_k else inputs.q_rotated)
    kv = inputs.kv if rotates_k else inputs.kv_rotated
    how = str(options["pos_encoding_mode"])
    if case.phase == "decode":
        how += ", tensor cores" if tensor_cores else ", CUDA cores"
    return Way(f"FlashInfer {how}", lambda i: wrapper.run(q, kv[i]), lambda out: out, rotates_k)


def flash_attn(inputs: Inputs) -> Way:
    """Version 3 where it is installed, else 2, on contiguous K that was rotated before."""
    try:
        from flash_attn_interface import flash_attn_with_kvcache

        name = "flash-attn 3"
    except ImportError:
        try:
            from flash_attn import flash_attn_with_kvcache

            name = "flash-attn 2"
        except ImportError as error:
            raise UnavailableError("not installed") from error
    q = inputs.q_rotated.transpose(1, 2).contiguous()  # [B, new, Hq, D]
    k, v = (x.transpose(1, 2).contiguous() for x in (inputs.one_k_rotated, inputs.one_v))
    k_sets, v_sets = ([x.clone() for _ in range(inputs.sets)] for x in (k, v))

    def call(i: int) -> Tensor:
        return flash_attn_with_kvcache(
            q,
            k_sets[i],
            v_sets[i],
            cache_seqlens=inputs.kv_lens,
            softmax_scale=inputs.scale,
            causal=True,
        )

    def rows(out: Tensor) -> Tensor:
        return out.reshape(-1, inputs.case.shape.q_heads, inputs.case.shape.dim)

    return Way(f"{name}, K rotated before", call, rows, False, add_rope_pass=True)


def on_gpu(inputs: Inputs) -> dict[str, Callable[[], Way]]:
    """What makes each way of each peer."""
    found: dict[str, Callable[[], Way]] = {"flash-attn": lambda: flash_attn(inputs)}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        for rotates_k in (True, False):
            found[f"torch {backend.name}, {rotates_k}"] = partial(
                torch_sdpa, inputs, backend, rotates_k
            )
    kinds = (True, False) if inputs.case.phase == "decode" else (True,)
    for rotates_k in (True, False):
        for kind in kinds:
            found[f"flashinfer {rotates_k}, {kind}"] = partial(flashinfer, inputs, rotates_k, kind)
    return found
