"""The parts of a decoder layer over rows [tokens, hidden]."""

from __future__ import annotations

import torch
from torch.nn import functional


class Linear:
    """y = x @ weight.T + bias, for weight [out, in].

    bf16 weights on a CPU are kept in oneDNN's blocked form, which halves the time of a
    single-row product; the plain copy is not kept.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight.contiguous()
        self.bias = bias
        self.packed = _can_pack(weight)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] -> [tokens, out]."""
        if self.packed:
            return _packed_linear(x, self.weight, self.bias, "none", [], "")
        return functional.linear(x, self.weight, self.bias)


def _can_pack(weight: torch.Tensor) -> bool:
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


_packed_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


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
