"""Request traces: JSON lines as in `read_trace`, checked and turned into columns."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

FINISH = {"o": 0, "e": 1, "t": 2}  # csrc/policy/policy.h, Finish
# Seconds of a turn that the trace does not time (csrc/replay/schedule.h).
TURN_S, PREFILL_RATE, ANSWER_S = 0.05, 8000.0, 0.03
MAX_TOKENS = 1 << 28
MAX_MS = 10**12

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Trace:
    """Requests by column, in the order of the lines, as `_core.Replay` takes them."""

    columns: Columns
    relative: bool  # arrivals are from the start of the session, not of the trace
    span_s: float  # from the first arrival to the last

    def __len__(self) -> int:
        return len(self.columns["prompt"])

    @property
    def footprint(self) -> int:
        """Tokens that differ: what a store that keeps everything holds."""
        columns = self.columns
        return int((columns["prompt"] + columns["answer"] - columns["shared"]).sum())


def open_trace(path: Path) -> io.TextIOBase:
    """The lines of a file, plain or gzip; '-' is standard input."""
    if str(path) == "-":
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8")
    raw = path.open("rb")
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    return io.TextIOWrapper(gzip.open(raw) if packed else raw, encoding="utf-8")


def integer(
    line: dict[str, Any], field: str, low: int, high: int, default: int | None = None
) -> int:
    """Field of a line. ValueError: it is missing or out of range."""
    value = line.get(field, default)
    if value is None:
        raise ValueError(f"field '{field}' is missing")
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"field '{field}' is {value!r}, must be an integer from {low} to {high}")
    return value


def block_ids(line: dict[str, Any]) -> list[tuple[int, int]]:
    """Runs (first id, count) of `h`."""
    runs = line.get("h", [])
    good = isinstance(runs, list) and all(
        isinstance(run, list)
        and len(run) == 2
        and all(type(value) is int and 0 <= value < 1 << 62 for value in run)
        and run[1] > 0
        for run in runs
    )
    if not good:
        raise ValueError("field 'h' is not a list of [first id, count]")
    return [(first, count) for first, count in runs]


def common_ids(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> int:
    """How many leading ids are equal."""
    common, i, j, skip_a, skip_b = 0, 0, 0, 0, 0
    while i < len(a) and j < len(b) and a[i][0] + skip_a == b[j][0] + skip_b:
        step = min(a[i][1] - skip_a, b[j][1] - skip_b)
        common, skip_a, skip_b = common + step, skip_a + step, skip_b + step
        if skip_a == a[i][1]:
            i, skip_a = i + 1, 0
        if skip_b == b[j][1]:
            j, skip_b = j + 1, 0
    return common


class Reader:
    """Takes the lines of one trace, checks them, and knows what earlier ones said."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.times: list[int] = []  # ms
        self.runs: list[list[tuple[int, int]]] = []
        self.sessions: dict[int, tuple[int, int]] = {}  # number here, last line
        self.block_sizes = {1 << i for i in range(13)}  # those that all `h` so far agree with

    def add(self, line: Any) -> None:
        """ValueError names the field that is wrong."""
        if not isinstance(line, dict):
            raise ValueError("is no JSON object")
        row = {
            "prompt": integer(line, "in", 1, MAX_TOKENS),
            "answer": integer(line, "out", 0, MAX_TOKENS),
            "parent": integer(line, "p", -1, len(self.rows) - 1, -1),
            "finish": self.finish(line),
            "service_s": integer(line, "a", 0, MAX_MS) / 1000 if "a" in line else -1.0,
        }
        time = integer(line, "t", 0, MAX_MS)
        name, turn = integer(line, "s", 0, 1 << 62), integer(line, "k", 1, 1 << 31)
        session, previous = self.sessions.get(name, (len(self.sessions), -1))
        expected = int(self.rows[previous]["turn"]) + 1 if previous >= 0 else 1
        if turn != expected:
            raise ValueError(f"field 'k' is {turn}, but this is turn {expected} of session {name}")
        self.sessions[name] = (session, len(self.rows))
        row |= {"session": session, "turn": turn, "previous": previous, "arrival_s": time / 1000}
        row["think_s"] = self.think(line, time, previous)
        runs = block_ids(line)
        self.check_block_size(runs, int(row["prompt"]))
        row["continues"] = integer(line, "c", 0, 1, 0)
        if row["continues"] and row["parent"] < 0:
            raise ValueError("field 'c' is 1, but there is no 'p' to continue")
        self.rows.append(row)
        self.times.append(time)
        self.runs.append(runs)

    def finish(self, line: dict[str, Any]) -> int:
        """Field `f`."""
        value = line.get("f", "o")
        if value not in FINISH:
            raise ValueError(f"field 'f' is {value!r}, must be one of {', '.join(FINISH)}")
        return FINISH[value]

    def think(self, line: dict[str, Any], time: int, previous: int) -> float:
        """Seconds from the answer before to this request: `w`, or what `t` leaves of the gap."""
        if "w" in line:
            return integer(line, "w", 0, MAX_MS) / 1000
        if previous < 0:
            return 0.0
        before = self.rows[previous]
        service = TURN_S + before["prompt"] / PREFILL_RATE + ANSWER_S * before["answer"]
        return max(0.0, (time - self.times[previous]) / 1000 - service)

    def check_block_size(self, runs: list[tuple[int, int]], prompt: int) -> None:
        """A trace does not say how many tokens an id stands for: what all its lines agree with."""
        count = sum(count for _, count in runs)
        if count:
            fitting = {b for b in self.block_sizes if count in (prompt // b, -(-prompt // b))}
            if not fitting:
                raise ValueError(f"field 'h' has {count} ids, which fits no block size so far")
            self.block_sizes = fitting

    def shared(self, row: dict[str, float], runs: list[tuple[int, int]]) -> int:
        """Tokens that the request shares with its parent."""
        parent = int(row["parent"])
        if parent < 0:
            return 0
        before = self.rows[parent]
        whole = int(before["prompt"] + before["answer"])
        if row["continues"] and row["prompt"] >= whole:
            return whole
        common = common_ids(runs, self.runs[parent]) * min(self.block_sizes)
        return int(min(common, before["prompt"], row["prompt"]))

    def trace(self) -> Trace:
        """All that was added."""
        if not self.rows:
            raise ValueError("holds no requests")
        for row, runs in zip(self.rows, self.runs, strict=True):
            row["shared"] = self.shared(row, runs)
        columns = {name: np.array([row[name] for row in self.rows]) for name in self.rows[0]}
        firsts = columns["arrival_s"][columns["previous"] < 0]
        relative = len(firsts) > 1 and not firsts.any()
        return Trace(columns, relative, (max(self.times) - min(self.times)) / 1000)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty."""
    with open_trace(path) as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield number, text


def read_trace(path: Path) -> Trace:
    """Reads a trace; ValueError names the file, the line and the field that is wrong.

    A line is a JSON object: `t` arrival in ms, `s` session, `k` turn in it from 1, `in` and `out`
    tokens of prompt and answer; `p` the line (from 0) whose prefix the prompt shares, `c` 1 when it
    continues that one to its end, `h` ids of the prompt's blocks as runs [first, count]; `a` and
    `w` server time and think time before the request in ms, `f` how the answer ended (t, e, o).
    """
    reader = Reader()
    number = 0
    try:
        for number, text in numbered_lines(path):  # noqa: B007  (the message needs it)
            reader.add(json.loads(text))
    except (ValueError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: line {number}: {error}") from None
    try:
        return reader.trace()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def draw_sessions(trace: Trace, per_hour: float, hours: float, seed: int) -> Trace:
    """Sessions that begin at random (Poisson), each recorded one before any comes again.

    The trace ends after `hours`: turns that were recorded later in their sessions are left out."""
    random = np.random.default_rng(seed)
    columns = trace.columns
    by_session = np.argsort(columns["session"], kind="stable")
    bounds = np.flatnonzero(np.diff(columns["session"][by_session])) + 1
    recorded = np.split(by_session, bounds)
    begins = np.cumsum(random.exponential(3600 / per_hour, int(2 * per_hour * hours) + 50))
    begins = begins[begins < 3600 * hours]
    if not len(begins):
        raise ValueError("no session begins within the hours: ask for more of them")
    rounds = -(-len(begins) // len(recorded))
    order = np.concatenate([random.permutation(len(recorded)) for _ in range(rounds)])
    parts: dict[str, list[np.ndarray]] = {name: [] for name in columns}
    place = np.zeros(len(trace), dtype=np.int64)  # of a line among the drawn ones
    num_lines = 0
    for number, begin in enumerate(begins):
        lines = recorded[order[number]]
        lines = lines[begin + columns["arrival_s"][lines] <= 3600 * hours]
        place[lines] = num_lines + np.arange(len(lines))
        part = {name: values[lines] for name, values in columns.items()}
        for link in ("parent", "previous"):
            known = part[link] >= 0
            if not np.isin(part[link][known], lines).all():
                raise ValueError("a session shares a prefix with another one, so none can be drawn")
            part[link] = np.where(known, place[part[link]], -1)
        part["session"] = np.full(len(lines), number)
        part["arrival_s"] = part["arrival_s"] + begin
        for name, values in part.items():
            parts[name].append(values)
        num_lines += len(lines)
    drawn = {name: np.concatenate(values) for name, values in parts.items()}
    return replace(trace, columns=drawn, relative=False, span_s=3600 * hours)
