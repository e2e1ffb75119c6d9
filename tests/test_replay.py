"""Traces, their replay and the command: tiny traces, results that can be worked out by hand."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cachedattn import cli
from cachedattn.cost import Prices, cost
from cachedattn.replay import Cell, Hardware, Replayer, Server
from cachedattn.trace import draw_sessions, read_trace

KV = 1000  # bytes of a token
SERVER = Server(slots=1, load=0.0)


def line(s: int, k: int, prompt: int, answer: int, **more: Any) -> dict[str, Any]:
    return {"t": 0, "s": s, "k": k, "p": -1, "in": prompt, "out": answer, "a": 1000, **more}


# Two sessions of two turns, one after the other: 64 tokens, then 32 more.
TWO = [
    line(7, 1, 48, 16, t=0),
    line(9, 1, 48, 16, t=10_000),
    line(7, 2, 80, 16, p=0, c=1, w=19_000, t=20_000),
    line(9, 2, 80, 16, p=1, c=1, w=19_000, t=30_000),
]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return write(tmp_path / "two.jsonl", TWO)


def command(*args: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cachedattn.cli", "replay", *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
    )


def rows(*args: str | Path, stdin: str = "") -> list[dict[str, Any]]:
    answer = command(*args, "--json", stdin=stdin)
    assert answer.returncode == 0, answer.stderr
    return [json.loads(text) for text in answer.stdout.splitlines()]


def test_columns_of_a_trace(two: Path, tmp_path: Path) -> None:
    packed = tmp_path / "two.jsonl.gz"
    packed.write_bytes(gzip.compress(two.read_bytes()))
    trace = read_trace(packed)
    assert trace.columns["shared"].tolist() == [0, 0, 64, 64]
    assert trace.columns["previous"].tolist() == [-1, -1, 0, 1]
    assert trace.columns["session"].tolist() == [0, 1, 0, 1]
    assert trace.columns["think_s"].tolist() == [0, 0, 19, 19]
    assert trace.footprint == 2 * 96 and trace.span_s == 30 and not trace.relative


def test_shared_blocks(tmp_path: Path) -> None:
    lines = [
        line(0, 1, 70, 5, h=[[0, 7]]),
        line(1, 1, 55, 5, h=[[0, 3], [20, 2]], p=0, c=0),  # 3 blocks of 8: 8 divides 55 and 70
        line(0, 2, 72, 5, h=[[0, 7], [30, 2]], p=0, c=1),  # less than its parent's end
    ]
    lines[0]["h"], lines[1]["h"] = [[0, 8]], [[0, 3], [20, 3]]
    assert read_trace(write(tmp_path / "t", lines)).columns["shared"].tolist() == [0, 24, 56]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"in": 0}, "line 2: field 'in' is 0"),
        ({"in": "many"}, "line 2: field 'in' is 'many'"),
        ({"out": None}, "line 2: field 'out' is missing"),
        ({"p": 1}, "line 2: field 'p' is 1"),
        ({"k": 2}, "line 2: field 'k' is 2, but this is turn 1"),
        ({"c": 1}, "line 2: field 'c' is 1, but there is no 'p'"),
        ({"f": "x"}, "line 2: field 'f' is 'x'"),
        ({"h": [[1]]}, "line 2: field 'h'"),
        ({"h": [[1, 5000]]}, "line 2: field 'h' has 5000 ids"),
        ({"w": -1}, "line 2: field 'w' is -1"),
    ],
)
def test_wrong_lines(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    lines = [TWO[0], {**TWO[1], **change}]
    if "w" in change:
        lines = [TWO[0], {**TWO[2], **change}]
    path = write(tmp_path / "bad.jsonl", lines)
    with pytest.raises(ValueError, match=r"bad\.jsonl: ") as error:
        read_trace(path)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "[]\n", "{\n"])
def test_no_trace(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"bad\.jsonl"):
        read_trace(path)


def test_drawn_sessions(tmp_path: Path) -> None:
    lines = [line(0, 1, 48, 16), line(0, 2, 80, 16, p=0, c=1, w=5), line(1, 1, 10, 1)]
    trace = read_trace(write(tmp_path / "relative", lines))
    assert trace.relative
    drawn = draw_sessions(trace, 60, 2, seed=3)
    again, other = draw_sessions(trace, 60, 2, seed=3), draw_sessions(trace, 60, 2, seed=4)
    for name, values in drawn.columns.items():
        assert np.array_equal(values, again.columns[name])
    assert len(other) != len(drawn) or not np.array_equal(
        other.columns["arrival_s"], drawn.columns["arrival_s"]
    )
    sessions = drawn.columns["session"].max() + 1
    assert 80 < sessions < 170 and abs(len(drawn) - 1.5 * sessions) <= 1
    later = np.flatnonzero(drawn.columns["previous"] >= 0)
    assert (drawn.columns["parent"][later] == later - 1).all()
    lines[2]["p"] = 0
    with pytest.raises(ValueError, match="shares a prefix with another"):
        draw_sessions(read_trace(write(tmp_path / "linked", lines)), 60, 2, seed=0)


def test_measures_by_hand(two: Path) -> None:
    trace = read_trace(two)
    replayer = Replayer(trace, SERVER, Hardware(token_bytes=KV), granularity=1)
    six_blocks = 6 * 16 * KV
    row = replayer.play(Cell("lru", 0.0, six_blocks, 0))
    # Of the second turns one finds 2 of its 4 blocks, the other nothing (tests/native).
    assert row["of_ideal"] == 32 / 128
    assert row["per_turn"] == 1 / 4
    assert row["full_prefix"] == 0
    # At best one session stays whole and 2 blocks of the other do.
    assert row["min_of_ideal"] == 96 / 128
    assert row["min_full_prefix"] == 1 / 2
    assert row["turns"] == 4 and row["dram_share"] == 1 and row["bytes_written"] == 0
    assert replayer.play(Cell("lru", 0.0, 100 * six_blocks, 0))["full_prefix"] == 1
    late = Replayer(trace, SERVER, Hardware(token_bytes=KV), granularity=1, warmup=2)
    assert late.play(Cell("lru", 0.0, six_blocks, 0))["turns"] == 2


def test_costs_are_those_of_the_paper() -> None:
    # Its own hours of LLaMA-13B on two GPUs: 16.4 % for storage, 70 % less than without.
    turns, hours = 42_000, 6.6
    found = cost(Prices(gpus=2), 3600 * hours, 3600 * hours, 128 * 10**9, 10 * 10**12, turns)
    assert found["total"] == pytest.approx(sum(found[part] for part in ("gpu", "dram", "ssd")))
    assert found["gpu"] * turns / 1e6 == pytest.approx(2 * 5 * hours)
    assert 1 - found["gpu"] / found["total"] == pytest.approx(0.164, abs=0.002)
    without = cost(Prices(gpus=2), 3600 * 4 * hours, 0, 0, 0, turns)
    assert 1 - found["total"] / without["total"] == pytest.approx(0.70, abs=0.01)


def test_costs_of_a_replay(two: Path) -> None:
    prices = Prices(gpu=3600.0, dram=3600e9, ssd=3600e9, gpus=2)  # a dollar a second, a byte second
    replayer = Replayer(
        read_trace(two), SERVER, Hardware(token_bytes=KV), granularity=1, prices=prices
    )
    whole = replayer.play(Cell("lru", 0.0, 10**6, 0))
    # Four turns at 8,000 tokens and 0.05 s, 16 tokens of answer at 0.03 s. Two of them have 64
    # tokens of history to compute again without a store.
    first, decode = 0.05 + 48 / 8000, 16 * 0.03
    later, again = 0.05 + 16 / 8000, 0.05 + 80 / 8000
    assert whole["cost"]["gpu"] == pytest.approx(2e6 * (first + later + 2 * decode) / 2)
    assert whole["cost_without"]["total"] == pytest.approx(2e6 * (first + again + 2 * decode) / 2)
    schedule = replayer.schedule(0.0)
    held = schedule.completion.max() - schedule.arrival.min()
    assert whole["cost"]["dram"] == pytest.approx(10**6 * held / 4 * 1e6)
    assert whole["cost"]["ssd"] == 0


def test_a_time_to_live(two: Path) -> None:
    replayer = Replayer(read_trace(two), SERVER, Hardware(token_bytes=KV), granularity=1)
    sizes = (6 * 16 * KV, 10**6)  # DRAM has no room for both sessions
    assert replayer.play(Cell("lru+ttl=1000", 0.0, *sizes))["of_ideal"] == 1
    short = replayer.play(Cell("lru+ttl=1", 0.0, *sizes))
    assert short["of_ideal"] < 1  # what is over is not written to the SSD
    for name in ("lru+ttl=0", "lru+ttl=1.5", "lru+ttl=", "lru+ttl=x"):
        with pytest.raises(ValueError, match="no number of seconds"):
            replayer.play(Cell(name, 0.0, *sizes))


def test_command_prints_json(two: Path) -> None:
    args = ("--policy", "lookahead,lru,fifo", "--capacity", "50%,100%", "--load", "0.1,0.5")
    args = (*args, "--slots", "2", "--granularity", "1", "--model", str(KV))
    found = rows(two, *args)
    assert [(row["load"], row["capacity"], row["policy"]) for row in found] == [
        (load, capacity, policy)
        for load in (0.1, 0.5)
        for capacity in (96 * KV, 192 * KV)
        for policy in ("lookahead", "lru", "fifo")
    ]
    fields = {"of_ideal", "per_turn", "full_prefix", "dram_share", "ssd_wait_s", "bytes_written"}
    assert all(fields | {"mean_queue", "min_of_ideal", "ttft_s"} <= row.keys() for row in found)
    assert all(row["of_ideal"] == 1 for row in found if row["capacity"] == 192 * KV)
    assert rows("-", *args, "--jobs", "1", stdin=two.read_text()) == found


def test_command_with_two_tiers(two: Path) -> None:
    sizes = ("--dram", "96kB", "--capacity", "1MB", "--ssd-read", "1MB", "--ssd-write", "1MB")
    (row,) = rows(two, *sizes, "--policy", "lru", "--granularity", "1", "--model", str(KV))
    assert row["of_ideal"] == 1 and 0 < row["dram_share"] < 1
    assert row["ssd_wait_s"] > 0 and 0 < row["bytes_written"] <= 12 * 16 * KV
    assert row["ssd"] == 1_000_000 - 96_000


def test_command_prints_a_table(two: Path, tmp_path: Path) -> None:
    chart = tmp_path / "chart.png"
    answer = command(two, "--granularity", "1", "--model", str(KV), "--plot", chart)
    assert answer.returncode == 2 and "hold no block" in answer.stderr and not chart.exists()
    args = ("--granularity", "1", "--model", str(KV), "--capacity", "50%", "--plot", chart)
    answer = command(two, *args)
    assert answer.returncode == 0, answer.stderr
    assert "lookahead" in answer.stdout and "MIN" in answer.stdout
    assert "Dollars for a million turns" in answer.stdout
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "args,message",
    [
        (["--policy", "belady"], "'belady' is none of lookahead, hazard, lru, fifo"),
        (["--capacity", "x%"], "'x%' is not a percentage"),
        (["--capacity", "2 apples"], "not a size"),
        (["--load", "much"], "is not a list of numbers"),
        (["--load", "0"], "--load: must be above 0"),
        (["--load", "1", "--turns-per-second", "2"], "exclude each other"),
        (["--model", "gpt"], "'gpt' is none of llama-13b"),
        (["--ssd", "1GB"], "--ssd needs --dram"),
        (["--dram", "1GB", "--capacity", "1MB"], "less than"),
        (["--warmup", "4"], "only 4 turns"),
        (["--window", "5"], "window: 5 tokens"),
        (["--ssd-read", "0"], "--ssd-read: must be above 0"),
    ],
)
def test_bad_options(
    two: Path, args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["cachedattn", "replay", str(two), *args])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_trace(tmp_path: Path) -> None:
    answer = command(tmp_path / "none.jsonl")
    assert answer.returncode == 2 and "No such file" in answer.stderr


def test_a_replay_can_be_given_up(two: Path, tmp_path: Path) -> None:
    lines = [line(s, 1, 48, 16, t=s) for s in range(600)]
    trace = read_trace(write(tmp_path / "many.jsonl", lines))
    replayer = Replayer(trace, SERVER, Hardware(token_bytes=KV), granularity=1)

    def stop(_done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replayer.play(Cell("lru", 0.0, 10**6, 0), stop)
