"""The simulator agrees with the live store: random traces through `Engine` and through `replay`.

Both sides wait until nothing is under way before a step computes, so that what is compared does not
hang on the speed of a disk. `hazard` learns from the clock, which the two do not share.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import BLOCK, open_engine, random_ids, save_model

import cachedattn as ca
from cachedattn.replay import Cell, Hardware, Replayer, Server
from cachedattn.trace import FINISH, Trace

LAYERS = 1
TOKEN_BYTES = LAYERS * 2 * 64 * 4  # K and V of a head of 64 in float32
PAYLOAD = BLOCK * TOKEN_BYTES
SLOT = PAYLOAD + 4096  # in DRAM and on SSD a header page comes first
CONVERSATIONS = 12
TICKS = 80


@dataclass(frozen=True)
class Sizes:
    """Blocks by tier."""

    device: int = 40
    dram: int = 64
    ssd: int = 128
    reserve: float = 0.25


@dataclass
class Played:
    """What one side did: hits by request, moves and evictions in order, totals."""

    hits: list[dict[str, int]]
    turns: list[dict[str, list[Any]]]
    evictions: dict[str, int]


@dataclass
class Turn:
    """A request and the tick at which it came; `start` when it ran."""

    conversation: int
    tick: int
    request: ca.Request
    start: int = -1
    tokens: list[int] = field(default_factory=list)  # whose KV is computed
    cached: dict[str, int] = field(default_factory=dict)


def by_turn(events: list[ca._core.TraceEvent]) -> list[dict[str, list[Any]]]:
    """What went along each arrow and out of each tier, from one turn's first step to the next's:
    blocks, by the order in which they were first published, and their tokens.

    Where the disk's order shows, the blocks are sorted: those that load as they are read, and those
    that leave DRAM when they have been written.
    """
    names: dict[int, int] = {0: -1}
    turns: list[dict[str, list[Any]]] = [{}]
    sequence = 0
    for event in events:
        kind = event.kind
        if kind == "compute_end" and event.sequence != sequence:
            sequence = event.sequence
            turns.append({})
        if kind == "publish":
            names.setdefault(event.block, len(names))
        block = (names[event.block], event.num_tokens)
        if kind == "evict":
            kind = f"evict {event.tier}"
            if event.tier == "dram" and block in turns[-1].get("write_start", []):
                kind = "evict written"
        elif kind not in ("publish", "read_start", "write_start", "load_start", "save_start"):
            continue
        if event.first_layer == 0:
            turns[-1].setdefault(kind, []).append(block)
    for turn in turns:
        for kind in ("load_start", "evict written"):
            turn.get(kind, []).sort()
    return turns


def blocks(turns: list[dict[str, list[Any]]], kind: str) -> list[tuple[int, int]]:
    """All of one kind."""
    return [block for turn in turns for block in turn.get(kind, [])]


def settle(engine: ca.Engine) -> None:
    """Lets what is under way, and what follows from it, come to its end."""
    busy = True
    while busy:
        engine.store.poll()
        loading = any(request.sequence.loading for request in engine.scheduler.running)
        busy = engine.store.drain() or engine.store.stats()["reads_in_flight"] or loading


class Live:
    """Conversations through an engine, a turn at each tick."""

    def __init__(self, engine: ca.Engine, seed: int, max_queue: int, max_tokens: int) -> None:
        self.engine = engine
        self.rng = random.Random(seed)
        self.max_queue = max_queue
        self.max_tokens = max_tokens
        self.turns: list[Turn] = []
        self.queue: list[Turn] = []
        self.last: dict[int, Turn] = {}
        forward = engine.model.forward

        def settled_forward(batch: Any) -> Any:
            settle(engine)
            return forward(batch)

        engine.model.forward = settled_forward

    def prompt(self, conversation: int) -> list[int]:
        """The conversation so far, or now and then another's beginning, and new tokens."""
        history: list[int] = []
        if conversation in self.last:
            history = self.last[conversation].request.tokens
        elif self.last and self.rng.random() < 0.5:
            other = self.rng.choice(list(self.last.values())).request.tokens
            history = other[: self.rng.randint(1, len(other))]
        more = self.rng.randint(1, 60)
        return history + random_ids(more, seed=self.rng.randint(0, 1 << 30))

    def arrive(self, tick: int) -> None:
        waiting = {turn.conversation for turn in self.queue}
        idle = [c for c in range(CONVERSATIONS) if c not in waiting]
        for c in self.rng.sample(idle, self.rng.randint(0, min(3, len(idle)))):
            prompt = self.prompt(c)
            answer = self.rng.randint(1, 24)
            if len(self.queue) == self.max_queue or len(prompt) + answer > self.max_tokens:
                continue
            sampling = ca.SamplingParams(max_tokens=answer, ignore_eos=True)
            request = self.engine.add_request(prompt, sampling, conversation=f"c{c}")
            turn = Turn(c, tick, request)
            self.turns.append(turn)
            self.queue.append(turn)

    def play(self) -> Played:
        store = self.engine.store
        store.enable_trace()
        tick = -1
        while self.queue or tick < TICKS:
            tick += 1
            if tick < TICKS:
                self.arrive(tick)
            if not self.queue:
                continue
            turn = self.queue.pop(0)
            turn.start = tick
            while not turn.request.finished:
                self.engine.step()
                settle(self.engine)
            store.check_invariants()
            turn.tokens = turn.request.tokens[:-1]  # nothing has asked for the last one's KV
            turn.cached = turn.request.cached_from
            self.last[turn.conversation] = turn
        stats = store.stats()
        turns = by_turn(store.take_trace())
        assert stats["turns"] >= len(self.turns) and stats["failed_loads"] == 0
        assert stats["ssd_bytes_written"] == SLOT * len(blocks(turns, "write_start"))
        return Played([turn.cached for turn in self.turns], turns, stats["evictions"])


def trace_of(turns: list[Turn]) -> Trace:
    """What a trace of these turns says: who shares how much with whom, and when."""
    rows = []
    last: dict[int, int] = {}
    for i, turn in enumerate(turns):
        prompt = turn.request.prompt_ids
        shares = [common(other.tokens, prompt) for other in turns[:i]]
        parent = int(np.argmax(shares)) if shares and max(shares) else -1
        previous = last.get(turn.conversation, -1)
        last[turn.conversation] = i
        if previous >= 0 and shares[previous] == max(shares):
            parent = previous
        rows.append(
            {
                "parent": parent,
                "shared": shares[parent] if parent >= 0 else 0,
                "prompt": len(prompt),
                "answer": len(turn.tokens) - len(prompt),
                "session": turn.conversation,
                "previous": previous,
                "finish": FINISH["o"],
                "arrival_s": float(turn.tick),
                "think_s": float(turn.tick - turns[previous].start - 1) if previous >= 0 else 0.0,
                "service_s": 1.0,
            }
        )
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return Trace(columns, relative=False, span_s=float(TICKS))


def common(a: list[int], b: list[int]) -> int:
    """How many leading tokens are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def simulate(trace: Trace, sizes: Sizes, policy: str, window: int) -> Played:
    """The same trace through the replay, on hardware that takes no time."""
    hardware = Hardware(
        token_bytes=TOKEN_BYTES,
        device=sizes.device * PAYLOAD,
        ssd_read=1e30,
        ssd_write=1e30,
        ssd_latency_s=0.0,
        ssd_depth=512,
    )
    replayer = Replayer(
        trace, Server(1, 0.0, window=window), hardware, 1, dram_reserve=sizes.reserve
    )
    result = replayer.simulate(
        Cell(policy, 0.0, sizes.dram * PAYLOAD, sizes.ssd * PAYLOAD), events=True
    )
    device, dram, total = (
        result[name].astype(int) for name in ("device_tokens", "dram_tokens", "hit_tokens")
    )
    by_tier = zip(device, dram - device, total - dram, strict=True)
    hits = [dict(zip(("device", "dram", "ssd"), map(int, row), strict=True)) for row in by_tier]
    evictions = {tier: result[f"{tier}_evictions"] for tier in ("device", "dram", "ssd")}
    turns = by_turn(result["events"])
    for kind, counted in (("read_start", "ssd_bytes_read"), ("write_start", "ssd_bytes_written")):
        assert result[counted] == TOKEN_BYTES * sum(n for _, n in blocks(turns, kind))
    return Played(hits, turns, evictions)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), layers=LAYERS, heads=2, kv_heads=1)


@pytest.mark.parametrize("max_queue", [1, 6], ids=["no-queue", "queue"])
@pytest.mark.parametrize("policy", ["lookahead", "lru", "fifo"])
def test_events_agree(model_path: Path, tmp_path: Path, policy: str, max_queue: int) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    sizes = Sizes()
    window = 0
    config = ca.StoreConfig(
        device=sizes.device * PAYLOAD,
        dram=sizes.dram * SLOT,
        ssd=sizes.ssd * SLOT + (2 << 20),
        path=str(tmp_path / "kv"),
        block_size=BLOCK,
        policy=policy,
        dram_reserve=sizes.reserve,
        io="inline",
    )
    with open_engine(model_path, config, max_num_seqs=1, truncation=None) as engine:
        tiers = engine.store.stats()["tiers"]
        sizes = replace(sizes, ssd=tiers["ssd"]["capacity_slots"])
        live = Live(engine, seed, max_queue, 400)
        played = live.play()
    trace = trace_of(live.turns)
    replayed = simulate(trace, sizes, policy, window)
    assert replayed.hits == played.hits
    assert replayed.turns == played.turns
    assert replayed.evictions == played.evictions
