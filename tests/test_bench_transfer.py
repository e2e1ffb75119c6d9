"""bench/bench_transfer.py: it explains itself, and a short run prints figures that agree."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent.parent / "bench" / "bench_transfer.py"
PLAIN = {"io_uring loop", "pread loop", "pwrite loop", "memcpy", "fio"}


def answer(*args: str) -> str:
    done = subprocess.run([sys.executable, PROGRAM, *args], capture_output=True, text=True)
    if "no io_uring" in done.stderr:
        pytest.skip("io_uring is refused on this machine")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_has_examples() -> None:
    assert "bench_transfer.py --json > " in answer("--help")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    where = ["--directory", str(tmp_path_factory.mktemp("bench"))]
    size = ["--geometry", "smollm2", "--megabytes", "16", "--rounds", "3"]
    return [json.loads(line) for line in answer(*where, *size, "--encrypt", "--json").splitlines()]


def test_every_case_stands_beside_plain_ways(results: list[dict]) -> None:
    known, *rows = results
    assert {"machine", "kernel", "file_system", "commit", "command"} <= set(known)
    assert {row["case"] for row in rows} == {"pieces", "blocks", "write", "device"}
    for case in ("pieces", "blocks", "write", "device"):
        ways = {row["way"] for row in rows if row["case"] == case}
        assert "cachedattn" in ways and ways & PLAIN
        for kind in ("unverified", "encrypted"):
            assert (f"cachedattn, {kind}" in ways) == (case != "device")


def test_rows_are_complete_and_agree(results: list[dict]) -> None:
    rows = results[1:]
    for row in rows:
        [ours] = [r for r in rows if r["case"] == row["case"] and r["way"] == "cachedattn"]
        assert row["geometry"] == "smollm2" and row["gbps"] > 0 and row["cpu_s_per_gib"] >= 0
        assert row["gbps"] == pytest.approx(statistics.median(row["rounds"]), abs=1e-3)
        pairs = zip(ours["rounds"], row["rounds"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        assert row["ours"] == pytest.approx(ratio, rel=0.02)
        if row["case"] != "device":
            moved = sum(int(size) * count for size, count in row["sizes"].items())
            # 11 blocks of a header page and 30 layers of 48 KiB, whole and in pieces.
            assert moved == row["bytes"] == 11 * (4096 + 30 * (48 << 10))
            assert row["depth"] >= 1
