"""The scripts: no CUDA by accident, a clear list of what is missing, no GPU, a failed step."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).parent.parent / "scripts"
CUDA_REPORT = {"install": [{"metadata": {"name": "torch"}}, {"metadata": {"name": "nvidia-nccl"}}]}
CPU_REPORT = {"install": [{"metadata": {"name": "torch"}}, {"metadata": {"name": "numpy"}}]}


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/install_torch.py on a machine with no torch and no GPU; `calls` gets commands."""
    spec = importlib.util.spec_from_file_location("install_torch", SCRIPTS / "install_torch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls: list[list[str]] = []
    monkeypatch.setattr(module, "calls", calls, raising=False)
    monkeypatch.setattr(module.subprocess, "check_call", calls.append)
    monkeypatch.setattr(module, "installed", lambda: None)
    monkeypatch.setattr(module, "has_gpu", lambda: False)
    monkeypatch.setattr(module, "planned", lambda: CPU_REPORT)
    monkeypatch.delenv("CACHEDATTN_TORCH", raising=False)
    return module


def test_cpu_build_is_installed(installer: ModuleType) -> None:
    installer.main()
    assert [call[-1] for call in installer.calls] == [installer.REQUIREMENT]


def test_cuda_build_is_refused_without_gpu(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "planned", lambda: CUDA_REPORT)
    with pytest.raises(SystemExit, match=r"1 CUDA packages(.|\n)*CACHEDATTN_TORCH"):
        installer.main()
    assert not installer.calls


def test_cuda_build_is_installed_with_gpu(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "planned", lambda: CUDA_REPORT)
    monkeypatch.setattr(installer, "has_gpu", lambda: True)
    installer.main()
    assert len(installer.calls) == 1


def test_users_choice_is_taken(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer, "planned", lambda: CUDA_REPORT)
    monkeypatch.setenv("CACHEDATTN_TORCH", "torch --index-url 'http://x y'")
    installer.main()
    assert installer.calls[0][-3:] == ["torch", "--index-url", "http://x y"]


def test_present_torch_is_kept(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer, "installed", lambda: "2.13.0+cpu")
    installer.main()
    assert not installer.calls


def test_old_torch_is_refused(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer, "installed", lambda: "2.9.1")
    with pytest.raises(SystemExit, match=r"2\.11 or later"):
        installer.main()


def install_system(programs: dict[str, str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs install_system.sh where only these programs exist (name -> shell script)."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("bash", "env"):
        (folder / name).symlink_to(shutil.which(name) or name)
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    env = {"PATH": str(folder), "PYTHON": sys.executable, "LOG": str(tmp_path / "log")}
    command = [SCRIPTS / "install_system.sh"]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)


def test_missing_packages_are_listed(tmp_path: Path) -> None:
    answer = install_system({"id": "echo 1000"}, tmp_path)
    assert answer.returncode == 1
    assert "apt-get install g++" in answer.stderr and "liburing-dev" in answer.stderr


def test_missing_packages_are_installed_by_sudo(tmp_path: Path) -> None:
    programs = {
        "id": "echo 1000",
        "sudo": 'shift; "$@"',
        "true": "exit 0",
        "apt-get": 'echo "$@" >> "$LOG"',
    }
    answer = install_system(programs, tmp_path)
    log = (tmp_path / "log").read_text()
    assert "update" in log and "libxxhash-dev" in log
    assert answer.returncode == 1 and "Still missing after apt-get: g++" in answer.stderr


def gpu_check(python: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs bench/gpu_check.sh; what it writes goes to `folder`/results."""
    (folder / "any.whl").touch()
    sanitizer = folder / "compute-sanitizer"
    sanitizer.write_text('#!/bin/bash\necho "$@"\n')
    sanitizer.chmod(0o755)
    script = SCRIPTS.parent / "bench" / "gpu_check.sh"
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(python)}
    return subprocess.run(
        [script, folder / "any.whl", folder / "results"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_gpu_check_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    answer = gpu_check(sys.executable, tmp_path)
    assert answer.returncode == 2 and "sees no GPU here" in answer.stderr
    assert not (tmp_path / "results").exists()


def test_gpu_check_goes_on_after_a_failed_step(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\ncase "$*" in "-m pytest"*) exit 3 ;; esac\necho "{}"\n')
    python.chmod(0o755)
    answer = gpu_check(python, tmp_path)
    lines = (tmp_path / "results" / "summary.txt").read_text().splitlines()
    steps = "install machine smoke tests engine memcheck racecheck synccheck"
    steps += " bench overlap multiturn"
    assert answer.returncode == 1 and [line.split()[0] for line in lines] == steps.split()
    assert [line.split()[0] for line in lines if "FAILED (3)" in line] == [
        "tests",
        "engine",
    ]
    for name in ("bench", "overlap", "multiturn"):
        assert (tmp_path / "results" / f"{name}.jsonl").read_text() == "{}\n"
    limits = [int(seconds) for seconds in re.findall(r"\(at most (\d+) s\)", answer.stdout)]
    assert len(limits) == len(lines) and sum(limits) <= 510  # of 540
