"""`cachedattn bench ttft`: time to first token by where the history comes from."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cachedattn.batch import make_batch
from cachedattn.cli_common import find_model, load_engine, progress_bar, run, tie_of, with_store
from cachedattn.demo import conversation
from cachedattn.engine import Engine
from cachedattn.sampling import SamplingParams

if TYPE_CHECKING:
    from cachedattn._core import TraceEvent

SOURCES = ("recompute", "floor", "dram", "ssd")
ONE_TOKEN = SamplingParams(max_tokens=1)
STALL_SLACK = 1.15  # a cold turn may stall so many times what overlap cannot hide


def token_ids(engine: Engine, count: int) -> list[int]:
    """`count` ids of the recorded conversation's text, from its start and over again."""
    if engine.tokenizer is None:
        raise ValueError("this model has no tokenizer, and the benchmark's text needs one")
    ids = engine.tokenizer.encode("\n\n".join(conversation()["user_turns"]))
    return (ids * (count // len(ids) + 1))[:count]


def read_then_compute(engine: Engine, prompt: list[int], history: int) -> tuple[float, float, int]:
    """Seconds to bring the whole history into the slots, seconds of the new tokens alone after
    it, and the first token: the two that a cold turn overlaps, one after the other."""
    request = engine.add_request(prompt, ONE_TOKEN)
    begin = time.perf_counter()
    work = engine.scheduler.schedule()
    for layer in range(len(engine.store.kv)):
        if request.sequence.loading and not request.sequence.wait_layer(layer):
            raise RuntimeError("floor: the history cannot be read")
    read_s = time.perf_counter() - begin
    if [num_tokens for _, num_tokens in work] != [len(prompt) - history]:
        raise RuntimeError(f"floor: {work[0][1]} tokens left to compute")
    num_heads = engine.model.config.num_heads
    begin = time.perf_counter()
    logits = engine.model.forward(make_batch(work, engine.store, num_heads))
    token = request.sampler(logits[-1])
    compute_s = time.perf_counter() - begin
    engine.abort(request)
    return read_s, compute_s, token


def layer_waits(trace: list[TraceEvent]) -> list[float]:
    """Seconds of every `wait_layer`, in order."""
    waits, begin = [], 0
    for event in trace:
        if event.kind == "wait_start":
            begin = event.time_ns
        elif event.kind == "wait_end":
            waits.append((event.time_ns - begin) / 1e9)
    return waits


def leave_history(engine: Engine, history: list[int], tier: str) -> None:
    """Leaves exactly `history` in the store, its part-filled tail included, and all of it in
    `tier`: 'dram' or 'ssd'. RuntimeError: it does not get there."""
    store = engine.store
    store.flush()  # what the last trial has still to save would replace that tail
    run(engine, engine.add_request(history, ONE_TOKEN))
    store.flush()
    if tier == "ssd":
        store.drop_tier("dram")
        return
    chain = store.new_chain([*history, history[0]])  # one more token: all of `history` is found
    store.set_queue([chain])  # prefetches it
    deadline = time.monotonic() + 30
    while store.lookup(chain).by_tier["dram"] < len(history):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the history does not reach DRAM: {store.lookup(chain).by_tier}")
        time.sleep(0.001)
        store.poll()
    store.set_queue([])


def trial(
    source: str, baseline: Engine, store: Engine, prompt: list[int], history: int
) -> tuple[dict[str, float], int]:
    """Seconds to the first token and of its parts, and the token. RuntimeError: the history came
    from elsewhere, so the figure would be of something else."""
    if source == "recompute":
        reply = run(baseline, baseline.add_request(prompt, ONE_TOKEN))
        return {"ttft_s": reply.ttft_s}, reply.token_ids[0]
    leave_history(store, prompt[:history], "dram" if source == "dram" else "ssd")
    if source == "floor":
        read_s, compute_s, token = read_then_compute(store, prompt, history)
        return {"ttft_s": compute_s, "ssd_read_s": read_s}, token
    store.store.enable_trace(source == "ssd")
    reply = run(store, store.add_request(prompt, ONE_TOKEN))
    if reply.cached_from[source] != history:
        raise RuntimeError(f"{source}: the history of {history} came from {reply.cached_from}")
    times = {"ttft_s": reply.ttft_s}
    if source == "ssd":
        waits = layer_waits(store.store.take_trace()) or [0.0]  # all was there at once
        times |= {"first_layer_wait_s": waits[0], "total_stall_s": sum(waits)}
        store.store.enable_trace(False)
    return times, reply.token_ids[0]


def measure(
    baseline: Engine, store: Engine, history: int, new: int, repeats: int, bar: Progress
) -> tuple[dict[str, list[dict[str, float]]], bool]:
    """Every round's times by source, and whether the first tokens agree, near ties apart."""
    ids = token_ids(baseline, history + new + repeats)
    store.scheduler.max_history = history  # other trials leave the new tokens' blocks behind
    times: dict[str, list[dict[str, float]]] = {source: [] for source in SOURCES}
    agree = True
    task = bar.add_task(f"history {history:,}", total=(repeats + 1) * len(SOURCES))
    for number in range(repeats + 1):
        prompt = ids[:history] + ids[history + number : history + number + new]
        tokens = []
        for source in SOURCES:
            seconds, token = trial(source, baseline, store, prompt, history)
            if number > 0:  # the first round warms up
                times[source].append(seconds)
            tokens.append(token)
            bar.advance(task)
        if len(set(tokens)) > 1:
            engines = {"recompute": baseline, "store": store}
            agree &= tie_of(engines, prompt, sorted(set(tokens)))["near_tie"]
    return times, agree


def overlap_of(ssd: list[dict[str, float]], floor: list[dict[str, float]]) -> dict[str, float]:
    """How well a cold turn hid the disk behind the computation: medians over the rounds."""
    overlap = {
        name: statistics.median(times[name] for times in ssd)
        for name in ("first_layer_wait_s", "total_stall_s")
    }
    overlap["ssd_read_s"] = statistics.median(times["ssd_read_s"] for times in floor)
    overlap["compute_s"] = statistics.median(times["ttft_s"] for times in floor)
    overlap["stall_bound_s"] = STALL_SLACK * max(0.0, overlap["ssd_read_s"] - overlap["compute_s"])
    return overlap


def rows_of(
    history: int, new: int, times: dict[str, list[dict[str, float]]]
) -> list[dict[str, Any]]:
    """One result per source: medians, and medians of the rounds' ratios."""
    ttft = {source: [part["ttft_s"] for part in times[source]] for source in SOURCES}
    rows = []
    for source in SOURCES:
        row: dict[str, Any] = {"history": history, "new": new, "source": source}
        row["ttft_s"] = statistics.median(ttft[source])
        for other in ("recompute", "floor"):
            pairs = zip(ttft[source], ttft[other], strict=True)
            row[f"ratio_to_{other}"] = statistics.median(a / b for a, b in pairs)
        if source == "ssd":
            row |= overlap_of(times["ssd"], times["floor"])
        rows.append(row)
    return rows


def print_tables(rows: list[dict[str, Any]], title: str, io_report: str) -> None:
    """The results for people."""
    table = Table(title=title, caption=f"SSD: {io_report}")
    for name in ("history", "new", "source", "TTFT, s", "/ recompute", "/ floor"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for row in rows:
        table.add_row(
            f"{row['history']:,}",
            str(row["new"]),
            row["source"],
            f"{row['ttft_s']:.4f}",
            f"{row['ratio_to_recompute']:.4f}",
            f"{row['ratio_to_floor']:.3f}",
            end_section=row["source"] == SOURCES[-1],
        )
    Console().print(table)
    caption = f"bound: {STALL_SLACK} x what computing cannot hide of the read"
    table = Table(title="The turn from a cold SSD: seconds that layers waited", caption=caption)
    for name in ("history", "first layer", "all layers", "bound", "SSD read", "compute"):
        table.add_column(name, justify="right")
    names = ("first_layer_wait_s", "total_stall_s", "stall_bound_s", "ssd_read_s", "compute_s")
    for row in rows:
        if row["source"] == "ssd":
            table.add_row(f"{row['history']:,}", *(f"{row[name]:.4f}" for name in names))
    Console().print(table)


def run_ttft(
    lengths: list[int],
    new: int,
    repeats: int,
    model: Path | None,
    dtype: str,
    threads: int | None,
    as_json: bool,
) -> int:
    """Measures and prints; the exit code: 1 if first tokens differ, near ties apart."""
    path = find_model(model)
    window = max(lengths) + new + 1
    options = {"dtype": dtype, "max_model_len": window, "truncation": None}
    baseline = load_engine(path, threads, **options)
    rows, agree = [], True
    # Not the system's folder for temporary files, which may lie in memory.
    with (
        tempfile.TemporaryDirectory(dir=".", prefix="cachedattn-bench-") as folder,
        baseline,
        with_store(baseline, Path(folder) / "store", load="always") as store,
        progress_bar() as bar,
    ):
        io_report = store.store.io_report
        for history in lengths:
            times, same = measure(baseline, store, history, new, repeats, bar)
            agree &= same
            for row in rows_of(history, new, times):
                rows.append(row)
                if as_json:
                    print(json.dumps(row), flush=True)
    if not as_json:
        title = f"Time to first token, {path.stem}, {dtype}, medians of {repeats} rounds"
        print_tables(rows, title, io_report)
    if not agree:
        Console(stderr=True).print("First tokens differ by more than a near tie.")
    return 0 if agree else 1
