"""Replays of traces: the store itself in virtual time, and what could have been found at best.

A `Replayer` plays one trace under several policies, capacities and loads; `measure` says what a
store has found of what there was to find.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from cachedattn import _core
from cachedattn.cost import PAPER_PRICES, Prices, cost
from cachedattn.trace import ANSWER_S, PREFILL_RATE, TURN_S, Trace

KV_BYTES = {  # of one token, bfloat16
    "llama-13b": 819_200,
    "llama-65b": 2_621_440,
    "llama-70b": 327_680,
    "llama-8b": 131_072,
    "falcon-40b": 122_880,
}
HISTORY_BLOCKS = 32  # of a mean prompt: more cost time and change results by less than a point
COLUMNS = ("parent", "shared", "prompt", "answer", "session", "previous", "finish")
TIMES = ("arrival_s", "think_s", "service_s")


@dataclass(frozen=True)
class Server:
    """Server slots, and how much is asked of them: a load, or turns a second when all are busy."""

    slots: int = 24
    load: float = 0.95
    turns_per_second: float = 0.0  # in place of a load
    window: int = 0  # tokens of context, the oldest half goes at overflow; 0: none
    # Of turns that the trace does not time, before all times are scaled to the load.
    prefill_rate: float = PREFILL_RATE  # tokens a second
    decode_rate: float = 1 / ANSWER_S  # tokens a second of one answer


@dataclass(frozen=True)
class Hardware:
    """Modelled devices; bytes and seconds are those of the real model's KV."""

    token_bytes: int = KV_BYTES["llama-13b"]
    device: int = 0  # bytes of KV; 0: room for the running turns, which leave it as they end
    ssd_read: float = 5e9  # bytes a second
    ssd_write: float = 3e9
    ssd_latency_s: float = 100e-6
    ssd_depth: int = 4  # operations that it is given at a time
    copy: float = 0.0  # DRAM <-> device, bytes a second; 0: takes no time


@dataclass(frozen=True)
class Cell:
    """One replay: sizes are bytes of KV."""

    policy: str
    load: float
    dram: int
    ssd: int  # 0: DRAM alone

    @property
    def capacity(self) -> int:
        return self.dram + self.ssd


def granularity_for(trace: Trace) -> int:
    """Tokens that one token of the replayed store stands for: a power of two."""
    mean = float(trace.columns["prompt"].mean()) / (_core.Replay.block_size * HISTORY_BLOCKS)
    return 1 << max(0, round(np.log2(max(mean, 1.0))))


def percentiles(values: np.ndarray) -> dict[str, float]:
    """The 50th, 90th and 99th."""
    points = np.percentile(values, (50, 90, 99)) if len(values) else np.zeros(3)
    return {f"p{p}": float(v) for p, v in zip((50, 90, 99), points, strict=True)}


def share(part: float, whole: float) -> float:
    """Part of a whole, 0 when there is none."""
    return float(part / whole) if whole else 0.0


class Replayer:
    """A trace and its schedules; `play` may run in several threads at once."""

    def __init__(
        self,
        trace: Trace,
        server: Server,
        hardware: Hardware,
        granularity: int = 0,
        dram_reserve: float = 0.1,
        warmup: int = 0,
        prices: Prices = PAPER_PRICES,
    ) -> None:
        self.trace, self.server, self.hardware = trace, server, hardware
        self.granularity = granularity or granularity_for(trace)
        self.dram_reserve = dram_reserve  # with an SSD tier; DRAM alone has no use for it
        self.warmup = warmup  # turns that are not measured
        self.prices = prices
        self.lock = threading.Lock()
        self.schedules: dict[float, Any] = {}
        self.optima: dict[tuple[float, int], np.ndarray] = {}

    def schedule(self, load: float) -> Any:
        """The trace under `load`; 0 where the server has a rate."""
        with self.lock:
            if load not in self.schedules:
                columns = self.trace.columns | {"service_s": self.service_s()}
                self.schedules[load] = _core.Replay(
                    **{name: columns[name] for name in (*COLUMNS, *TIMES)},
                    granularity=self.granularity,
                    window=self.server.window,
                    slots=self.server.slots,
                    load=load,
                    span_s=self.trace.span_s,
                    turns_per_second=0.0 if load else self.server.turns_per_second,
                )
            return self.schedules[load]

    def service_s(self) -> np.ndarray:
        """Seconds of each turn, as the trace says or by the server's rates."""
        columns, server = self.trace.columns, self.server
        new = columns["prompt"] - columns["shared"].astype(np.int64)
        modelled = TURN_S + new / server.prefill_rate + columns["answer"] / server.decode_rate
        return np.where(columns["service_s"] >= 0, columns["service_s"], modelled)

    def optimum(self, load: float, capacity: int) -> np.ndarray:
        """Tokens that each request finds at best in `capacity` bytes."""
        schedule = self.schedule(load)
        key = (load, capacity)
        if key not in self.optima:
            tokens = capacity // (self.hardware.token_bytes * self.granularity)
            self.optima[key] = schedule.optimum(tokens)
        return self.optima[key]

    def simulate(
        self, cell: Cell, progress: Callable[[int], None] | None = None, events: bool = False
    ) -> dict[str, Any]:
        """Plays one cell, turn by turn: as `_core.Replay.play`."""
        hardware = self.hardware
        return self.schedule(cell.load).play(
            policy=cell.policy,
            device_bytes=hardware.device,
            dram_bytes=cell.dram,
            ssd_bytes=cell.ssd,
            token_bytes=hardware.token_bytes,
            dram_reserve=self.dram_reserve if cell.ssd else 0.0,
            ssd_read_bytes_s=hardware.ssd_read,
            ssd_write_bytes_s=hardware.ssd_write,
            ssd_latency_s=hardware.ssd_latency_s,
            ssd_depth=hardware.ssd_depth,
            copy_bytes_s=hardware.copy,
            events=events,
            progress=progress,
        )

    def play(self, cell: Cell, progress: Callable[[int], None] | None = None) -> dict[str, Any]:
        """Plays one cell: its parameters and what was measured."""
        schedule = self.schedule(cell.load)
        result = self.simulate(cell, progress)
        best = self.found(schedule, self.optimum(cell.load, cell.capacity))
        return {
            "policy": cell.policy,
            "capacity": cell.capacity,
            "dram": cell.dram,
            "ssd": cell.ssd,
            "load": cell.load,
            "mean_queue": schedule.mean_queue,
            **self.found(schedule, result["hit_tokens"]),
            **{f"min_{name}": best[name] for name in ("of_ideal", "per_turn", "full_prefix")},
            **self.times(schedule, result),
            **self.costs(schedule, result, cell),
            "bytes_read": result["ssd_bytes_read"],
            "bytes_written": result["ssd_bytes_written"],
            "bytes_written_per_prompt_token": share(
                result["ssd_bytes_written"], self.trace.columns["prompt"].sum()
            ),
            "dram_evictions": result["dram_evictions"],
            "ssd_evictions": result["ssd_evictions"],
            "without_history": result["without_history"],
            "not_saved": result["not_saved"],
        }

    def measured(self, schedule: Any) -> np.ndarray:
        """Which turns count, as a mask: those that arrive after the warm-up."""
        mask = np.ones(len(self.trace), dtype=bool)
        mask[np.argsort(schedule.arrival, kind="stable")[: self.warmup]] = False
        return mask

    def found(self, schedule: Any, hits: np.ndarray) -> dict[str, float]:
        """Shares of what there was to find that `hits`, tokens by request, are."""
        mask = self.measured(schedule)
        ideal, hits = schedule.ideal()[mask], hits[mask]
        # A block that is shared in part cannot be found, so a history counts as whole without it.
        whole = hits + _core.Replay.block_size > ideal
        later = (self.trace.columns["previous"][mask] >= 0) & (ideal > 0)
        return {
            "turns": int(mask.sum()),
            "of_ideal": share(hits.sum(), ideal.sum()),
            "per_turn": share(((ideal > 0) & (2 * hits >= ideal)).sum(), mask.sum()),
            "full_prefix": share((later & whole).sum(), later.sum()),
            "ideal_of_prompt": share(
                ideal.sum() * self.granularity, self.trace.columns["prompt"][mask].sum()
            ),
        }

    def times(self, schedule: Any, result: dict[str, Any]) -> dict[str, Any]:
        """Where hits lay when their turns began, and what they and computing the rest took."""
        mask = self.measured(schedule)
        hits, dram = result["hit_tokens"][mask], result["dram_tokens"][mask]
        load = result["load_s"][mask]
        prefill = self.prefill_s(schedule, result["hit_tokens"])[mask]
        # Layers are computed while later ones are loaded: what is longer hides the other.
        first_token = np.maximum(prefill, load)
        waited = (schedule.start - schedule.arrival)[mask]
        return {
            "dram_share": share(dram.sum(), hits.sum()),
            "ssd_wait_s": float(load[hits > dram].sum()),
            "stall_s": float((first_token - prefill).sum()),
            "ttft_s": percentiles(first_token),
            "ttft_with_queue_s": percentiles(first_token + waited),
        }

    def prefill_s(self, schedule: Any, hits: np.ndarray) -> np.ndarray:
        """Seconds of each turn until its first token, when `hits` tokens of it were found."""
        columns = self.trace.columns
        own = columns["prompt"] - columns["shared"].astype(np.int64)
        missing = schedule.ideal().astype(np.int64) - hits
        new = np.maximum(own + missing * self.granularity, 1)
        return schedule.factor * (TURN_S + new / self.server.prefill_rate)

    def costs(self, schedule: Any, result: dict[str, Any], cell: Cell) -> dict[str, Any]:
        """Dollars for a million turns, with the store and with every history computed again.

        A prefill has the GPUs to itself, decoding shares them among the slots, and while one turn
        waits for its history the others go on. The tiers are paid for from the first arrival to
        the last completion."""
        mask = self.measured(schedule)
        turns = int(mask.sum())
        answer_s = self.trace.columns["answer"] / self.server.decode_rate
        decode = schedule.factor * answer_s / self.server.slots
        seconds = (schedule.completion.max() - schedule.arrival.min()) * mask.mean()
        hits = result["hit_tokens"]
        busy = float((self.prefill_s(schedule, hits) + decode)[mask].sum())
        alone = float((self.prefill_s(schedule, np.zeros_like(hits)) + decode)[mask].sum())
        return {
            "cost": cost(self.prices, busy, seconds, cell.dram, cell.ssd, turns),
            "cost_without": cost(self.prices, alone, seconds, 0, 0, turns),
        }


def play_all(
    replayer: Replayer, cells: list[Cell], jobs: int, progress: Callable[[int], None]
) -> Iterator[dict[str, Any]]:
    """Plays `cells` in `jobs` threads, outside of Python; yields results in the order of the cells.

    `progress` is called with the number of turns that were played since its last call.
    """
    stop = threading.Event()

    def play(cell: Cell) -> dict[str, Any]:
        last = 0

        def report(done: int) -> None:
            nonlocal last
            if stop.is_set():
                raise KeyboardInterrupt
            progress(done - last)
            last = done

        return replayer.play(cell, report)

    with ThreadPoolExecutor(jobs) as pool:
        futures: list[Future[dict[str, Any]]] = [pool.submit(play, cell) for cell in cells]
        try:
            for future in futures:
                while not future.done():  # in steps, so that Ctrl-C is heard
                    wait([future], timeout=0.2, return_when=FIRST_COMPLETED)
                yield future.result()
        finally:
            stop.set()
            for future in futures:
                future.cancel()
