"""Ways to move a history's bytes: the store, plain loops, fio, NIXL. Each runs when told to."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30


@dataclass(frozen=True)
class Sample:
    """One run of one way."""

    gbps: float
    cpu_s_per_gib: float


@dataclass(frozen=True)
class Load:
    """The requests that the store issues: how many of each size, and at most how many at a time."""

    depth: int
    sizes: dict[int, int]

    @property
    def bytes(self) -> int:
        return sum(size * count for size, count in self.sizes.items())


class Server:
    """A program that answers each line with bytes, seconds and CPU seconds, as a JSON line."""

    def __init__(self, command: list[str | os.PathLike]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.hello = self._read()

    def _read(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{Path(self.process.args[0]).name} ended: {self.process.wait()}")
        return json.loads(line)

    def loads(self) -> dict[str, Load]:
        return {
            name: Load(load["depth"], {int(size): n for size, n in load["sizes"].items()})
            for name, load in self.hello.items()
        }

    def way(self, line: str) -> Callable[[], Sample]:
        def run() -> Sample:
            assert self.process.stdin is not None
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self._read()
            moved, seconds = answer["bytes"], answer["seconds"]
            return Sample(moved / seconds / 1e9, answer["cpu"] * GIB / moved)

        return run

    def close(self) -> None:
        self.process.communicate()


def fio(file: Path, first: int, load: Load, write: bool) -> Callable[[], Sample]:
    """fio at the same sizes and depth, over the same file, with huge-page buffers as ours are:
    glibc asks for them when this variable is set. The first half second, in which it touches them
    for the first time, does not count."""
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    size = file.stat().st_size if write else load.bytes
    total = sum(load.sizes.values())
    shares = [f"{block}/{100 * count // total}" for block, count in load.sizes.items()]
    shares[-1] = shares[-1].split("/")[0] + "/"  # what is left of 100
    direction = "write" if write else "read"
    command = ["fio", "--name=transfer", f"--filename={file}", f"--rw={direction}", "--direct=1"]
    command += ["--ioengine=io_uring", f"--iodepth={load.depth}", f"--bssplit={':'.join(shares)}"]
    command += [f"--offset={first}", f"--size={size}", "--time_based"]
    command += ["--runtime=500ms", "--ramp_time=500ms"]
    command += ["--output-format=json", *([] if write else ["--readonly"])]

    def run() -> Sample:
        job = json.loads(subprocess.check_output(command, env=env, text=True))["jobs"][0]
        moved = job[direction]
        gib = moved["io_bytes"] / GIB
        cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * moved["runtime"] / 1e3
        return Sample(moved["bw_bytes"] / 1e9, cpu / gib)

    return run
