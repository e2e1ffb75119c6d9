"""bench/bench_overlap.py and bench_multiturn.py: short runs print figures that agree, with no model
file, and with no package beside torch and numpy."""

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
TINY = ("--shape", "tiny", "--threads", "1", "--json")


@pytest.fixture
def answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., str]]:
    """Runs a program in this process, where torch is there already; returns what it prints."""
    monkeypatch.syspath_prepend(BENCH)
    monkeypatch.chdir(tmp_path)
    for name in ("rich", "cachedattn.cli_common"):
        monkeypatch.setitem(sys.modules, name, None)  # to import it is an error

    def run(program: str, *args: str) -> str:
        monkeypatch.setattr(sys, "argv", [program, *args])
        runpy.run_path(str(BENCH / program), run_name="__main__")
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def overlap(answer: Callable[..., str]) -> str:
    size = ("--history", "256", "--new", "40", "--prompts", "100,200", "--steps", "3")
    return answer("bench_overlap.py", *TINY, *size, "--rounds", "2")


def test_overlap_measures_every_way(overlap: str, answer: Callable[..., str], tmp_path) -> None:
    rows = [json.loads(line) for line in overlap.splitlines()]
    loads = {row["way"]: row for row in rows if row["part"] == "preload"}
    buffers = ["PL-B0", "PL-B5", "PL-B10", "PL-B15"]
    assert list(loads) == ["recompute", "NO-PL", *buffers, "floor"]
    assert all(row["ttft_s"] > 0 for row in loads.values())
    assert loads["NO-PL"]["to_no_preload"] == loads["floor"]["to_floor"] == 1
    # With a buffer as deep as the model nothing is left to wait for, without preload all is.
    floor_s, load_s = loads["floor"]["ttft_s"], loads["NO-PL"]["load_s"]
    assert loads["PL-B15"]["model_s"] == pytest.approx(floor_s)
    assert loads["NO-PL"]["model_s"] == pytest.approx(floor_s + load_s)

    links = {row["way"]: row["gb_s"] for row in rows if row["part"] == "link"}
    assert list(links) == ["plain", "store"] and min(links.values()) > 0

    saves = [row for row in rows if row["part"] == "save"]
    assert [row["way"] for row in saves] == ["wait", "async", "nothing"] * 2
    for row in saves:
        assert row["seconds"] > 0 and (row["saved_bytes"] > 0) == (row["way"] != "nothing")

    (tmp_path / "overlap.jsonl").write_text(overlap)
    report = answer("paper_system.py", "overlap.jsonl")
    assert "| PL-B15 |" in report and "| plain |" in report and report.count("| -13 to -15 |") == 2


def test_multiturn_reuses_what_was_said(answer: Callable[..., str], tmp_path: Path) -> None:
    size = "--conversations 2 --rate 50 --turns 3 --think 0.01 --user 150 --answer 4 --seed 4"
    size += " --window 1024 --modes recompute,wait,store --dram 64MiB --pool 64MiB --ssd 64MiB"
    printed = answer("bench_multiturn.py", *TINY, *size.split())
    rows = [json.loads(line) for line in printed.splitlines()]
    assert [row["mode"] for row in rows] == ["recompute", "wait", "store"]
    assert [row["hit"] > 0 for row in rows] == [False, True, True]
    assert len({row["turns"] for row in rows}) == 1 and not list(tmp_path.iterdir())

    (tmp_path / "multiturn.jsonl").write_text(printed)
    report = answer("paper_system.py", "multiturn.jsonl")
    assert "LLaMA-13B" in report and "| store |" in report
