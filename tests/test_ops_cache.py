"""rope_table, rope_apply_, kv_append and merge_states against float64; opcheck and compile."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_reference import DTYPES, Case, inv_freq, relative_error, rope_tables, rotate

import cachedattn as ca
from cachedattn import ops


def ulps(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Distance in units of the last place of the dtype of `actual`."""
    spacing = (
        torch.finfo(actual.dtype).eps
        * 2.0 ** expected.double().abs().clamp(min=torch.finfo(actual.dtype).tiny).log2().floor()
    )
    return (actual.double() - expected.double()).abs() / spacing


@pytest.mark.parametrize("stride", [1, 256])
def test_table_is_float64_rounded_once(stride):
    freq = inv_freq(64, 500000.0)
    table = ops.rope_table(freq, 512, stride)
    angle = np.arange(512, dtype=np.float64)[:, None] * stride * freq.numpy()
    expected = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    assert table.dtype == torch.float32 and table.shape == (512, 32, 2)
    # One unit in the last place: libm and numpy may round the cosine apart.
    np.testing.assert_array_max_ulp(table.numpy(), expected.astype(np.float32), maxulp=1)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    dims=st.sampled_from([(64, 64), (64, 32), (80, 80), (80, 10), (96, 96), (16, 2), (128, 128)]),
    tokens=st.integers(0, 9),
    heads=st.integers(1, 3),
    offset=st.sampled_from([0, 0, 1, 8]),  # where rows begin: not always at a whole vector
    interleaved=st.booleans(),
    inverse=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rope_apply(dtype, dims, tokens, heads, offset, interleaved, inverse, seed, device):
    head_dim, rotary_dim = dims
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(tokens, heads + 1, head_dim + offset, generator=generator).to(dtype)
    positions = torch.randint(0, 4096, (tokens,), generator=generator, dtype=torch.int32)
    freq = inv_freq(rotary_dim)
    before = wide[:, :heads, offset:]
    expected = rotate(before, positions, freq, interleaved, inverse)
    there = wide.to(device)
    tables = rope_tables(freq, 16, device)
    ops.rope_apply_(there[:, :heads, offset:], positions.to(device), *tables, interleaved, inverse)
    x = there.cpu()
    assert torch.equal(x[:, heads:], wide[:, heads:])
    assert torch.equal(x[..., :offset], wide[..., :offset])
    x = x[:, :heads, offset:]
    assert torch.equal(x[..., rotary_dim:], before[..., rotary_dim:])
    if dtype == torch.float32:
        assert torch.allclose(x.double(), expected, rtol=0, atol=3e-6)
    else:
        assert torch.allclose(x.double(), expected, rtol=torch.finfo(dtype).eps, atol=3e-6)
        # Where float32 lies near the middle of two numbers it may round to the other one.
        assert int((x != expected.to(dtype)).sum()) <= 1 + 0.01 * x.numel()


def test_rope_by_zero_and_back(device):
    lo, hi = rope_tables(inv_freq(64), 4, device)
    x = torch.randn(5, 2, 64, device=device)
    y = x.clone()
    ops.rope_apply_(y, torch.zeros(5, dtype=torch.int32, device=device), lo, hi)
    assert torch.equal(x, y)
    positions = torch.tensor([1, 255, 256, 700, 1023], dtype=torch.int32, device=device)
    ops.rope_apply_(y, positions, lo, hi)
    assert not torch.allclose(x, y, atol=0.1)
    ops.rope_apply_(y, positions, lo, hi, inverse=True)
    assert torch.allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("block", "dim"), [(16, 16), (64, 64), (128, 80)])
@pytest.mark.parametrize("offset", [0, 1, 8])  # where rows and pool begin
def test_append_writes_exactly_its_places(dtype, block, dim, offset, device):
    tokens, row = 150, 2 * dim
    shape = (6, 3, 2, 2, block, dim)
    flat = torch.full((offset + 6 * 3 * 2 * block * row,), 7.0).to(device, dtype)
    slab = flat[offset:].view(shape)
    # Rows of k with a gap, and beginning anywhere.
    k = torch.randn(tokens, row + 2 * offset).to(dtype)[:, offset : offset + row]
    k = k.unflatten(1, (2, dim))
    v = torch.randn(tokens, 2, dim).to(dtype)
    places = torch.randperm(6 * block)[:tokens]
    slots = torch.full((tokens,), -1, dtype=torch.int64)
    slots[: len(places)] = places
    slots[3] = -1
    expected = torch.full(shape, 7.0).to(dtype)
    for n, place in enumerate(slots.tolist()):
        if place >= 0:
            expected[place // block, 1, 0, :, place % block] = k[n]
            expected[place // block, 1, 1, :, place % block] = v[n]
    there = torch.zeros(tokens, row + 2 * offset).to(device, dtype)[:, offset : offset + row]
    there = there.unflatten(1, (2, dim)).copy_(k)
    ops.kv_append(there, v.to(device), slab[:, 1], slots.to(device))
    assert torch.equal(slab.cpu(), expected)
    assert bool((flat[:offset] == 7.0).all())


def test_append_of_nothing(device):
    kv = torch.ones(2, 2, 3, 16, 64, device=device)
    nothing = torch.zeros(0, 3, 64, device=device)
    ops.kv_append(nothing, nothing, kv, torch.zeros(0, dtype=torch.int64, device=device))
    assert bool((kv == 1).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("states", "rows", "dim"), [(1, 9, 16), (2, 9, 16), (7, 9, 15), (3, 0, 8)])
def test_merge(dtype, states, rows, dim, device):
    o = torch.randn(states, rows, 3, dim).to(dtype)
    lse = 4 * torch.randn(states, rows, 3)
    lse[0, :1] = float("-inf")
    o[0, :1] = float("nan")  # a state without keys may hold anything
    lse[:, 5:6] = float("-inf")
    out, out_lse = (x.cpu() for x in ops.merge_states(o.to(device), lse.to(device)))
    weights = (lse.double() - lse.double().logsumexp(0)).exp().nan_to_num(0.0)
    clean = o.double().masked_fill(lse.isneginf()[..., None], 0.0)
    expected = (weights[..., None] * clean).sum(0)
    assert torch.equal(out_lse.isneginf(), lse.isneginf().all(0))
    assert not out[out_lse.isneginf()].any()
    assert torch.allclose(out_lse.double(), lse.double().logsumexp(0), atol=1e-6, rtol=1e-6)
    if dtype == torch.float32:
        assert relative_error(out, expected) < 1e-6
    elif rows > 0:
        assert float(ulps(out, expected).max()) <= 1.0


def bad_calls():
    """Shapes and dtypes, which every device refuses."""
    x, kv = torch.zeros(2, 3, 64), torch.zeros(4, 2, 3, 16, 64)
    lo, hi = rope_tables(inv_freq(64), 2, "cpu")
    slots = torch.zeros(2, dtype=torch.int64)
    positions = torch.zeros(2, dtype=torch.int32)
    o, lse = torch.zeros(2, 1, 3, 16), torch.zeros(2, 1, 3)
    return [
        (ops.rope_apply_, (x.double(), positions, lo, hi), "x: must be float32, bfloat16"),
        (ops.rope_apply_, (x[0], positions, lo, hi), "x: must have 3 dimensions"),
        (ops.rope_apply_, (x, positions.long(), lo, hi), "positions: must be int32"),
        (ops.rope_apply_, (x, positions[:1], lo, hi), r"positions: must be \[2\]"),
        (ops.rope_apply_, (x[..., :32].clone(), positions, lo, hi), "rope_lo: rotary_dim 64 is"),
        (ops.kv_append, (x.half(), x, kv, slots), "k: must be float32, is float16"),
        (ops.kv_append, (x, x[:1], kv, slots), "v: must have as many rows as k"),
        (ops.kv_append, (x[:, :2], x, kv, slots), r"k: must be \[n, 3, 64\]"),
        (ops.kv_append, (x, x, kv, slots[:1]), r"slot_mapping: must be \[2\]"),
        (ops.merge_states, (o, lse[:1]), r"lse: must be \[2, 1, 3\]"),
        (ops.merge_states, (o[:0], lse[:0]), "o: needs at least one state"),
        (ops.merge_states, (o.int(), lse), "o: must be float32"),
    ]


def bad_contents():
    """What only the CPU sees, and ops that are for the CPU."""
    x, kv = torch.zeros(2, 3, 64), torch.zeros(4, 2, 3, 16, 64)
    lo, hi = rope_tables(inv_freq(64), 2, "cpu")
    slots = torch.zeros(2, dtype=torch.int64)
    positions = torch.zeros(2, dtype=torch.int32)
    return [
        (ops.rope_table, (torch.zeros(4), 2, 1), "inv_freq: must be float64, is float32"),
        (ops.rope_table, (inv_freq(8), -1, 1), "n: must not be negative"),
        (ops.rope_table, (inv_freq(8), 1, 0), "stride: must be at least 1"),
        (ops.rope_apply_, (x, positions + 512, lo, hi), r"positions: 512 is outside \[0, 512\)"),
        (ops.rope_apply_, (x, positions - 1, lo, hi), "positions: -1 is outside"),
        (ops.kv_append, (x, x, kv, slots + 64), r"slot_mapping: 64 is outside \[-1, 64\)"),
        (ops.kv_append, (x, x, kv, slots - 2), "slot_mapping: -2 is outside"),
        (ops.kv_pool_layer, (-5, 0), "store: -5 is no open store"),
    ]


@pytest.mark.parametrize(("op", "args", "message"), bad_calls())
def test_refuses(op, args, message, device):
    with pytest.raises(RuntimeError, match=message):
        op(*(x.to(device) for x in args))


@pytest.mark.parametrize(("op", "args", "message"), bad_contents())
def test_refuses_contents(op, args, message):
    with pytest.raises(RuntimeError, match=message):
        op(*args)


def test_pool_layers_tile_the_pool_and_end_with_the_store():
    layout = ca.KvLayout(
        num_layers=3, num_kv_heads=2, head_dim=16, dtype="float32", identity=bytes(32)
    )
    with ca.AttentionStore(ca.StoreConfig(dram="2MiB", block_size=16), layout) as store:
        handle = store._core.handle
        layers = [ops.kv_pool_layer(handle, layer) for layer in range(3)]
        assert layers[0].shape[1:] == (2, 2, 16, 16) and layers[0].shape[0] >= 2
        for value, layer in enumerate(layers):
            layer.fill_(value + 1)  # no layer lies over another
        assert [float(layer.unique()) for layer in layers] == [1.0, 2.0, 3.0]
        assert layers[1].data_ptr() == store.kv[1].data_ptr()
        for layer in (-1, 3):
            with pytest.raises(RuntimeError, match=r"layer: .* is outside \[0, 3\)"):
                ops.kv_pool_layer(handle, layer)
        del layers, layer
    with pytest.raises(RuntimeError, match="is no open store"):
        ops.kv_pool_layer(handle, 0)


def opcheck_samples(device: str) -> dict[str, tuple]:
    case = Case([1, 20], [70, 33], poison=False, sinks=True, device=device)
    k = torch.randn(3, 2, 64, device=device)
    positions = torch.arange(3, dtype=torch.int32, device=device)
    slots = torch.tensor([0, 33, -1], device=device)
    return {
        "rope_table": (inv_freq(64), 4, 256),
        "rope_apply_": (k.clone(), positions, *rope_tables(inv_freq(64), 2, device)),
        "kv_append": (k, k, torch.zeros(3, 2, 2, 16, 64, device=device), slots),
        "attn_plan": (case.cu_q, case.lens, 4, 2, 16, 2),
        "attn_paged": case.args(),
        "merge_states": (
            torch.randn(2, 3, 4, 16, device=device),
            torch.randn(2, 3, 4, device=device),
        ),
    }


@pytest.mark.parametrize("name", list(opcheck_samples("cpu")))
def test_opcheck(name, device):
    sample = opcheck_samples(device)[name]
    torch.library.opcheck(getattr(torch.ops.cachedattn, name).default, sample)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend, device):
    if (backend, device) == ("inductor", "cpu"):
        pytest.skip("slow, and nothing of these ops is compiled for the CPU")
    case = Case([1, 20], [70, 33], poison=False, device=device)
    q, kv, *lengths, plan, longest, lo, hi, scale = case.args()[:10]
    slots = torch.tensor([int(case.block_table[0, 0]) * 16], device=device)

    def layer(q, k, v, kv, plan):
        ops.kv_append(k, v, kv, slots)
        out, _ = ops.attn_paged(q, kv, *lengths, plan, longest, lo, hi, scale)
        return out * 2

    k, v = torch.randn(1, 2, 64, device=device), torch.randn(1, 2, 64, device=device)
    eager_kv, compiled_kv = kv.clone(), kv.clone()
    expected = layer(q, k, v, eager_kv, plan)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    assert torch.equal(compiled(q, k, v, compiled_kv, plan), expected)
    assert torch.equal(compiled_kv, eager_kv) and not torch.equal(eager_kv, kv)
