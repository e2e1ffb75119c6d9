"""`cachedattn bench timeline`: one turn as a chart of what computed and what moved, and when."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cachedattn.bench import ONE_TOKEN, leave_history, token_ids
from cachedattn.cli_common import find_model, load_engine, run
from cachedattn.cli_replay import load_pyplot
from cachedattn.config import StoreConfig
from cachedattn.engine import Engine
from cachedattn.store import AttentionStore

if TYPE_CHECKING:
    from cachedattn._core import TraceEvent

# By the first word of an event's kind, from the top of the chart.
LANES = {
    "compute": "compute",
    "wait": "layer waits",
    "read": "SSD -> DRAM",
    "load": "DRAM -> device",
    "save": "device -> DRAM",
    "write": "DRAM -> SSD",
}
LOADS = ("read", "load")


@dataclass(frozen=True)
class Span:
    """Something that took time; nanoseconds from the first event on."""

    lane: str  # a key of LANES
    begin_ns: int
    end_ns: int
    first_layer: int
    num_layers: int
    slot: int


def spans_of(trace: Sequence[TraceEvent]) -> list[Span]:
    """The spans of a trace, by their ends. What began before it or did not end is left out."""
    spans: list[Span] = []
    begun: dict[tuple[str, int, int, int], list[int]] = {}
    computing: dict[int, int] = {}  # by sequence: since when
    origin = trace[0].time_ns if trace else 0
    for event in trace:
        lane, _, edge = event.kind.partition("_")
        now = event.time_ns - origin
        key = (lane, event.sequence, event.first_layer, event.slot)
        begin: int | None = None
        if edge == "start":
            begun.setdefault(key, []).append(now)
        elif lane == "compute":
            begin = computing.get(event.sequence)
            computing[event.sequence] = now
        elif edge == "end" and begun.get(key):
            begin = begun[key].pop(0)
        if lane == "wait" and edge == "end":
            computing[event.sequence] = now
        if begin is not None:
            spans.append(Span(lane, begin, now, event.first_layer, event.num_layers, event.slot))
    return spans


def union_of(spans: Sequence[Span]) -> list[tuple[int, int]]:
    """The times at which any of `spans` is, as disjoint intervals in order."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted((span.begin_ns, span.end_ns) for span in spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def overlap_of(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds of loading, of computing, of both at one time; the share of loading that computing
    hid, 1 where nothing was loaded."""
    loads = union_of([span for span in spans if span.lane in LOADS])
    computes = union_of([span for span in spans if span.lane == "compute"])
    both = sum(
        max(0, min(load[1], compute[1]) - max(load[0], compute[0]))
        for load in loads
        for compute in computes
    )
    load_ns, compute_ns = (sum(end - begin for begin, end in part) for part in (loads, computes))
    return {
        "load_s": load_ns / 1e9,
        "compute_s": compute_ns / 1e9,
        "overlap_s": both / 1e9,
        "overlap": both / load_ns if load_ns else 1.0,
    }


def rows_of(spans: Sequence[Span]) -> Iterator[tuple[Span, int]]:
    """Each span and a row of its lane in which it overlaps no other."""
    ends: dict[str, list[int]] = {}
    for span in sorted(spans, key=lambda span: span.begin_ns):
        rows = ends.setdefault(span.lane, [])
        free = (row for row, end in enumerate(rows) if end <= span.begin_ns)
        row = next(free, len(rows))
        rows[row:] = [span.end_ns, *rows[row + 1 :]]
        yield span, row


def chrome_trace(spans: Sequence[Span]) -> dict[str, Any]:
    """As JSON for chrome://tracing and Perfetto: a thread a lane, more where spans overlap."""
    events: list[dict[str, Any]] = []
    threads: dict[tuple[str, int], int] = {}
    for span, row in rows_of(spans):
        thread = threads.setdefault((span.lane, row), 100 * list(LANES).index(span.lane) + row)
        last = span.first_layer + span.num_layers - 1
        layers = f"{span.first_layer}" if span.num_layers == 1 else f"{span.first_layer}-{last}"
        args = {} if span.lane in ("compute", "wait") else {"slot": span.slot}
        times = {"ts": span.begin_ns / 1e3, "dur": (span.end_ns - span.begin_ns) / 1e3}
        name = f"layer {layers}"
        events.append({"ph": "X", "pid": 1, "tid": thread, "name": name, **times, "args": args})
    for (lane, _), thread in threads.items():
        common = {"ph": "M", "pid": 1, "tid": thread}
        events.append({**common, "name": "thread_name", "args": {"name": LANES[lane]}})
        events.append({**common, "name": "thread_sort_index", "args": {"sort_index": thread}})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def draw(spans: Sequence[Span], title: str, path: Path) -> None:
    """A PNG: a bar a span, coloured by its first layer."""
    pyplot = load_pyplot()
    colours = pyplot.get_cmap("viridis")
    num_layers = max(span.first_layer + span.num_layers for span in spans)
    figure, axes = pyplot.subplots(figsize=(12, 0.6 * len(LANES) + 1.2), layout="constrained")
    for place, lane in enumerate(reversed(LANES)):
        own = [span for span in spans if span.lane == lane]
        axes.broken_barh(
            [(span.begin_ns / 1e6, (span.end_ns - span.begin_ns) / 1e6) for span in own],
            (place - 0.4, 0.8),
            facecolors=[colours(span.first_layer / num_layers) for span in own],
            alpha=0.7,  # the moves of a lane overlap
        )
    axes.set_ylim(-0.6, len(LANES) - 0.4)
    axes.set_yticks(range(len(LANES)), list(reversed(LANES.values())))
    axes.set_xlabel("ms; colour: layer, dark first")
    axes.set_title(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def trace_turn(engine: Engine, history: int, new: int) -> list[Span]:
    """The spans of one turn whose history is on the SSD alone."""
    prompt = token_ids(engine, history + new)
    leave_history(engine, prompt[:history], "ssd")
    engine.store.enable_trace()
    reply = run(engine, engine.add_request(prompt, ONE_TOKEN))
    engine.store.drain()
    if reply.num_cached_tokens != history:
        raise RuntimeError(f"{reply.num_cached_tokens} of {history} tokens were found")
    return spans_of(engine.store.take_trace())


def run_timeline(
    history: int,
    new: int,
    device: bool,
    output: Path,
    model: Path | None,
    dtype: str,
    threads: int | None,
) -> int:
    """Plays one cold turn, writes OUTPUT.json and OUTPUT.png, prints what overlapped."""
    load_pyplot()  # else its absence would show at the end
    path = find_model(model)
    window = history + new + 1

    with (
        tempfile.TemporaryDirectory(dir=".", prefix="cachedattn-bench-") as folder,
        load_engine(path, threads, dtype=dtype, max_model_len=window, truncation=None) as baseline,
    ):
        layout = baseline.store.layout
        size = 4 * window * layout.bytes_per_token + (64 << 20)
        pool = size if device else 0
        config = StoreConfig(dram=size, ssd=size, device=pool, path=folder, load="always")
        with AttentionStore(config, layout) as store:
            engine = Engine(
                baseline.model, baseline.tokenizer, store, max_model_len=window, truncation=None
            )
            spans = trace_turn(engine, history, new)
    overlap = overlap_of(spans)
    output.with_suffix(".json").write_text(json.dumps(chrome_trace(spans)))
    title = f"{path.stem}, {history:,} tokens from a cold SSD, {new:,} new"
    draw(spans, title, output.with_suffix(".png"))
    Console().print(
        f"{title}: loading {overlap['load_s']:.4f} s, computing {overlap['compute_s']:.4f} s, "
        f"{overlap['overlap']:.0%} of loading hidden.\n"
        f"{output.with_suffix('.json')} (chrome://tracing, Perfetto), {output.with_suffix('.png')}"
    )
    return 0
