"""Float64 references of the ops in plain torch, random cases to run them on, and the comparison."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cachedattn import ops

LO_ROWS = 256
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 8e-4}
DTYPES = list(TOLERANCE)


def inv_freq(rotary_dim: int, theta: float = 10000.0) -> Tensor:
    return theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def rotate(
    x: Tensor, positions: Tensor, freq: Tensor, interleaved: bool, inverse: bool = False
) -> Tensor:
    """x [N, heads, D] rotated in float64; dims from 2 * len(freq) on stay."""
    x = x.double().clone()
    pairs = len(freq)
    if pairs == 0:
        return x
    angle = positions.double()[:, None, None] * freq
    cosine, sine = angle.cos(), angle.sin() * (-1 if inverse else 1)
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    a, b = x[..., first].clone(), x[..., second].clone()
    x[..., first] = a * cosine - b * sine
    x[..., second] = b * cosine + a * sine
    return x


def rope_tables(freq: Tensor, hi_rows: int, device: str) -> tuple[Tensor, Tensor]:
    lo, hi = ops.rope_table(freq, LO_ROWS, 1), ops.rope_table(freq, hi_rows, LO_ROWS)
    return lo.to(device), hi.to(device)


@dataclass
class Case:
    """A batch for attn_paged: lengths, and the tensors made from a seed.

    q, kv, block_table and sink_logits are on `device`; keys, values, lens and cu_q on the CPU.
    """

    q_lens: list[int]
    kv_lens: list[int]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    rotary_dim: int | None = None  # None: head_dim; 0: no rotation
    interleaved: bool = False
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    seed: int = 0
    device: str = "cpu"
    poison: bool = True  # NaN in every place that holds no token
    keys: list[Tensor] = field(init=False)
    values: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        q_heads, kv_heads = self.heads
        dim, block = self.head_dim, self.block_size
        self.freq = inv_freq(dim if self.rotary_dim is None else self.rotary_dim)
        self.keys = [randn(n, kv_heads, dim).to(self.dtype) for n in self.kv_lens]
        self.values = [randn(n, kv_heads, dim).to(self.dtype) for n in self.kv_lens]
        self.q = randn(sum(self.q_lens), q_heads, dim).to(self.device, self.dtype)
        self.sink_logits = randn(q_heads).to(self.device) if self.sinks else None
        self.scale = dim**-0.5
        blocks = [(n + block - 1) // block for n in self.kv_lens]
        num_slots = sum(blocks) + 3
        # One layer of a two-layer slab, so that the strides are those of a real pool.
        slab = torch.zeros(num_slots, 2, 2, kv_heads, block, dim, dtype=self.dtype)
        if self.poison:
            slab.fill_(float("nan"))
        kv = slab[:, 1]
        slots = torch.randperm(num_slots, generator=generator).tolist()
        table = torch.full((len(blocks), max([1, *blocks])), -1, dtype=torch.int32)
        for b, count in enumerate(blocks):
            for i in range(count):
                slot = slots.pop()
                table[b, i] = slot
                part = slice(i * block, min((i + 1) * block, self.kv_lens[b]))
                used = part.stop - part.start
                kv[slot, 0, :, :used] = self.keys[b][part].transpose(0, 1)
                kv[slot, 1, :, :used] = self.values[b][part].transpose(0, 1)
        self.kv, self.block_table = slab.to(self.device)[:, 1], table.to(self.device)
        self.lens = torch.tensor(self.kv_lens, dtype=torch.int32)
        self.cu_q = torch.tensor([0, *self.q_lens]).cumsum(0).to(torch.int32)

    def tables(self) -> tuple[Tensor | None, Tensor | None]:
        if len(self.freq) == 0:
            return None, None
        return rope_tables(self.freq, max([1, *self.kv_lens]) // LO_ROWS + 1, self.device)

    def plan(self, workers: int = 2) -> Tensor:
        plan = ops.attn_plan(self.cu_q, self.lens, *self.heads, self.block_size, workers)
        return plan.to(self.device)

    def args(self) -> tuple:
        lens, cu_q = self.lens.to(self.device), self.cu_q.to(self.device)
        tensors = (self.q, self.kv, self.block_table, lens, cu_q, self.plan())
        flags = (self.scale, self.interleaved, self.window, self.softcap, self.sink_logits)
        return (*tensors, max(self.q_lens, default=0), *self.tables(), *flags)

    def run(self) -> tuple[Tensor, Tensor]:
        return ops.attn_paged(*self.args())

    def reference(self) -> tuple[Tensor, Tensor]:
        """out and lse in float64, by gathering, rotating and a full softmax."""
        outs, lses = [], []
        for b, (q_len, kv_len) in enumerate(zip(self.q_lens, self.kv_lens, strict=True)):
            out, lse = self._reference_sequence(b, q_len, kv_len)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses)

    def _reference_sequence(self, b: int, q_len: int, kv_len: int) -> tuple[Tensor, Tensor]:
        group = self.heads[0] // self.heads[1]
        positions = torch.arange(q_len) + kv_len - q_len
        row = int(self.cu_q[b])
        q = self.q[row : row + q_len].cpu()
        q = rotate(q, positions.clamp(min=0), self.freq, self.interleaved)
        k = rotate(self.keys[b], torch.arange(kv_len), self.freq, self.interleaved)
        k = k.repeat_interleave(group, dim=1)
        v = self.values[b].double().repeat_interleave(group, dim=1)
        logits = torch.einsum("qhd,khd->hqk", q, k) * self.scale
        if self.softcap > 0:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        distance = positions[:, None] - torch.arange(kv_len)
        hidden = (distance < 0) | ((distance >= self.window) if self.window else False)
        logits = logits.masked_fill(hidden, float("-inf"))
        empty = hidden.all(dim=1)
        if self.sink_logits is not None:
            sink = self.sink_logits.cpu().double()[:, None, None].expand(-1, q_len, 1)
            lse = torch.cat([logits, sink], dim=2).logsumexp(2)
        else:
            lse = logits.logsumexp(2)
        weights = (logits - lse[..., None]).exp().masked_fill(empty[:, None], 0)
        lse = lse.masked_fill(empty, float("-inf"))
        return torch.einsum("hqk,khd->qhd", weights, v), lse.T

    def rounded_error(self, expected: Tensor) -> float:
        """Relative error of the usual pipeline: rotate, round to dtype, torch's SDPA."""
        assert len(self.q_lens) == 1 and not (self.window or self.softcap or self.sinks)
        q_len, kv_len = self.q_lens[0], self.kv_lens[0]
        positions = torch.arange(kv_len)
        q = rotate(self.q.cpu(), positions[kv_len - q_len :], self.freq, self.interleaved)
        k = rotate(self.keys[0], positions, self.freq, self.interleaved)
        mask = positions[kv_len - q_len :, None] >= positions
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.to(self.dtype).transpose(0, 1)[None] for x in (q, k, self.values[0])),
            attn_mask=mask,
            enable_gqa=True,
        )
        return relative_error(out[0].transpose(0, 1), expected)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 of the difference over L2 of what is expected."""
    norm = expected.double().norm()
    return float((actual.double() - expected.double()).norm() / norm.clamp(min=1e-30))


def check(case: Case) -> None:
    """Runs the case and compares it with float64: as a whole, and row by row."""
    out, lse = case.run()
    assert out.device == lse.device == case.q.device
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    out, lse = out.cpu(), lse.cpu()
    expected, expected_lse = case.reference()
    empty = expected_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty)
    assert not out[empty].any()
    assert relative_error(out, expected) <= TOLERANCE[case.dtype]
    # A relative error of the whole hides a wrong row: every row on its own, with some room.
    error = (out.double() - expected).norm(dim=2)
    assert bool((error <= 8 * TOLERANCE[case.dtype] * expected.norm(dim=2).clamp(min=0.05)).all())
    # Matrix units take rotated Q and K in bfloat16: 2.4e-3 of a logit's deviation, which a row of
    # few keys shows in full; the sum over many keys averages it out.
    rounds = case.device != "cpu" or ops.cpu_isa() == "avx512_bf16"
    atol = 1.5e-2 if rounds and case.dtype == torch.bfloat16 else 2e-3
    assert torch.allclose(lse[~empty].double(), expected_lse[~empty], rtol=0, atol=atol)
