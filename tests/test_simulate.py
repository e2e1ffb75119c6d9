"""Generated conversations and the command that plays them (what they find: tests/native)."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from cachedattn import cli
from cachedattn.replay import Hardware
from cachedattn.simulate import Shape, granularity_for, simulate

SMALL = ("--granularity", "128", "--dram", "20GB", "--ssd", "100GB", "--model", "10000")


def command(*args: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-m", "cachedattn.cli", "simulate", *args], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_same_seed_same_row() -> None:
    def row(seed: int) -> dict[str, Any]:
        shape = Shape(600, slots=4, seed=seed)
        row = simulate(shape, Hardware(token_bytes=10_000), "hazard", 10**9, 10**9, 64)
        del row["turns_per_s"], row["steps"]  # times of this machine
        return row

    assert row(1) == row(1)
    assert row(1) != row(2)


def test_a_run_is_measured_in_steps() -> None:
    ended = []
    hardware = Hardware(token_bytes=10_000)
    row = simulate(Shape(3000), hardware, "lru", 10**10, 0, 128, progress=ended.append)
    assert ended == sorted(ended) and ended[-1] == 3000
    assert [step["ended"] // 300 for step in row["steps"]] == list(range(1, 11))
    last = row["steps"][-1]
    assert last["turns"] == row["turns"] and last["live"] == 0
    assert last["resident_bytes"] > 0 and all(step["turn_us"] > 0 for step in row["steps"])
    assert 0 < row["of_ideal"] <= 1 and row["dram_share"] == 1 and row["bytes_written"] == 0


def test_granularity_follows_the_lengths() -> None:
    assert granularity_for(Shape(1)) == 4
    assert granularity_for(Shape(1, turns=30, prompt=3000)) > 64


def test_command_prints_json_and_a_table() -> None:
    args = ("500", "--policy", "lookahead,lru", "--turns", "2", "--slots", "2", *SMALL)
    rows = [json.loads(text) for text in command(*args, "--json").splitlines()]
    assert [row["policy"] for row in rows] == ["lookahead", "lru"]
    assert all(row["conversations"] == 500 and row["ssd"] == 100 * 10**9 for row in rows)
    assert rows[0]["turns"] == rows[1]["turns"] and rows[0]["days"] == rows[1]["days"]
    assert f"{rows[0]['turns']:,} turns" in command(*args)


@pytest.mark.parametrize(
    "args,message",
    [
        (["--policy", "belady"], "'belady' is none of lookahead, hazard, lru, fifo"),
        (["--turns", "0.5"], "turns is out of range"),
        (["--context", "100"], "context: must be from"),
        (["--load", "0"], "load is out of range"),
        (["--think", "nan"], "think is out of range"),
        (["--dram", "0"], "bytes hold no block"),
        (["--ssd", "1kB"], "ssd: 1000 bytes hold no block"),
        (["--ssd-write", "0"], "--ssd-write: must be above 0"),
        (["--model", "gpt"], "'gpt' is none of llama-13b"),
    ],
)
def test_bad_options(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(sys, "argv", ["cachedattn", "simulate", "100", *args])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
