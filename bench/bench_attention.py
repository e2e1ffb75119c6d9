"""attn_paged against torch SDPA on the same inputs.

Torch is charged the RoPE pass over K that post-load rotation implies. `torch` is its best way:
decode folds the GQA group into the query rows, other phases use enable_gqa. Outputs are compared
before anything is timed. Prints a table, or with --json one object per line.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from cachedattn import ops

SHAPES = {"smollm2": (9, 3, 64), "llama8b": (32, 8, 128)}
CASES = [
    ("decode", 1, 511),
    ("decode", 1, 8191),
    ("extend", 64, 1500),
    ("extend", 64, 6000),
    ("prefill", 1564, 0),
]
BLOCK = 64


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


def make_case(
    shape: str, new: int, history: int
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """The two ways to compute one case, each returning out [new, Hq, D]."""
    q_heads, kv_heads, dim = SHAPES[shape]
    length = history + new
    blocks = (length + BLOCK - 1) // BLOCK
    kv = torch.randn(blocks, 2, kv_heads, BLOCK, dim).bfloat16()
    q = torch.randn(new, q_heads, dim).bfloat16()
    freq = 10000.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    lo, hi = ops.rope_table(freq, 256, 1), ops.rope_table(freq, length // 256 + 1, 256)
    table = torch.randperm(blocks).to(torch.int32)[None].contiguous()
    lens = torch.tensor([length], dtype=torch.int32)
    cu_q = torch.tensor([0, new], dtype=torch.int32)
    plan = ops.attn_plan(cu_q, lens, q_heads, kv_heads, BLOCK, torch.get_num_threads())

    def ours() -> torch.Tensor:
        return ops.attn_paged(q, kv, table, lens, cu_q, plan, new, lo, hi, dim**-0.5)[0]

    gathered = kv[table[0].long()].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, dim)
    k, v = (x.contiguous() for x in gathered[:, :, :length])
    angle = torch.arange(length)[:, None] * freq
    cosine, sine = angle.cos().bfloat16(), angle.sin().bfloat16()
    mask = torch.arange(length) <= torch.arange(history, length)[:, None]

    def peer() -> torch.Tensor:
        rotated = rotate(k, cosine, sine)[None]
        rows = rotate(q.transpose(0, 1), cosine[history:], sine[history:])
        sdpa = torch.nn.functional.scaled_dot_product_attention
        if new == 1:
            folded = rows.reshape(1, kv_heads, q_heads // kv_heads, dim)
            return sdpa(folded, rotated, v[None]).reshape(1, q_heads, dim)
        if history == 0:
            out = sdpa(rows[None], rotated, v[None], is_causal=True, enable_gqa=True)
        else:
            out = sdpa(rows[None], rotated, v[None], attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return ours, peer


def paired_medians(
    first: Callable[[], object], second: Callable[[], object], seconds: float
) -> tuple[float, float]:
    """Median seconds of each, taken in turn so that both see the same noise."""
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for call, taken in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="per case")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    q_heads, kv_heads, dim = SHAPES[args.shape]
    for phase, new, history in CASES:
        ours, peer = make_case(args.shape, new, history)
        torch.testing.assert_close(ours().float(), peer().float(), atol=0.05, rtol=0.05)
        us, peer_us = (1e6 * s for s in paired_medians(ours, peer, args.seconds))
        pairs = new * (history + (new + 1) / 2)
        row = {
            "case": f"{args.shape} {phase} {new}+{history}",
            "phase": phase,
            "impl": ops.cpu_isa(),
            "threads": args.threads,
            "us": round(us, 1),
            "gbps": round(4 * (history + new) * kv_heads * dim / us / 1e3, 2),
            "tflops": round(4 * pairs * q_heads * dim / us / 1e6, 4),
            "peer": "torch SDPA after RoPE",
            "peer_us": round(peer_us, 1),
            "ratio_to_peer": round(peer_us / us, 2),
        }
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            print(
                f"{row['case']:28} {us:10.1f} us {row['gbps']:7.2f} GB/s "
                f"{1e3 * row['tflops']:7.1f} GFLOP/s   torch {peer_us:10.1f} us "
                f"({row['ratio_to_peer']}x as fast)"
            )


if __name__ == "__main__":
    main()
