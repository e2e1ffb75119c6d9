"""Rotary frequencies, in float64: how far each pair of a head turns per position."""

from __future__ import annotations

import math

import torch

from cachedattn.config import RopeConfig

LO_ROWS = 256  # positions in the fine table; rows of the coarse one are as far apart


def inverse_frequencies(rope: RopeConfig) -> torch.Tensor:
    """Radians per position of each pair, float64 [rotary_dim / 2]. Scaling as in Transformers'
    rotary embedding utilities; llama3 from the Llama 3.1 release, yarn from arXiv 2309.00071."""
    pairs = torch.arange(rope.rotary_dim // 2, dtype=torch.float64)
    inv_freq = rope.theta ** (-2.0 * pairs / rope.rotary_dim)
    if rope.freq_factors:
        inv_freq = inv_freq / torch.tensor(rope.freq_factors, dtype=torch.float64)
    if rope.scaling == "linear":
        return inv_freq / rope.factor
    if rope.scaling == "llama3":
        keep = _llama3_share(rope, inv_freq)
    elif rope.scaling == "yarn":
        keep = _yarn_share(rope, pairs)
    else:
        return inv_freq
    return inv_freq * (keep + (1.0 - keep) / rope.factor)


def _llama3_share(rope: RopeConfig, inv_freq: torch.Tensor) -> torch.Tensor:
    """How much of the unscaled frequency each pair keeps: all of it when it turns often within
    the original length, none when it turns seldom."""
    turns = rope.original_max_positions * inv_freq / (2.0 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    return ((turns - rope.low_freq_factor) / span).clamp(0.0, 1.0)


def _yarn_share(rope: RopeConfig, pairs: torch.Tensor) -> torch.Tensor:
    """As `_llama3_share`, but linear in the pair's index."""

    def pair_turning(turns: float) -> float:
        length = rope.original_max_positions / (turns * 2.0 * math.pi)
        return rope.rotary_dim * math.log(length) / (2.0 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    ramp = (pairs - low) / max(high - low, 0.001)
    return 1.0 - ramp.clamp(0.0, 1.0)


def yarn_attention_factor(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """What yarn multiplies q and k with."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def rope_tables(rope: RopeConfig, max_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(lo, hi), float32 [n, rotary_dim / 2, 2] of (cos, sin): positions 0..255, and multiples of
    256 up to `max_positions`."""
    inv_freq = inverse_frequencies(rope)
    num_hi = -(-max_positions // LO_ROWS)
    rope_table = torch.ops.cachedattn.rope_table
    return rope_table(inv_freq, LO_ROWS, 1), rope_table(inv_freq, num_hi, LO_ROWS)
