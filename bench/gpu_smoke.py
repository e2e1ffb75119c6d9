"""Every op once on the GPU, on small shapes that reach every kernel, against float64.

Small enough for compute-sanitizer; bench/gpu_check.sh runs it, with tests/ on PYTHONPATH.
"""

import itertools

import torch
from ops_reference import Case, check, inv_freq, rope_tables, rotate

from cachedattn import ops

LENGTHS = ([1, 20, 70, 0, 2], [300, 90, 70, 5, 0])  # decode, extend, prefill, no row, no key


def check_attention() -> None:
    for head_dim, dtype in itertools.product((64, 80, 128, 256), (torch.bfloat16, torch.float16)):
        check(Case(*LENGTHS, (8, 2), head_dim, block_size=64, dtype=dtype, device="cuda"))
    flags = {"block_size": 16, "window": 77, "softcap": 2.0, "sinks": True, "device": "cuda"}
    for head_dim, dtype in itertools.product((64, 128), (torch.bfloat16, torch.float32)):
        check(Case(*LENGTHS, (6, 2), head_dim, interleaved=True, dtype=dtype, **flags))
    check(Case(*LENGTHS, (2, 2), 128, rotary_dim=32, dtype=torch.bfloat16, device="cuda"))
    check(Case(*LENGTHS, (4, 2), 128, rotary_dim=0, dtype=torch.bfloat16, device="cuda"))


def check_cache_ops() -> None:
    k, v = torch.randn(2, 7, 3, 64, device="cuda").bfloat16()
    kv = torch.zeros(2, 2, 3, 16, 64, device="cuda", dtype=k.dtype)
    ops.kv_append(k, v, kv, torch.tensor([0, 17, -1, 3, 31, 16, 9], device="cuda"))
    assert torch.equal(kv[1, 0, :, 1], k[1]) and torch.equal(kv[0, 1, :, 3], v[3])
    positions = torch.arange(7, dtype=torch.int32)
    expected = rotate(k.cpu(), positions, inv_freq(64), False)
    ops.rope_apply_(k, positions.cuda(), *rope_tables(inv_freq(64), 1, "cuda"))
    assert torch.allclose(k.cpu().double(), expected, rtol=0.01, atol=1e-5)
    merged, lse = ops.merge_states(v[None].repeat(2, 1, 1, 1), torch.zeros(2, 7, 3, device="cuda"))
    assert torch.allclose(merged, v) and torch.allclose(lse, torch.full_like(lse, 2).log())


def main() -> None:
    check_attention()
    check_cache_ops()
    torch.cuda.synchronize()
    print("every op gives what float64 gives")


if __name__ == "__main__":
    main()
