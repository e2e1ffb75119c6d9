"""PrefillTimes: what computing takes on this machine, learnt from the engine's own steps."""

from __future__ import annotations

import numpy as np

from cachedattn._core import ComputeCost
from cachedattn.batch import Work
from cachedattn.store import UNKNOWN_COST

KEEP = 0.97  # of a step's weight, when the next one comes
LEAST_STEPS = 4  # the first one is slower than all others
RIDGE = 1e-6  # of one step: where steps are too alike to tell the three parts apart


class PrefillTimes:
    """Fits seconds = step + token * tokens + pair * pairs to the steps that had a prompt's tokens
    in them, the latest first, so that relative errors are least. A pair is a token and one before
    it. Steps that had none are of another kind: they are bound by memory.
    """

    def __init__(self, max_step_tokens: int) -> None:
        self._step_tokens = max_step_tokens
        # A full step without history is (1, 1, 1/2).
        self._unit = np.array([1.0, max_step_tokens, float(max_step_tokens) ** 2])
        self._products = np.zeros((3, 3))
        self._targets = np.zeros(3)
        self._num_steps = 0

    def add(self, work: list[Work], seconds: float) -> None:
        """A step's work, whose tokens are not appended yet, and its time without any waiting."""
        counts = [count for _, count in work]
        if max(counts) == 1 or seconds <= 0:
            return
        pairs = sum(n * (r.sequence.context_len + (n - 1) / 2) for r, n in work)
        row = np.array([1.0, sum(counts), pairs]) / self._unit / seconds
        self._products = KEEP * self._products + np.outer(row, row)
        self._targets = KEEP * self._targets + row
        self._num_steps += 1

    def seconds(self, num_tokens: int, context_len: int) -> float:
        """Of computing that many tokens behind a context; 0 where nothing is known yet."""
        cost = self.cost()
        steps = -(-num_tokens // self._step_tokens)
        pairs = num_tokens * (context_len + num_tokens / 2)
        return cost.step_s * steps + cost.token_s * num_tokens + cost.pair_s * pairs

    def cost(self) -> ComputeCost:
        """The fit, no part of it negative; not known after too few steps."""
        if self._num_steps < LEAST_STEPS:
            return UNKNOWN_COST
        parts = np.arange(3)
        while True:
            products = self._products[np.ix_(parts, parts)]
            ridge = RIDGE * np.trace(products) * np.eye(len(parts))
            fit = np.linalg.solve(products + ridge, self._targets[parts])
            if (fit >= 0).all():
                break
            parts = np.delete(parts, fit.argmin())
        seconds = np.zeros(3)
        seconds[parts] = fit
        step_s, token_s, pair_s = seconds / self._unit
        return ComputeCost(
            step_tokens=self._step_tokens, step_s=step_s, token_s=token_s, pair_s=pair_s
        )
