"""bench/bench_attention.py: it lists, explains itself, and prints figures that agree."""

import contextlib
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "bench" / "bench_attention.py"
FIELDS = "case phase impl us gbps tflops limit_us peer ratio_to_peer device threads dtype batch"


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the program in this process, where torch is there already; returns what it prints."""
    monkeypatch.syspath_prepend(PROGRAM.parent)

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(PROGRAM), *args])
        with contextlib.suppress(SystemExit):
            runpy.run_path(str(PROGRAM), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_help_has_examples(answer: Callable[..., str]) -> None:
    assert "bench_attention.py --json > " in answer("--help")


def test_cases_are_listed(answer: Callable[..., str]) -> None:
    names = answer("--list", "--shape", "qwen").split()
    assert names == ["decode/b1/8192+1/qwen", "extend/b1/2048+128/qwen"]
    every = answer("--list", "--full").split()
    assert len(every) == len(set(every)) > 50 and set(names) < set(every)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "results.jsonl"
    case = ["--case", "extend/b2/100+30/smollm2", "--seconds", "0.1", "--threads", "1"]
    command = [sys.executable, PROGRAM, *case, "--peer", "torch", "--peer", "torch-naive", "--json"]
    path.write_text(subprocess.check_output(command, text=True))
    return path


def test_rows_are_complete_and_agree(results: Path) -> None:
    header, *rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert {"machine", "torch", "commit"} <= set(header)
    assert {row["peer"] for row in rows} == {
        "cachedattn, K rotated before",
        "torch",
        "torch-naive",
    }
    shape = {"q_heads": 9, "kv_heads": 3, "dim": 64}
    for row in rows:
        assert set(FIELDS.split()) | {"history", "new", "shape", "commit"} <= set(row)
        assert row["impl"] == "cachedattn" and row["us"] > 0
        assert row["ratio_to_peer"] == pytest.approx(row["peer_us"] / row["us"], abs=1e-3)
        kv_bytes = 2 * 2 * 130 * shape["kv_heads"] * shape["dim"] * 2
        flops = 4 * 2 * 30 * (100 + 15.5) * shape["q_heads"] * shape["dim"]
        assert row["gbps"] == pytest.approx(kv_bytes / row["us"] / 1e3, abs=0.01)
        assert row["tflops"] == pytest.approx(flops / row["us"] / 1e6, abs=1e-4)
        peak = max(row["fma_gflops"], row["bf16_gflops"])
        limit = max(kv_bytes / row["read_gbps"], flops / peak) / 1e3
        assert row["limit_us"] == pytest.approx(limit, abs=0.1)


def test_table_is_made_from_results(results: Path, answer: Callable[..., str]) -> None:
    head, _, row = answer("--markdown", str(results)).splitlines()
    assert "x torch |" in head and row.startswith("| extend/b2/100+30/smollm2 |")
