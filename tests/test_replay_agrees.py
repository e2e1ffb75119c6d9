"""The simulator agrees with the live store: random traces through `Engine` and through `replay`
give the same hits, moves and evictions, event for event.

On both sides I/O and copies take no time, so that no decision hangs on the speed of a disk, and
what is under way comes to its end before a step computes. `hazard` is left out: it learns from the
clock, which the two do not share. So is what the engine does on a CPU without a device pool.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tiny_models import BLOCK, open_engine, random_ids, save_model

import cachedattn as ca
from cachedattn.replay import Cell, Hardware, Replayer, Server
from cachedattn.trace import FINISH, Trace

if TYPE_CHECKING:
    from cachedattn._core import TraceEvent

TOKEN_BYTES = 2 * 64 * 4  # K and V of one layer with one head of 64, in float32
PAYLOAD = BLOCK * TOKEN_BYTES
SLOT = PAYLOAD + 4096  # in DRAM and on SSD a header page comes first
TIERS = ("device", "dram", "ssd")
MAX_TOKENS = 400  # of a conversation
CONVERSATIONS, TICKS = 12, 80

Event = tuple[str, str, int, int, int]


@dataclass(frozen=True)
class Setup:
    """What a trace is played on. Sizes are blocks."""

    policy: str
    max_queue: int  # requests that wait or run
    window: int  # tokens of context; 0: none
    device: int = 40
    dram: int = 48
    ssd: int = 64
    reserve: float = 0.25


@dataclass
class Played:
    """What one side did."""

    hits: list[dict[str, int]]  # by request: tokens found in each tier
    events: list[Event]
    evictions: dict[str, int]
    tokens: dict[str, int]  # that went along each arrow


@dataclass
class Turn:
    """A request, the ticks at which it came and ran, and what came of it."""

    conversation: int
    tick: int
    request: ca.Request
    start: int = -1
    tokens: list[int] = field(default_factory=list)  # whose KV was computed


def story(events: list[TraceEvent]) -> list[Event]:
    """Kind, tier, block, its tokens and the sequence: moves, and what appears and goes. A block's
    name is its place in the order in which they were published, since keys differ."""
    names = {0: 0}
    out = []
    for event in events:
        if event.kind in ("wait_start", "wait_end", "compute_end"):
            continue  # the engine computes each token of an answer, the replay each block
        if event.kind == "publish":
            names.setdefault(event.block, len(names))
        tier = event.tier if event.kind == "evict" else ""
        out.append((event.kind, tier, names[event.block], event.num_tokens, event.sequence))
    return out


def tokens_moved(events: list[Event]) -> dict[str, int]:
    """Tokens read, loaded and written."""
    return {
        arrow: sum(event[3] for event in events if event[0] == f"{arrow}_start")
        for arrow in ("read", "load", "write")
    }


class Live:
    """Conversations through an engine, a turn at each tick."""

    def __init__(self, engine: ca.Engine, seed: int, max_queue: int) -> None:
        self.engine = engine
        self.rng = random.Random(seed)
        self.max_queue = max_queue
        self.turns: list[Turn] = []
        self.queue: list[Turn] = []
        self.last: dict[int, Turn] = {}
        self.begun = False  # a turn, of which nothing is computed
        self.forward, engine.model.forward = engine.model.forward, self.settled_forward
        self.drain, engine.store.drain = engine.store.drain, self.settled_drain

    def settle(self) -> None:
        """Lets what is under way, and what follows from it, come to its end."""
        busy = True
        while busy:
            self.engine.store.poll()
            loading = any(request.sequence.loading for request in self.engine.scheduler.running)
            busy = self.drain() or self.engine.store.stats()["reads_in_flight"] or loading

    def settled_forward(self, batch: Any) -> torch.Tensor:
        """As in the replay, time passes between a turn's beginning and its computation."""
        if self.begun:
            self.settle()
        self.begun = False
        return self.forward(batch)

    def settled_drain(self) -> bool:
        """The scheduler waits for room."""
        busy = self.drain()
        self.settle()
        return busy

    def prompt(self, conversation: int) -> list[int]:
        """The conversation so far, or now and then another's beginning; and new tokens."""
        history: list[int] = []
        if conversation in self.last:
            history = self.last[conversation].request.tokens
        elif self.last and self.rng.random() < 0.5:
            other = self.rng.choice(list(self.last.values())).request.tokens
            history = other[: self.rng.randint(1, len(other))]
        while True:
            more = random_ids(self.rng.randint(1, 60), seed=self.rng.randrange(1 << 30))
            prompt = history + more
            if all(common(turn.request.tokens, prompt) < len(prompt) for turn in self.turns):
                return prompt  # a token of it is its own

    def arrive(self, tick: int) -> None:
        """Up to three turns come, of conversations that do not wait for an answer."""
        waiting = {turn.conversation for turn in self.queue}
        idle = [c for c in range(CONVERSATIONS) if c not in waiting]
        for c in self.rng.sample(idle, self.rng.randint(0, min(3, len(idle)))):
            prompt, answer = self.prompt(c), self.rng.randint(1, 24)
            if len(self.queue) == self.max_queue or len(prompt) + answer > MAX_TOKENS:
                continue
            sampling = ca.SamplingParams(max_tokens=answer, ignore_eos=True)
            request = self.engine.add_request(prompt, sampling, conversation=f"c{c}")
            self.queue.append(Turn(c, tick, request))
            self.turns.append(self.queue[-1])

    def play(self) -> Played:
        """The turns come for so many ticks, and all of them run."""
        store = self.engine.store
        store.enable_trace()
        tick = 0
        while tick < TICKS or self.queue:
            if tick < TICKS:
                self.arrive(tick)
            if self.queue:
                self.run(self.queue.pop(0), tick)
                store.check_invariants()
            tick += 1
        stats = store.stats()
        events = story(store.take_trace())
        moved = tokens_moved(events)
        # The file takes whole slots, whatever of them is filled.
        writes = sum(event[0] == "write_start" for event in events)
        reads = sum(event[0] == "read_start" for event in events)
        assert stats["ssd_bytes_written"] == writes * SLOT
        assert stats["ssd_bytes_read"] == reads * SLOT
        hits = [turn.request.cached_from for turn in self.turns]
        return Played(hits, events, stats["evictions"], moved)

    def run(self, turn: Turn, tick: int) -> None:
        """One turn to its end."""
        turn.start = tick
        self.begun = True
        while not turn.request.finished:
            self.engine.step()
            self.settle()
        turn.tokens = turn.request.tokens[:-1]  # no later step has asked for the last one's KV
        self.last[turn.conversation] = turn


def play_live(
    setup: Setup, model_path: Path, directory: Path, seed: int
) -> tuple[Setup, list[Turn], Played]:
    """A random trace through an engine with an emulated device; and the blocks that the SSD tier
    has for the size it was given."""
    config = ca.StoreConfig(
        device=setup.device * PAYLOAD,
        dram=setup.dram * SLOT,
        ssd=setup.ssd * SLOT + (2 << 20),  # the file has an index, too
        path=str(directory / f"kv{seed}"),
        block_size=BLOCK,
        policy=setup.policy,
        dram_reserve=setup.reserve,
        io="inline",
        load="always",  # the replay knows no rates
    )
    cut = ca.Truncation(ratio=0.5, keep_first=0) if setup.window else None
    options = {"max_num_seqs": 1, "max_model_len": setup.window or MAX_TOKENS, "truncation": cut}
    with open_engine(model_path, config, **options) as engine:
        tiers = engine.store.stats()["tiers"]
        setup = replace(setup, **{tier: tiers[tier]["capacity_slots"] for tier in TIERS})
        live = Live(engine, seed, setup.max_queue)
        return setup, live.turns, live.play()


def common(a: list[int], b: list[int]) -> int:
    """How many leading tokens are equal."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def trace_of(turns: list[Turn]) -> Trace:
    """What a trace says of these turns: their lengths, who shares how much with whom, and when."""
    rows: list[dict[str, float]] = []
    last: dict[int, int] = {}
    for i, turn in enumerate(turns):
        prompt = turn.request.prompt_ids
        previous = last.get(turn.conversation, -1)
        shares = {j: common(turns[j].tokens, prompt) for j in range(i)}
        # The turn before it where others share as much.
        parent = max(shares, key=lambda j: (shares[j], j == previous), default=-1)
        last[turn.conversation] = i
        think = turn.tick - turns[previous].start - 1 if previous >= 0 else 0
        rows.append(
            {
                "parent": parent,
                "shared": shares.get(parent, 0),
                "prompt": len(prompt),
                "answer": len(turn.tokens) - len(prompt),
                "session": turn.conversation,
                "previous": previous,
                "finish": FINISH["o"],
                "arrival_s": turn.tick,
                "think_s": think,
                "service_s": 1,
            }
        )
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return Trace(columns, relative=False, span_s=TICKS)


def play_replay(setup: Setup, trace: Trace) -> Played:
    """The trace through the replay."""
    hardware = Hardware(
        token_bytes=TOKEN_BYTES,
        device=setup.device * PAYLOAD,
        ssd_read=1e30,
        ssd_write=1e30,
        ssd_latency_s=0.0,
        ssd_depth=512,
    )
    server = Server(slots=1, load=0.0, window=setup.window)
    replayer = Replayer(trace, server, hardware, granularity=1, dram_reserve=setup.reserve)
    cell = Cell(setup.policy, 0.0, setup.dram * PAYLOAD, setup.ssd * PAYLOAD)
    result = replayer.simulate(cell, events=True)
    device, dram, every = (result[f"{name}_tokens"] for name in ("device", "dram", "hit"))
    found = np.stack([device, dram - device, every - dram], axis=1).tolist()
    events = story(result["events"])
    moved = tokens_moved(events)
    # The modelled disk takes no time and no bytes for places of a block that hold no token.
    assert result["ssd_bytes_read"] == moved["read"] * TOKEN_BYTES
    assert result["ssd_bytes_written"] == moved["write"] * TOKEN_BYTES
    evictions = {tier: result[f"{tier}_evictions"] for tier in TIERS}
    return Played([dict(zip(TIERS, row, strict=True)) for row in found], events, evictions, moved)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), layers=1, heads=2, kv_heads=1)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def seed() -> int:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return seed


SETUPS = [
    Setup(policy, max_queue, window)
    for policy in ("lookahead", "lru", "fifo")
    for max_queue, window in ((1, 0), (8, 0), (8, 160))
]
# DRAM that turns must wait for, and a device that keeps much.
SETUPS.append(Setup("lookahead", 8, 0, device=64, dram=32, reserve=0.1))


@pytest.mark.parametrize("setup", SETUPS, ids=lambda s: f"{s.policy}-{s.max_queue}-{s.window}")
def test_events_agree(model_path: Path, tmp_path: Path, setup: Setup, seed: int) -> None:
    setup, turns, live = play_live(setup, model_path, tmp_path, seed)
    replayed = play_replay(setup, trace_of(turns))
    assert all(live.evictions[tier] > 0 for tier in TIERS)
    assert min(live.tokens.values()) > 0
    assert replayed.hits == live.hits
    assert replayed.events == live.events
    assert replayed.evictions == live.evictions
    assert replayed.tokens == live.tokens


def test_differences_show(model_path: Path, tmp_path: Path, seed: int) -> None:
    """A block or a token more or less, another policy or another queue: other events."""
    setup = Setup("lookahead", 8, 0)
    setup, turns, live = play_live(setup, model_path, tmp_path, seed)
    trace = trace_of(turns)
    assert play_replay(setup, trace).events == live.events
    others = [replace(setup, **{tier: getattr(setup, tier) - 1}) for tier in TIERS]
    others += [replace(setup, policy="lru"), replace(setup, policy="fifo")]
    for other in others:
        assert play_replay(other, trace).events != live.events, other
    # Of the last turn whose tail found room to be saved.
    turn = max(e[4] for e in live.events if e[0] == "publish" and e[3] < BLOCK)
    longer = {**trace.columns, "prompt": trace.columns["prompt"].copy()}
    longer["prompt"][turn - 1] += 1
    assert play_replay(setup, replace(trace, columns=longer)).events != live.events
    alone = {**trace.columns, "arrival_s": 100 * trace.columns["arrival_s"]}
    alone["think_s"] = 100 * trace.columns["think_s"]
    assert play_replay(setup, replace(trace, columns=alone)).events != live.events
