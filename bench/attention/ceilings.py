"""What the machine can do at best, measured in the same run, and the limit that follows."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import host
import torch

from attention.cases import Case


@dataclass(frozen=True)
class Ceilings:
    """read_gbps bounds the KV bytes. On CPU the larger of fma (float32 multiply-adds) and, for
    bfloat16, bf16 (VDPBF16PS) bounds the arithmetic; on a GPU a matrix product of the dtype does.
    """

    read_gbps: float
    fma_gflops: float = 0.0
    bf16_gflops: float = 0.0
    gemm_gflops: float = 0.0

    def limit_us(self, case: Case, dtype: torch.dtype) -> float:
        peak = max(self.fma_gflops, self.gemm_gflops)
        if dtype == torch.bfloat16:
            peak = max(peak, self.bf16_gflops)
        return max(case.kv_bytes(dtype) / self.read_gbps, case.flops / peak) / 1e3

    def better(self, other: "Ceilings") -> "Ceilings":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Ceilings(*(max(pair) for pair in pairs))


def cache_bytes(device: str) -> int:
    """The largest cache: all of a GPU's L2, all of a CPU's last level."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max(
        (int(path.read_text().strip().rstrip("K")) << 10 for path in sizes), default=32 << 20
    )


class CpuCeilings:
    """The program `ceilings` (bench/native/ceilings.cc), built first."""

    def __init__(self, threads: int, size: int) -> None:
        command = [host.built("ceilings"), str(threads), str(max(size >> 20, 1))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def measure(self) -> Ceilings:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return Ceilings(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate()


class GpuCeilings:
    """A copy within device memory (bytes read and written) and a square matrix product."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.source = torch.ones(1 << 28, dtype=torch.float32, device="cuda")  # 1 GiB
        self.target = torch.empty_like(self.source)
        self.a = torch.randn(8192, 8192, dtype=dtype, device="cuda")
        self.c = torch.empty_like(self.a)

    def measure(self) -> Ceilings:
        def milliseconds(run) -> float:
            best = float("inf")
            for _ in range(8):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                end.synchronize()
                best = min(best, start.elapsed_time(end))
            return best

        copy_ms = milliseconds(lambda: self.target.copy_(self.source))
        gemm_ms = milliseconds(lambda: torch.mm(self.a, self.a, out=self.c))
        return Ceilings(
            read_gbps=2 * self.source.nbytes / copy_ms / 1e6,
            gemm_gflops=2 * 8192**3 / gemm_ms / 1e6,
        )

    def close(self) -> None:
        pass
