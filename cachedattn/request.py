"""A request: one turn on its way through the engine; and its reply."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from cachedattn.config import Truncation
from cachedattn.sampling import Sampler, SamplingParams

if TYPE_CHECKING:
    from cachedattn._core import Chain, Sequence
    from cachedattn.tokenizer import TextStream

# Sees the logits [rows, vocab] of every row computed for a request, with the index in the
# request's tokens of the first row's input token.
LogitsHook = Callable[["Request", int, torch.Tensor], None]


# What a turn waits for: 'ssd' and 'copy', its history from the disk and from DRAM to the device, as
# far as computing does not hide that; 'queue', its turn to be computed, while others are; 'slots',
# room in the pool when it is next.
STALL_CAUSES = ("ssd", "copy", "queue", "slots")


class RequestState(enum.Enum):
    """Waiting for a place, holding a sequence, or over."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True)
class Reply:
    """What came of a request."""

    text: str  # '' without a tokenizer
    token_ids: list[int]  # generated, the ending token included
    finish_reason: str  # 'stop', 'length', 'abort'
    num_prompt_tokens: int
    num_cached_tokens: int  # history that was not recomputed, dropped tokens included
    cached_from: dict[str, int]  # context tokens by tier: 'device', 'dram', 'ssd'
    stall_s: dict[str, float]  # seconds of waiting, by cause: STALL_CAUSES
    ttft_s: float  # from the request's arrival to its first token
    duration_s: float  # from the request's arrival to its end


@dataclass(frozen=True)
class Delta:
    """A generated token and the text that became certain with it (may be '')."""

    token_id: int
    text: str


@dataclass(eq=False)
class Request:
    """One turn. `tokens` are the prompt and what was generated; the KV of the first
    `sequence.num_computed_tokens` of them is in the sequence's slots."""

    id: int
    prompt_ids: list[int]
    sampling: SamplingParams
    eos_token_ids: frozenset[int]
    window: int  # tokens at which the context is cut; 0: never
    truncation: Truncation
    max_model_len: int  # positions
    arrival_s: float = field(default_factory=time.perf_counter)
    conversation: str | None = None
    tenant: str = ""
    text_stream: TextStream | None = None
    on_logits: LogitsHook | None = None

    state: RequestState = RequestState.WAITING
    chain: Chain | None = None
    sequence: Sequence | None = None
    output_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    num_cached_tokens: int = 0
    cached_from: dict[str, int] = field(default_factory=dict)
    stall_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STALL_CAUSES, 0.0))
    started: bool = False  # a step has computed for it since it has its sequence
    no_room_since_s: float = 0.0  # it is next, and the pool has no slots for it; 0: not so
    first_token_s: float = 0.0
    end_s: float = 0.0

    def __post_init__(self) -> None:
        self.waiting_since_s = self.arrival_s
        self.tokens = list(self.prompt_ids)
        self.sampler = Sampler(self.sampling)
        self._deltas: list[Delta] = []

    @property
    def num_remaining(self) -> int:
        """Tokens known but not computed; the last of them gives the next token."""
        assert self.sequence is not None
        return len(self.tokens) - self.sequence.num_computed_tokens

    @property
    def finished(self) -> bool:
        """Whether `reply()` may be called."""
        return self.state is RequestState.FINISHED

    @property
    def is_full(self) -> bool:
        """Whether another token would go past the last position, where no cut makes room."""
        return self.window == 0 and len(self.tokens) >= self.max_model_len

    def note_room(self) -> None:
        """It has a sequence."""
        if self.no_room_since_s:
            no_room_s = time.perf_counter() - self.no_room_since_s
            self.stall_s["slots"] += no_room_s
            self.waiting_since_s += no_room_s
            self.no_room_since_s = 0.0

    def note_start(self) -> None:
        """A step computes for it, the first since it has a sequence."""
        self.started = True
        self.stall_s["queue"] += time.perf_counter() - self.waiting_since_s

    def note_stop(self) -> None:
        """It lets go of its sequence, and waits again or is over."""
        assert self.sequence is not None
        self.started = False
        for cause, seconds in self.sequence.stall_s.items():
            self.stall_s[cause] += seconds
        self.waiting_since_s = time.perf_counter()

    def accept(self, token: int) -> None:
        """Takes a newly chosen token; sets `finish_reason` when it is the last."""
        if not self.output_ids:
            self.first_token_s = time.perf_counter()
        self.output_ids.append(token)
        self.tokens.append(token)
        is_end = token in self.sampling.stop_token_ids
        is_end |= not self.sampling.ignore_eos and token in self.eos_token_ids
        text = ""
        if self.text_stream is not None:
            if not is_end:
                text = self.text_stream.push(token)
            is_end |= self.text_stream.stopped
        if is_end:
            self.finish_reason = "stop"
        elif len(self.output_ids) >= self.sampling.max_tokens or self.is_full:
            self.finish_reason = "length"
        if self.finish_reason and self.text_stream is not None:
            text += self.text_stream.finish()
        self._deltas.append(Delta(token, text))

    def take_deltas(self) -> list[Delta]:
        """The tokens since the last call."""
        taken, self._deltas = self._deltas, []
        return taken

    def end(self, reason: str = "") -> None:
        """The turn is over; the sequence has been committed or closed."""
        self.finish_reason = reason or self.finish_reason
        self.state = RequestState.FINISHED
        self.end_s = time.perf_counter()
        self.sequence = None
        self.chain = None

    def reply(self) -> Reply:
        """REQUIRES: finished."""
        assert self.finished
        started = self.first_token_s or self.end_s
        return Reply(
            text=self.text_stream.text if self.text_stream else "",
            token_ids=list(self.output_ids),
            finish_reason=self.finish_reason,
            num_prompt_tokens=len(self.prompt_ids),
            num_cached_tokens=self.num_cached_tokens,
            cached_from=dict(self.cached_from),
            stall_s=dict(self.stall_s),
            ttft_s=started - self.arrival_s,
            duration_s=self.end_s - self.arrival_s,
        )
