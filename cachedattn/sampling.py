"""Choosing the next token from a row of logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are chosen and when it ends. ValueError for values out of range.

    temperature 0 is greedy. top_k 0 and top_p 1 switch those filters off. The same seed gives
    the same tokens, whatever else runs.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()  # ends the text, is not part of it
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not _is_int(self.max_tokens) or self.max_tokens < 1:
            raise ValueError(f"max_tokens must be an int of at least 1, not {self.max_tokens!r}")
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be at least 0, not {self.temperature!r}")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p!r}")
        if not _is_int(self.top_k) or self.top_k < 0:
            raise ValueError(f"top_k must be an int of at least 0, not {self.top_k!r}")
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed < 2**63):
            raise ValueError(f"seed must be None or an int in [0, 2**63), not {self.seed!r}")
        object.__setattr__(self, "stop", _as_tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must hold non-empty strings, not {self.stop!r}")
        if not all(_is_int(token) and token >= 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids must hold token ids, not {self.stop_token_ids!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_tuple(value: str | list[str] | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


class Sampler:
    """Chooses one request's tokens; holds its random state."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.generator: torch.Generator | None = None
        if params.temperature > 0:
            self.generator = torch.Generator()
            if params.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(params.seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token, from logits [vocab]."""
        if self.generator is None:
            return int(logits.argmax())
        probs = filtered_probs(logits, self.params)
        return int(torch.multinomial(probs, 1, generator=self.generator))


def choose(rows: Sequence[tuple[Sampler, torch.Tensor]]) -> list[int]:
    """The next token of each sampler, from its logits [vocab]. These lie on one device, which is
    waited for once."""
    if not rows or rows[0][1].is_cpu:
        return [sampler(logits) for sampler, logits in rows]
    logits = torch.stack([logits for _, logits in rows])
    if all(sampler.generator is None for sampler, _ in rows):
        return logits.argmax(-1).tolist()
    return [sampler(row) for (sampler, _), row in zip(rows, logits.cpu(), strict=True)]


def filtered_probs(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities [vocab] (float32) after temperature, then top-k, then top-p.

    top-p keeps the smallest set of the likeliest tokens whose probabilities reach it.
    """
    scaled = logits.float() / params.temperature
    if 0 < params.top_k < scaled.numel():
        floor = scaled.topk(params.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < floor, -math.inf)
    probs = scaled.softmax(-1)
    if params.top_p < 1:
        values, order = probs.sort(descending=True)
        beyond = values.cumsum(0) - values >= params.top_p  # the tokens before reach it already
        probs = probs.index_fill(0, order[beyond], 0.0)
        probs = probs / probs.sum()
    return probs
