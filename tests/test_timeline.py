"""`cachedattn.timeline`: spans from events, overlap, and the two files."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from chat_model import save_chat_model

from cachedattn import timeline
from cachedattn.timeline import Span, chrome_trace, overlap_of, rows_of, spans_of, union_of


@dataclass
class Event:
    time_ns: int
    kind: str
    sequence: int = 1
    first_layer: int = 0
    num_layers: int = 1
    slot: int = 0


def test_spans_pair_begins_with_their_own_ends() -> None:
    trace = [
        Event(1000, "read_start", slot=1),
        Event(1010, "read_start", slot=2),
        Event(1020, "wait_start"),
        Event(1050, "read_end", slot=2),
        Event(1060, "wait_end"),
        Event(1090, "read_end", slot=1),
        Event(1100, "compute_end"),
        Event(1130, "compute_end", first_layer=1),
        Event(1140, "save_start", slot=3),
        Event(1150, "write_end", slot=9),
    ]
    assert spans_of(trace) == [
        Span("read", 10, 50, 0, 1, 2),
        Span("wait", 20, 60, 0, 1, 0),
        Span("read", 0, 90, 0, 1, 1),
        Span("compute", 60, 100, 0, 1, 0),
        Span("compute", 100, 130, 1, 1, 0),
    ]
    assert spans_of([]) == []


def random_spans(rng: random.Random) -> list[Span]:
    begins = [rng.randrange(200) for _ in range(rng.randrange(1, 30))]
    lanes = rng.choices(["read", "load", "compute", "wait"], k=len(begins))
    return [
        Span(lane, begin, begin + rng.randrange(1, 30), rng.randrange(8), 1, index)
        for index, (lane, begin) in enumerate(zip(lanes, begins, strict=True))
    ]


@pytest.mark.parametrize("seed", range(50))
def test_overlap_is_what_counting_every_nanosecond_says(seed: int) -> None:
    spans = random_spans(random.Random(seed))
    busy = {
        lane: {t for span in spans if span.lane in lanes for t in range(span.begin_ns, span.end_ns)}
        for lane, lanes in (("load", ("read", "load")), ("compute", ("compute",)))
    }
    overlap = overlap_of(spans)
    both = len(busy["load"] & busy["compute"])
    assert overlap["load_s"] == len(busy["load"]) / 1e9
    assert overlap["compute_s"] == len(busy["compute"]) / 1e9
    assert overlap["overlap_s"] == both / 1e9
    assert overlap["overlap"] == (both / len(busy["load"]) if busy["load"] else 1.0)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_overlaps_in_a_row(seed: int) -> None:
    spans = random_spans(random.Random(seed))
    rows: dict[tuple[str, int], list[Span]] = {}
    for span, row in rows_of(spans):
        rows.setdefault((span.lane, row), []).append(span)
    assert sum(map(len, rows.values())) == len(spans)
    for own in rows.values():
        pieces = [(span.begin_ns, span.end_ns) for span in own]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(pieces))
    assert len(union_of(spans)) >= 1
    threads = {event["tid"] for event in chrome_trace(spans)["traceEvents"] if event["ph"] == "X"}
    assert len(threads) == len(rows)


def test_a_cold_turn_on_three_tiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_chat_model(tmp_path / "tiny")
    code = timeline.run_timeline(200, 8, True, tmp_path / "turn", model, "float32", None)
    assert code == 0
    events = json.loads((tmp_path / "turn.json").read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"compute", "SSD -> DRAM", "DRAM -> device"} <= names
    assert (tmp_path / "turn.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny", "turn.json", "turn.png"]
