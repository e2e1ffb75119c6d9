"""attn_plan and attn_paged against float64, and the promises around them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_reference import DTYPES, Case, check, relative_error

from cachedattn import ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("interleaved", [False, True])
def test_every_head_dim_in_decode_extend_and_prefill(dtype, head_dim, interleaved, device):
    lengths = ([1, 20, 70], [300, 200, 70])
    flags = {"dtype": dtype, "interleaved": interleaved, "device": device}
    check(Case(*lengths, (6, 2), head_dim, **flags))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (9, 3), (8, 2), (7, 1), (10, 1)])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_every_group_and_block_size(dtype, heads, block_size, device):
    flags = {"block_size": block_size, "dtype": dtype, "device": device}
    check(Case([1, 3, 33], [150, 290, 65], heads, **flags))


@pytest.mark.parametrize("rotary_dim", [0, 2, 10, 16, 32, 48, 62, 64])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partial_rotary(rotary_dim, interleaved, dtype, device):
    flags = {"rotary_dim": rotary_dim, "interleaved": interleaved, "dtype": dtype}
    check(Case([1, 40], [131, 90], device=device, **flags))


@pytest.mark.parametrize("q_len", [1, 2, 64, 130])
@pytest.mark.parametrize("flags", [{"window": 100}, {"softcap": 3.0}, {"sinks": True}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_flags_over_many_splits(q_len, flags, dtype, device):
    check(Case([q_len], [1100], (6, 2), dtype=dtype, device=device, **flags))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [{}, {"window": 1500}])
def test_more_splits_than_cpu_tasks(flags, dtype, device):
    check(Case([1, 40, 130], [2900, 2500, 4200], (6, 2), dtype=dtype, device=device, **flags))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_flags_together(dtype, device):
    flags = {"window": 77, "softcap": 2.0, "sinks": True}
    check(Case([5, 80], [600, 300], dtype=dtype, device=device, **flags))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_batches(data, device):
    lengths = data.draw(
        st.lists(st.tuples(st.integers(0, 90), st.integers(0, 330)), min_size=0, max_size=4)
    )
    kv_heads = data.draw(st.integers(1, 3))
    case = Case(
        [q for q, _ in lengths],
        [kv for _, kv in lengths],
        (kv_heads * data.draw(st.sampled_from([1, 3, 4, 7])), kv_heads),
        head_dim=data.draw(st.sampled_from([16, 64, 80])),
        block_size=data.draw(st.sampled_from([16, 64])),
        dtype=data.draw(st.sampled_from(DTYPES)),
        rotary_dim=data.draw(st.sampled_from([None, 0, 16])),
        interleaved=data.draw(st.booleans()),
        window=data.draw(st.sampled_from([0, 0, 1, 17, 100])),
        softcap=data.draw(st.sampled_from([0.0, 0.0, 5.0])),
        sinks=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 1000)),
        device=device,
    )
    if lengths:
        check(case)
    else:
        out, lse = case.run()
        assert out.shape == (0, *case.q.shape[1:]) and lse.shape == (0, case.heads[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_keys(dtype, device):
    # No key at all; more rows than keys; no row.
    case = Case([2, 5, 0, 1], [0, 3, 40, 9], dtype=dtype, device=device)
    check(case)
    _, lse = case.run()
    assert lse[:4].isneginf().all() and not lse[4:].isneginf().any()


def test_long_positions_keep_float32_accuracy(device):
    # Needs the two-level tables: a float32 product of position and frequency loses 1e-4 here.
    check(Case([1], [40000], (2, 1), head_dim=16, block_size=128, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q_len", [1, 64])
def test_no_worse_than_rotating_rounding_and_sdpa(dtype, q_len, device):
    case = Case([q_len], [700], (9, 3), block_size=64, dtype=dtype, device=device)
    expected, _ = case.reference()
    out, _ = case.run()
    assert relative_error(out.cpu(), expected) <= 1.5 * case.rounded_error(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_output_does_not_depend_on_batch_mates_or_threads(dtype, head_dim, device):
    lengths = [(1, 900), (64, 700), (130, 130), (3, 40)]
    batch = Case(
        [q for q, _ in lengths],
        [kv for _, kv in lengths],
        (6, 2),
        head_dim,
        dtype=dtype,
        device=device,
    )
    out, lse = batch.run()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            args = list(batch.args())
            args[5] = batch.plan(workers=count)
            again, again_lse = ops.attn_paged(*args)
            assert torch.equal(again, out) and torch.equal(again_lse, lse)
    finally:
        torch.set_num_threads(threads)
    for b, (q_len, _) in enumerate(lengths):
        rows = slice(int(batch.cu_q[b]), int(batch.cu_q[b + 1]))
        cu_q = torch.tensor([0, q_len], dtype=torch.int32)
        lens = batch.lens[b : b + 1]
        plan = ops.attn_plan(cu_q, lens, *batch.heads, batch.block_size, 2)
        alone, alone_lse = ops.attn_paged(
            batch.q[rows],
            batch.kv,
            batch.block_table[b : b + 1],
            lens.to(device),
            cu_q.to(device),
            plan.to(device),
            q_len,
            *batch.tables(),
            batch.scale,
        )
        assert torch.equal(alone, out[rows]) and torch.equal(alone_lse, lse[rows])


def test_split_by_keys_then_merged_equals_the_whole(device):
    # Decode over 96 keys = merge of attention over blocks 0-2 and 3-5 with no rotation.
    whole = Case([1], [96], rotary_dim=0, device=device)
    out, lse = whole.run()
    halves = []
    for part in (slice(0, 3), slice(3, 6)):
        table = whole.block_table[:, part].contiguous()
        lens = torch.tensor([48], dtype=torch.int32)
        plan = ops.attn_plan(whole.cu_q, lens, *whole.heads, whole.block_size, 1)
        lengths = (x.to(device) for x in (lens, whole.cu_q, plan))
        args = (whole.q, whole.kv, table, *lengths, 1, None, None, whole.scale)
        halves.append(ops.attn_paged(*args))
    merged, merged_lse = ops.merge_states(
        torch.stack([o for o, _ in halves]), torch.stack([part_lse for _, part_lse in halves])
    )
    assert relative_error(merged, out) < 1e-6
    assert torch.allclose(merged_lse, lse, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_q_with_gaps_between_rows(dtype, device):
    case = Case([4, 1], [60, 30], dtype=dtype, device=device)
    out, _ = case.run()
    wide = torch.full((5, 8, 64), float("nan"), dtype=dtype, device=device)
    wide[:, :4] = case.q
    case.q = wide[:, :4]
    assert torch.equal(case.run()[0], out)


def test_plan_is_a_function_of_the_lengths():
    case = Case([64, 1], [700, 3000], poison=False)
    assert torch.equal(case.plan(), case.plan())


BAD_PLANS = [
    ({"cu_q": torch.tensor([1, 2], dtype=torch.int32)}, "cu_q: must begin with 0"),
    ({"cu_q": torch.tensor([0], dtype=torch.int32)}, r"cu_q: must be \[2\]"),
    ({"cu_q": torch.tensor([0, -1], dtype=torch.int32)}, "cu_q: must not decrease"),
    ({"cu_q": torch.tensor([0, 1])}, "cu_q: must be int32, is int64"),
    ({"kv_lens": torch.tensor([-4], dtype=torch.int32)}, "kv_lens: must not be negative"),
    ({"num_q_heads": 5}, "num_q_heads: must be a multiple"),
    ({"num_kv_heads": 0}, "num_q_heads: must be a multiple"),
    ({"block_size": 48}, "block_size: must be 16, 32, 64 or 128"),
    ({"workers": 0}, "workers: must be at least 1"),
]


@pytest.mark.parametrize(("change", "message"), BAD_PLANS)
def test_plan_refuses(change, message):
    good = {
        "cu_q": torch.tensor([0, 1], dtype=torch.int32),
        "kv_lens": torch.tensor([9], dtype=torch.int32),
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "block_size": 16,
        "workers": 2,
    }
    ops.attn_plan(**good)
    with pytest.raises(RuntimeError, match=message):
        ops.attn_plan(**(good | change))


def bad_calls() -> list[tuple[str, object, str]]:
    """Shapes, dtypes and flags, which every device refuses."""
    i32 = torch.int32
    return [
        ("q", torch.zeros(1, 4, 64, dtype=torch.bfloat16), "q: must be float32, is bfloat16"),
        ("q", torch.zeros(1, 4, 32), r"q: must be \[n, 4, 64\]"),
        ("q", torch.zeros(4, 64), "q: must have 3 dimensions"),
        ("q", torch.zeros(1, 3, 64), "q: its heads"),
        ("kv", torch.zeros(9, 2, 2, 16, 64, dtype=torch.float64), "kv: must be float32, bf"),
        ("kv", torch.zeros(9, 3, 2, 16, 64), "kv: dimension 1 must be 2"),
        ("kv", torch.zeros(9, 2, 2, 48, 64), "kv: block size must be"),
        ("kv", torch.zeros(9, 2, 2, 16, 72), "kv: head_dim must be"),
        ("kv", torch.zeros(9, 2, 2, 16, 128)[..., ::2], "kv: the last dimension must be contig"),
        ("block_table", torch.zeros(2, 3, dtype=i32), "block_table: must have 1 rows"),
        ("cu_q", torch.zeros(1, dtype=i32), r"cu_q: must be \[2\]"),
        ("plan", torch.zeros(3), "plan: must be int32"),
        ("max_q_len", -1, "max_q_len: must not be negative"),
        ("rope_lo", None, "rope_lo, rope_hi: give both"),
        ("rope_lo", torch.zeros(255, 32, 2), "rope_lo: must be"),
        ("rope_hi", torch.zeros(1, 16, 2), "rope_hi: must be"),
        ("sm_scale", 0.0, "sm_scale: must be positive"),
        ("window", -1, "window: must not be negative"),
        ("softcap", -1.0, "softcap: must not be negative"),
        ("sinks", torch.zeros(3), r"sinks: must be \[4\]"),
    ]


def bad_contents() -> list[tuple[str, object, str]]:
    """What only the CPU sees before it is too late."""
    i32 = torch.int32
    return [
        ("q", torch.zeros(2, 4, 64), "cu_q: must end with 2"),
        ("kv", torch.zeros(1, 2, 2, 16, 64), "block_table: slot .* outside"),
        ("block_table", torch.full((1, 3), -1, dtype=i32), "block_table: slot -1 at"),
        ("block_table", torch.zeros(1, 1, dtype=i32), "kv_lens: 40 at 0 needs 3 blocks"),
        ("kv_lens", torch.tensor([39], dtype=i32), "plan: was not made"),
        ("kv_lens", torch.tensor([-1], dtype=i32), "kv_lens: must not be negative"),
        ("plan", torch.zeros(3, dtype=i32), "plan: was not made"),
        ("plan", torch.zeros(14, dtype=i32), "plan: was not made"),
        ("max_q_len", 0, "max_q_len: is 0, sequence 0 has 1 rows"),
        ("rope_hi", torch.zeros(0, 32, 2), "kv_lens: 40 at 0 is past 0"),
    ]


def refuses(case: Case, name: str, value: object, message: str) -> None:
    """That the case is refused with `value` for the argument `name`, and not without."""
    names = "q kv block_table kv_lens cu_q plan max_q_len rope_lo rope_hi sm_scale interleaved"
    good = dict(zip([*names.split(), "window", "softcap", "sinks"], case.args(), strict=True))
    ops.attn_paged(**good)
    if isinstance(value, torch.Tensor):
        # A copy on another device would have other strides.
        value = torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=case.device
        ).copy_(value)
    with pytest.raises(RuntimeError, match=message):
        ops.attn_paged(**(good | {name: value}))


@pytest.mark.parametrize(("name", "value", "message"), bad_calls())
def test_attention_refuses(name, value, message, device):
    refuses(Case([1], [40], device=device), name, value, message)


@pytest.mark.parametrize(("name", "value", "message"), bad_contents())
def test_attention_refuses_contents(name, value, message):
    refuses(Case([1], [40]), name, value, message)


def test_attention_refuses_a_table_narrower_than_the_rotary_dim(device):
    case = Case([1], [40], head_dim=16, device=device)
    args = list(case.args())
    args[7:9] = Case([1], [40], head_dim=32, device=device).tables()
    with pytest.raises(RuntimeError, match="rope_lo: rotary_dim 32 is larger than head_dim 16"):
        ops.attn_paged(*args)
