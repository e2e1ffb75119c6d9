"""The parts of a decoder layer over rows [tokens, hidden]."""

from __future__ import annotations

import functools
import math
import time

import torch
from torch.nn import functional

_PACKED_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_MANY_ROWS = 16  # from here on a product is bound by arithmetic, not by reading the weight


class Linear:
    """y = x @ weight.T + bias, for weight [out, in].

    bf16 weights on a CPU are kept in oneDNN's blocked form, which halves the time of a
    single-row product. `widen` keeps a float32 copy too, for products of many rows where
    `float32_is_faster`; inputs and outputs are rounded alike, so only the order of sums differs.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, widen: bool = False
    ) -> None:
        self.weight = weight.contiguous()
        self.bias = bias
        self.packed = _can_pack(weight)
        self.wide = self.wide_bias = None
        if widen:
            self.wide = weight.float()
            self.wide_bias = None if bias is None else bias.float()
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] -> [tokens, out]."""
        if self.wide is not None and x.shape[0] >= _MANY_ROWS:
            return functional.linear(x.float(), self.wide, self.wide_bias).to(x.dtype)
        if self.packed:
            return _PACKED_LINEAR(x, self.weight, self.bias, "none", [], "")
        return functional.linear(x, self.weight, self.bias)


def _can_pack(weight: torch.Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and _PACKED_LINEAR is not None
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@functools.cache
def float32_is_faster() -> bool:
    """Whether this CPU multiplies in float32 faster than in bf16, conversions included.

    So it is where bf16 dot products run at half rate (server CPUs of Intel without AMX), and not
    where they run at full rate or in tiles. Measured once, in a few milliseconds of one thread's
    own time, which other work on the machine does not disturb.
    """
    weight, x = torch.zeros(1024, 512), torch.zeros(128, 512)
    layers = Linear(weight.bfloat16()), Linear(weight.bfloat16(), widen=True)
    x = x.bfloat16()
    best = [math.inf, math.inf]
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for index in (0, 1) * 4:
            start = time.thread_time()
            layers[index](x)
            best[index] = min(best[index], time.thread_time() - start)
    finally:
        torch.set_num_threads(num_threads)
    return best[1] < best[0]


class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight, computed in float32 from x float32 [tokens, hidden]."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight.float()
        self.dtype = weight.dtype
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] in the weight's dtype."""
        return torch.rms_norm(x, self.weight.shape, self.weight, self.eps).to(self.dtype)


class LmHead:
    """Logits from weight [vocab, hidden].

    bf16 products come out rounded to bf16, which makes the likeliest tokens tie; theirs are
    computed again in float32.
    """

    _NUM_EXACT = 8

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.linear = Linear(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> float32 [rows, vocab]."""
        logits = self.linear(x).float()
        if x.dtype == torch.float32:
            return logits
        top = logits.topk(min(self._NUM_EXACT, logits.shape[1]), sorted=False).indices
        exact = torch.einsum("rnh,rh->rn", self.weight[top].float(), x.float())
        return logits.scatter_(1, top, exact)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, for [tokens, 2 * n] holding gate and up side by side."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)
