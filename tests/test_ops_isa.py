"""The attention tests once more for every other instruction set that this machine has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cachedattn import ops

LEVELS = ["reference", "avx2", "avx512", "avx512_bf16"]
HERE = Path(__file__).parent


def run(folder: Path, level: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CACHEDATTN_CPU_ISA": level}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("level", [level for level in LEVELS if level != ops.cpu_isa()])
@pytest.mark.skipif("CACHEDATTN_CPU_ISA" in os.environ, reason="one instruction set was asked for")
def test_attention_with(level, tmp_path):
    shown = run(tmp_path, level, "-c", "from cachedattn import ops; print(ops.cpu_isa())")
    if "not on this machine" in shown.stderr:
        pytest.skip("not on this machine")
    assert shown.stdout.strip() == level, shown.stderr
    files = [str(HERE / "test_ops_attention.py"), str(HERE / "test_ops_cache.py")]
    deselected = "not opcheck and not refuses and not compiles"
    tests = run(
        tmp_path, level, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", deselected, *files
    )
    assert tests.returncode == 0, tests.stdout[-4000:]
    assert " passed" in tests.stdout


def test_an_unknown_instruction_set_is_refused(tmp_path):
    result = run(tmp_path, "sse9", "-c", "import cachedattn.ops")
    assert result.returncode != 0
    assert "CACHEDATTN_CPU_ISA=sse9: unknown, or not on this machine" in result.stderr
