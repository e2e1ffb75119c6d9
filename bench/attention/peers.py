"""The ways to compute a case: ours, torch's, and what holds a way together.

A way is called with the number of a KV set. Torch is given K before RoPE, as we are, and so must
rotate all of it first: it does so into a tensor that it keeps, without allocating. What it does
then is the fastest of several formulations, found in the run itself.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attention.cases import Inputs, rotate
from cachedattn import ops

# Relative L2 distance from our output. The types' rounding alone makes about a fifth of it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 0.02}


@dataclass(frozen=True)
class Way:
    """call(set) is timed. rows(what it returned) is out [Tq, Hq, D], for checking."""

    name: str
    call: Callable[[int], Tensor]
    rows: Callable[[Tensor], Tensor]
    rotates_k: bool  # K comes un-rotated and the time includes rotating it
    how: str = ""
    tolerance: float | None = None  # where TOLERANCE does not fit
    add_rope_pass: bool = False  # to its time, for a second row beside ours that rotates


class UnavailableError(Exception):
    """A peer that is not installed, or cannot do the case; the text says which."""


def ours(inputs: Inputs, rotates_k: bool) -> Way:
    rope = (inputs.rope_lo, inputs.rope_hi) if rotates_k else (None, None)
    rows = inputs.to_rows(inputs.q if rotates_k else inputs.q_rotated)
    kv = inputs.kv if rotates_k else inputs.kv_rotated
    new, scale = inputs.case.new, inputs.scale
    table, lens, cu_q, plan = inputs.block_table, inputs.kv_lens, inputs.cu_q, inputs.plan

    def call(i: int) -> Tensor:
        return ops.attn_paged(rows, kv[i], table, lens, cu_q, plan, new, *rope, scale)[0]

    name = "cachedattn" if rotates_k else "cachedattn, K rotated before"
    return Way(name, call, lambda out: out, rotates_k)


def rotate_into(x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor) -> None:
    """`rotate` in four passes and without temporaries."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    torch.mul(a, cosine, out=out[..., :half]).addcmul_(b, sine, value=-1)
    torch.mul(b, cosine, out=out[..., half:]).addcmul_(a, sine)


@cache
def compiled_rotate() -> Callable[..., None]:
    def run(x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor) -> None:
        out.copy_(rotate(x, cosine, sine))

    return torch.compile(run, dynamic=True)


def compiled_rotate_into(x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor) -> None:
    if x.shape[2] == 1:  # the q of a decode step: no work, and it would be compiled anew
        return rotate_into(x, cosine, sine, out)
    return compiled_rotate()(x.flatten(0, 1), cosine, sine, out.flatten(0, 1))


@cache
def best_rotate_into(device: str) -> Callable[..., None]:
    """The compiled pass where torch.compile works, else the other."""
    x, table = torch.zeros(1, 2, 3, 64, device=device), torch.zeros(3, 32, device=device)
    try:
        compiled_rotate_into(x, table, table, torch.empty_like(x))
    except Exception:  # no compiler, in one of many forms
        return rotate_into
    return compiled_rotate_into


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, Hq, new, D], k, v -> out


def causal_bias(rows: int, length: int, dtype: torch.dtype, device: str) -> Tensor:
    """0 where the causal mask of the last `rows` of `length` tokens lets through, else -inf."""
    hidden = torch.arange(length) > torch.arange(length - rows, length)[:, None]
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).to(device)


def folded(inputs: Inputs, bias: Tensor | None, dtype: torch.dtype | None = None) -> Attend:
    """The heads of a GQA group become query rows over one KV head. bias: [new, L]."""
    shape = inputs.case.shape
    group = shape.q_heads // shape.kv_heads
    rows = (-1, shape.kv_heads, group * inputs.case.new, shape.dim)
    mask = bias if bias is None else bias.repeat(group, 1).to(dtype or inputs.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if dtype is not None:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        return sdpa(q.reshape(rows), k, v, attn_mask=mask).reshape(q.shape)

    return attend


def history_apart(inputs: Inputs) -> Attend:
    """Folded, with no mask over the history, merged with the masked rest by log-sum-exp."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    case, shape = inputs.case, inputs.case.shape
    group = shape.q_heads // shape.kv_heads
    mask = causal_bias(case.new, case.new, inputs.dtype, inputs.device).repeat(group, 1)
    rows = (-1, shape.kv_heads, group * case.new, shape.dim)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past, rest = slice(0, case.history), slice(case.history, None)
        q_rows = q.reshape(rows)
        out, lse = flash(q_rows, k[:, :, past], v[:, :, past])
        out_rest, lse_rest = flash(q_rows, k[:, :, rest], v[:, :, rest], attn_mask=mask)
        share = torch.sigmoid(lse_rest - lse)[..., None].to(out.dtype)
        return torch.lerp(out, out_rest, share).reshape(q.shape)

    return attend


def by_products(inputs: Inputs) -> Attend:
    """Folded decode as two matrix products around a softmax."""
    shape = inputs.case.shape
    rows = (-1, shape.kv_heads, shape.q_heads // shape.kv_heads, shape.dim)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q.reshape(rows) * inputs.scale) @ k.transpose(-1, -2)
        return (torch.softmax(logits, -1, dtype=torch.float32).to(v.dtype) @ v).reshape(q.shape)

    return attend


def formulations(inputs: Inputs) -> dict[str, Attend]:
    """What torch on CPU may do over rotated q and k. The first is the naive one."""
    case = inputs.case
    if case.phase == "decode":
        naive: Attend = lambda q, k, v: sdpa(q, k, v, enable_gqa=True)  # noqa: E731
        return {
            "enable_gqa": naive,
            "folded": folded(inputs, None),
            "products": by_products(inputs),
        }
    bias = causal_bias(case.new, case.length, inputs.dtype, inputs.device)
    ways = {"folded": folded(inputs, bias), "folded, float32": folded(inputs, bias, torch.float32)}
    if case.history:
        naive = lambda q, k, v: sdpa(q, k, v, attn_mask=bias, enable_gqa=True)  # noqa: E731
        return {"enable_gqa": naive, **ways, "history apart": history_apart(inputs)}

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, is_causal=True, enable_gqa=True)

    def causal_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q.float(), k.float(), v.float())

    return {"enable_gqa": causal, **ways, "enable_gqa, float32": causal_float32}


def rotating(inputs: Inputs, into: Callable[..., None]) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Rotates all of a set's K, and q, into tensors that it keeps."""
    past = inputs.case.history
    cosine, sine = inputs.cosine.to(inputs.dtype), inputs.sine.to(inputs.dtype)
    q_cosine, q_sine = cosine[past:].contiguous(), sine[past:].contiguous()
    q_out, k_out = torch.empty_like(inputs.q), torch.empty_like(inputs.k[0])

    def run(i: int) -> tuple[Tensor, Tensor]:
        into(inputs.q, q_cosine, q_sine, q_out)
        into(inputs.k[i], cosine, sine, k_out)
        return q_out, k_out

    return run


def torch_on_cpu(inputs: Inputs) -> dict[str, Callable[[], Way]]:
    """What makes each of torch's ways; 'torch-compiled' is its RoPE by torch.compile."""
    ways = formulations(inputs)

    @cache
    def fastest() -> str:
        seconds = {}
        q, k = rotating(inputs, rotate_into)(0)
        for name, attend in ways.items():
            attend(q, k, inputs.v[0])  # allocates
            end, seconds[name] = time.perf_counter() + 0.3, float("inf")
            while (start := time.perf_counter()) < end:
                attend(q, k, inputs.v[0])
                seconds[name] = min(seconds[name], time.perf_counter() - start)
        return min(seconds, key=seconds.__getitem__)

    def way(name: str, run: Callable[[int], tuple[Tensor, Tensor]], how: str) -> Way:
        attend = ways[how]

        def call(i: int) -> Tensor:
            return attend(*run(i), inputs.v[i])

        return Way(name, call, inputs.to_rows, True, how)

    def plain(i: int) -> tuple[Tensor, Tensor]:
        cosine, sine = inputs.cosine.to(inputs.dtype), inputs.sine.to(inputs.dtype)
        past = inputs.case.history
        q = rotate(inputs.q, cosine[past:], sine[past:])
        return q, rotate(inputs.k[i], cosine, sine)

    return {
        "torch": lambda: way("torch", rotating(inputs, rotate_into), fastest()),
        "torch-compiled": lambda: way(
            "torch-compiled", rotating(inputs, compiled_rotate_into), fastest()
        ),
        "torch-naive": lambda: way("torch-naive", plain, next(iter(ways))),
    }
