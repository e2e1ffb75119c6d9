"""Medians of runs taken in turn, so that a slow second of the machine hits all ways alike."""

import statistics
import time
from collections.abc import Callable

import torch

Calls = dict[str, Callable[[int], object]]  # by name; the argument is the number of a KV set

MIN_ROUNDS = 3
TURN_S = 0.02  # a short call is repeated about this long in its turn, over one KV set after another


def medians_on_cpu(calls: Calls, sets: int, seconds: float) -> dict[str, float]:
    """Median seconds of one call of each."""
    repeats, place, times = {}, dict.fromkeys(calls, 0), {name: [] for name in calls}
    for name, call in calls.items():
        start = time.perf_counter()
        call(0)
        repeats[name] = max(1, min(sets, int(TURN_S / (time.perf_counter() - start))))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < MIN_ROUNDS:
        for name, call in calls.items():
            order = [(place[name] + i) % sets for i in range(repeats[name])]
            place[name] = (order[-1] + 1) % sets
            start = time.perf_counter()
            for i in order:
                call(i)
            times[name].append((time.perf_counter() - start) / len(order))
    return {name: statistics.median(taken) for name, taken in times.items()}


def replayable(call: Callable[[int], object], sets: int) -> Callable[[], None]:
    """One call on every KV set, as a CUDA graph where the call can be captured."""

    def all_sets() -> None:
        for i in range(sets):
            call(i)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        all_sets()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_sets()
    except RuntimeError:
        torch.cuda.synchronize()
        return all_sets
    return graph.replay


def medians_on_gpu(calls: Calls, sets: int, seconds: float) -> dict[str, float]:
    """Median seconds of one call of each, by events around a pass over all KV sets."""
    passes = {name: replayable(call, sets) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < MIN_ROUNDS:
        for name, run in passes.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) / 1e3 / sets)
    return {name: statistics.median(taken) for name, taken in times.items()}
