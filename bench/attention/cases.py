"""What is measured: shapes, cases, and the tensors of one case."""

import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cachedattn import ops

BLOCK = 64
THETA = 10000.0


@dataclass(frozen=True)
class Shape:
    name: str
    q_heads: int
    kv_heads: int
    dim: int


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama8b", 32, 8, 128),
        Shape("llama13b", 40, 40, 128),  # no groups
        Shape("qwen", 28, 4, 128),  # groups of 7
        Shape("smollm2", 9, 3, 64),
    )
}
PHASES = ("decode", "extend", "prefill")
HISTORIES = (2048, 8192, 32768)


@dataclass(frozen=True)
class Case:
    phase: str
    batch: int
    history: int
    new: int
    shape: Shape

    @property
    def name(self) -> str:
        return f"{self.phase}/b{self.batch}/{self.history}+{self.new}/{self.shape.name}"

    @property
    def length(self) -> int:
        return self.history + self.new

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of K and V, each read once."""
        return 2 * self.batch * self.length * self.shape.kv_heads * self.shape.dim * dtype.itemsize

    @property
    def flops(self) -> float:
        """A multiply and an add for q k and for p v of every pair that the causal mask leaves."""
        pairs = self.batch * self.new * (self.history + (self.new + 1) / 2)
        return 4 * pairs * self.shape.q_heads * self.shape.dim


def all_cases(device: str) -> Iterator[Case]:
    for shape in SHAPES.values():
        for batch in (1, 16):
            for history in HISTORIES:
                yield Case("decode", batch, history, 1, shape)
        for history in HISTORIES:
            for new in (128, 512):
                yield Case("extend", 1, history, new, shape)
        yield Case("prefill", 1, 0, 2048, shape)
        if device == "cuda":
            yield Case("prefill", 1, 0, 8192, shape)


# About three minutes on two threads of a CPU.
DEFAULT_ON_CPU = (
    "decode/b1/2048+1/llama8b",
    "decode/b1/8192+1/llama8b",
    "decode/b1/32768+1/llama8b",
    "decode/b16/2048+1/llama8b",
    "extend/b1/8192+128/llama8b",
    "extend/b1/8192+512/llama8b",
    "prefill/b1/0+2048/llama8b",
    "decode/b1/8192+1/llama13b",
    "extend/b1/2048+128/llama13b",
    "decode/b1/8192+1/qwen",
    "extend/b1/2048+128/qwen",
    "decode/b1/8192+1/smollm2",
    "extend/b1/2048+128/smollm2",
)


def named(name: str) -> Case | None:
    """The case of a whole name, listed or not."""
    found = re.fullmatch(r"(\w+)/b(\d+)/(\d+)\+(\d+)/(\w+)", name)
    if found is None or found[1] not in PHASES or found[5] not in SHAPES:
        return None
    batch, history, new = (int(found[i]) for i in (2, 3, 4))
    right = {"decode": new == 1, "extend": history > 0 < new, "prefill": history == 0 < new}
    return Case(found[1], batch, history, new, SHAPES[found[5]]) if right[found[1]] else None


def is_default(case: Case, device: str) -> bool:
    if device == "cpu":
        return case.name in DEFAULT_ON_CPU
    few = ("decode/b16/8192+1", "extend/b1/8192+128")
    return case.shape.name == "llama8b" or case.name.startswith(few)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """x [..., tokens, D] rotated; pairs are (i, i + D / 2). cosine, sine: [tokens, D / 2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


def in_huge_pages(x: Tensor) -> Tensor:
    """A copy of x, on CPU in huge pages, as the store's slabs are: small ones cost every
    implementation a fifth of the memory's rate."""
    if x.device.type != "cpu":
        return x.clone()
    memory = mmap.mmap(-1, max(x.nbytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel()).view(x.shape).copy_(x)


class Inputs:
    """The tensors of a case, the same values in every layout, made when first asked for.

    KV comes in `sets` copies that calls take in turn, so that the caches hold none of them.
    Layouts: blocks [slots, 2, H, P, D] for attn_paged; k and v [B, H, L, D] for torch; the other
    peers make theirs from `one_k_rotated` and `one_v`.
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: str, sets: int) -> None:
        self.case, self.dtype, self.device, self.sets = case, dtype, device, sets
        shape, length, batch = case.shape, case.length, case.batch
        random = torch.Generator(device).manual_seed(1)
        size = (batch, shape.kv_heads, length, shape.dim)
        self.one_k, self.one_v = (
            torch.randn(size, generator=random, dtype=dtype, device=device) for _ in range(2)
        )
        size = (batch, shape.q_heads, case.new, shape.dim)
        self.q = torch.randn(size, generator=random, dtype=dtype, device=device)
        freq = THETA ** -(torch.arange(0, shape.dim, 2, dtype=torch.float64) / shape.dim)
        angle = torch.arange(length)[:, None] * freq
        self.cosine, self.sine = (x.float().to(device) for x in (angle.cos(), angle.sin()))
        self.rope_lo = ops.rope_table(freq, 256, 1).to(device)
        self.rope_hi = ops.rope_table(freq, length // 256 + 1, 256).to(device)
        self.scale = shape.dim**-0.5
        self.blocks = -(-length // BLOCK)
        table = torch.randperm(batch * self.blocks, dtype=torch.int32)
        self.block_table = table.reshape(batch, self.blocks).to(device)
        lens = torch.full((batch,), length, dtype=torch.int32)
        cu_q = torch.arange(batch + 1, dtype=torch.int32) * case.new
        workers = torch.get_num_threads()
        plan = ops.attn_plan(cu_q, lens, shape.q_heads, shape.kv_heads, BLOCK, workers)
        self.kv_lens, self.cu_q, self.plan = (x.to(device) for x in (lens, cu_q, plan))

    def to_rows(self, x: Tensor) -> Tensor:
        """[B, heads, tokens, D] as rows [B * tokens, heads, D]."""
        return x.transpose(1, 2).contiguous().reshape(-1, x.shape[1], x.shape[3])

    def _rotated(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for i in range(len(x)):  # one sequence at a time: float32 takes memory
            out[i] = rotate(x[i].float(), cosine, sine).to(self.dtype)
        return out

    @cached_property
    def q_rotated(self) -> Tensor:
        return self._rotated(
            self.q, self.cosine[self.case.history :], self.sine[self.case.history :]
        )

    @cached_property
    def one_k_rotated(self) -> Tensor:
        return self._rotated(self.one_k, self.cosine, self.sine)

    def _copies(self, x: Tensor) -> list[Tensor]:
        return [in_huge_pages(x) for _ in range(self.sets)]

    @cached_property
    def k(self) -> list[Tensor]:
        return self._copies(self.one_k)

    @cached_property
    def k_rotated(self) -> list[Tensor]:
        return self._copies(self.one_k_rotated)

    @cached_property
    def v(self) -> list[Tensor]:
        return self._copies(self.one_v)

    def _in_blocks(self, k: Tensor) -> list[Tensor]:
        case = self.case
        size = (self.block_table.numel(), 2, case.shape.kv_heads, BLOCK, case.shape.dim)
        kv = torch.zeros(size, dtype=self.dtype, device=self.device)
        for b in range(case.batch):
            slots = self.block_table[b].long()
            for i, x in enumerate((k[b], self.one_v[b])):
                padded = torch.nn.functional.pad(x, (0, 0, 0, self.blocks * BLOCK - case.length))
                parts = padded.reshape(-1, self.blocks, BLOCK, case.shape.dim)
                kv[slots, i] = parts.transpose(0, 1)
        return self._copies(kv)

    @cached_property
    def kv(self) -> list[Tensor]:
        """K before RoPE, V."""
        return self._in_blocks(self.one_k)

    @cached_property
    def kv_rotated(self) -> list[Tensor]:
        return self._in_blocks(self.one_k_rotated)
