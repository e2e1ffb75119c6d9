"""`cachedattn bench load`: a cold turn loaded, recomputed, or both, on disks of several speeds."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cachedattn.bench import ONE_TOKEN, leave_history, token_ids
from cachedattn.cli_common import find_model, load_engine, progress_bar, run, with_store
from cachedattn.config import parse_size
from cachedattn.engine import Engine

WAYS = ("load", "recompute", "auto")


def trial(way: str, engine: Engine, prompt: list[int], history: int) -> dict[str, float]:
    """Seconds to the first token of `prompt`, whose history is on the SSD alone, and how much of
    it was recomputed. RuntimeError: the way was not gone."""
    scheduler = engine.scheduler
    scheduler.max_history = history
    leave_history(engine, prompt[:history], "ssd")
    scheduler.always_load = way == "load"
    if way == "recompute":
        scheduler.max_history = 0
    request = engine.add_request(prompt, ONE_TOKEN)
    reply = run(engine, request)
    recomputed = history - reply.num_cached_tokens
    if way != "auto" and recomputed != (0 if way == "load" else history):
        raise RuntimeError(f"{way}: {recomputed} of {history} tokens were recomputed")
    return {"ttft_s": reply.ttft_s, "recomputed": recomputed}


def measure(
    engine: Engine, history: int, new: int, repeats: int, bar: Progress
) -> dict[str, list[dict[str, float]]]:
    """Every round's trials by way. The first two rounds are for the rates to be learnt."""
    rounds = repeats + 2
    ids = token_ids(engine, history + new + rounds)
    times: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    task = bar.add_task(f"history {history:,}", total=rounds * len(WAYS))
    for number in range(rounds):
        prompt = ids[:history] + ids[history + number : history + number + new]
        first = number % len(WAYS)  # what runs behind a long computation is a little slower
        for way in WAYS[first:] + WAYS[:first]:
            times[way].append(trial(way, engine, prompt, history))
            bar.advance(task)
    return {way: all_of[2:] for way, all_of in times.items()}


def row_of(times: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians over the rounds, and that of the rounds' ratios to the better of the two."""
    ttft = {way: [part["ttft_s"] for part in times[way]] for way in WAYS}
    row: dict[str, Any] = {f"{way}_s": statistics.median(ttft[way]) for way in WAYS}
    row["recomputed"] = statistics.median(part["recomputed"] for part in times["auto"])
    rounds = zip(*(ttft[way] for way in WAYS), strict=True)
    row["ratio"] = statistics.median(auto / min(load, again) for load, again, auto in rounds)
    return row


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    """The results for people."""
    caption = "auto / best: by the better of load and recompute in the same round"
    table = Table(title=title, caption=caption)
    names = ("disk, MB/s", "history", "load, s", "recompute, s", "auto, s", "recomputed")
    for name in (*names, "auto / best"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['read_limit'] / 1e6:g}" if row["read_limit"] else "no limit",
            f"{row['history']:,}",
            *(f"{row[f'{way}_s']:.3f}" for way in WAYS),
            f"{row['recomputed']:,.0f}",
            f"{row['ratio']:.3f}",
        )
    Console().print(table)


def run_load(
    limits: list[str],
    lengths: list[int],
    new: int,
    repeats: int,
    model: Path | None,
    dtype: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measures and prints."""
    path = find_model(model)
    rates = [parse_size(limit) for limit in limits]
    window = max(lengths) + new + 1
    options = {"dtype": dtype, "max_model_len": window, "truncation": None}
    rows = []
    # Not the system's folder for temporary files, which may lie in memory.
    with (
        tempfile.TemporaryDirectory(dir=".", prefix="cachedattn-bench-") as folder,
        load_engine(path, threads, **options) as baseline,
        progress_bar() as bar,
    ):
        for rate in rates:
            store = Path(folder) / str(rate)
            # The disk gets 16 MiB at a time: a slow one answers the last of it late.
            fields = {"ssd_read_limit": rate, "io_deadline": 600.0}
            for history in lengths:
                with with_store(baseline, store, **fields) as engine:
                    times = measure(engine, history, new, repeats, bar)
                rows.append({"read_limit": rate, "history": history, "new": new, **row_of(times)})
                if as_json:
                    print(json.dumps(rows[-1]), flush=True)
    if not as_json:
        title = f"Time to first token from a cold SSD, {path.stem}, {dtype}, {repeats} rounds"
        print_table(rows, title)
