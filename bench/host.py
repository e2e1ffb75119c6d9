"""What the benchmarks say of where they ran, and the native programs that they start."""

import os
import platform
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "bench"


def built(target: str) -> Path:
    """A program of bench/native, built first."""
    env = {**os.environ, "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    flags = ["-GNinja", "-DCACHEDATTN_PYTHON=OFF", "-DCACHEDATTN_BENCH=ON"]
    commands = [["cmake", "--build", BUILD, "--target", target]]
    if not (BUILD / "build.ninja").exists():
        commands.insert(0, ["cmake", "-S", ROOT, "-B", BUILD, *flags])
    for command in commands:
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    return BUILD / "bench" / "native" / target


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.check_output(
            command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = dict(line.split("\t: ", 1) for line in lines if "\t: " in line)
    return f"{fields.get('model name', platform.processor())}, {os.cpu_count()} CPUs"
