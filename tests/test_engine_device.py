"""What can be told of the engine on CUDA without a GPU: nothing of a step mixes devices or reads
from the device, and padded decode steps compute what unpadded ones do.

For the first, the steps of an engine on the CPU are given to the same model on torch's `meta`
device, which has shapes and no contents. For the second, graphs are closures and the CPU computes.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from random_model import (
    BLOCK,
    make_config,
    make_engine,
    make_layout,
    make_model,
    random_ids,
    run_all,
)
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cachedattn as ca
from cachedattn import graphs, ops
from cachedattn.batch import Batch, pack, unpack
from cachedattn.graphs import PLAN_HEADER, PLAN_ITEM, DecodeGraphs
from cachedattn.sampling import Sampler, choose

DEVICE_POOL = ca.StoreConfig(dram="64MiB", device="32MiB", block_size=BLOCK)
LENGTHS = (300, 40, 7, 130, 65)


class OneDevice(TorchDispatchMode):
    """Refuses operators over tensors of two devices, but for copies to `meta`, which it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.uploads = 0
        self.attended = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        before = {t.device.type for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        after = {t.device.type for t in tree_leaves(result) if torch.is_tensor(t)}
        if name in ("to", "_to_copy", "copy_") and before | after == {"cpu", "meta"}:
            self.uploads += 1
            assert after == {"meta"}
        else:
            assert len(before | after) < 2, f"{func} mixes devices"
        self.attended += name == "attn_paged"
        return result


def on_meta(batch: Batch) -> Batch:
    """The same rows over a pool on the `meta` device."""
    pool = [torch.empty_like(kv, device="meta") for kv in batch.kv]
    return dataclasses.replace(batch, kv=pool, loads=[], saves=[])


def capture_on_cpu(compute, pool, device):
    """As `graphs.capture`."""
    result = compute()

    @torch.inference_mode()
    def replay() -> None:
        result.copy_(compute())

    return replay, result, pool


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_stays_on_its_device_after_one_copy(dtype, monkeypatch):
    monkeypatch.setattr(graphs, "capture", capture_on_cpu)
    config = make_config()
    engine = make_engine(make_model(config, dtype=dtype), DEVICE_POOL, max_step_tokens=64)
    model = make_model(config, "meta", dtype)
    decode = DecodeGraphs(model, 32)
    kinds: set[str] = set()
    compute = engine.model.forward

    def forward(batch: Batch) -> torch.Tensor:
        lengths = batch.cu_q.diff()
        kinds.update(["decode"] * bool((lengths == 1).any()), ["prefill"] * bool(lengths.max() > 1))
        kinds.update(["mixed"] if len(set(lengths.tolist())) > 1 else [])
        logits = compute(batch)
        copies = []
        for way in (model.forward, decode.forward, decode.forward):  # again: captured by then
            rows, mode = on_meta(batch), OneDevice()
            with mode:
                got = way(rows)
            copies.append(mode.uploads)
            assert mode.attended >= config.num_layers
            assert got.device.type == "meta"
            assert (got.shape, got.dtype) == (logits.shape, logits.dtype)
        assert copies[0] == copies[2] == 1
        return logits

    engine.model.forward = forward
    with engine:
        prompts = [random_ids(length, seed=length) for length in LENGTHS]
        run_all(engine, prompts[:2], 3)
        run_all(engine, [prompt + random_ids(20) for prompt in prompts], 5)  # extend
    assert kinds == {"decode", "prefill", "mixed"}


def test_the_check_sees_what_it_is_for():
    x, index = torch.zeros(3, 4, device="meta"), torch.zeros(2, dtype=torch.int64)
    with OneDevice():
        with pytest.raises(AssertionError, match="mixes devices"):
            x.index_select(0, index)
        for wait in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu):
            with pytest.raises((RuntimeError, NotImplementedError)):
                wait(x[0, 0])


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """Graphs as closures; attention on the CPU, which takes neither rows without a sequence nor
    items that are padding."""
    monkeypatch.setattr(graphs, "capture", capture_on_cpu)
    attend = torch.ops.cachedattn.attn_paged
    workers = torch.get_num_threads()

    def attn_paged(q, kv, table, kv_lens, cu_q, plan, *rest, **options):
        num_rows = int(cu_q[-1])
        exact = ops.attn_plan(cu_q, kv_lens, q.shape[1], kv.shape[2], kv.shape[3], workers)
        if rest[0] == 1:  # max_q_len
            assert torch.equal(plan[2 : len(exact)], exact[2:]) and not plan[len(exact) :].any()
        out, lse = attend(q[:num_rows], kv, table, kv_lens, cu_q, exact, *rest, **options)
        more = q.shape[0] - num_rows
        return functional.pad(out, (0, 0, 0, 0, 0, more), value=float("nan")), lse

    monkeypatch.setattr(torch.ops.cachedattn, "attn_paged", attn_paged)


def two_turns(engine: ca.Engine) -> list[list[int]]:
    """Answers of turns side by side, then of later ones, whose history comes from DRAM."""
    prompts = [random_ids(length, seed=length) for length in LENGTHS]
    with engine:
        answers = run_all(engine, prompts, 40)
        engine.store.flush()
        engine.store.drop_tier("device")
        turns = [[*ids, *out, 3, 4] for ids, out in zip(prompts, answers, strict=True)]
        answers += run_all(engine, turns, 20)
        found = engine.store.stats()["tokens_from"]["dram"]
    assert found >= sum(len(turn) - BLOCK for turn in turns)
    return answers


def test_decode_by_graphs_gives_the_same_tokens(graphs_on_cpu):
    model = make_model(make_config())
    want = two_turns(make_engine(model, DEVICE_POOL, max_step_tokens=100))
    engine = make_engine(model, DEVICE_POOL, max_step_tokens=100)
    engine.runner = DecodeGraphs(model, 512 // BLOCK)
    assert two_turns(engine) == want
    rows, words = zip(*engine.runner._graphs, strict=True)
    assert set(rows) >= {4, 8} and all(count & (count - 1) == 0 for count in rows)
    assert len(set(words)) > 1


def test_steps_that_are_not_decode_have_no_graph(graphs_on_cpu):
    model = make_model(make_config(layers=1))
    with make_engine(model, DEVICE_POOL) as engine:
        decode = engine.runner = DecodeGraphs(model, 512 // BLOCK)
        run_all(engine, [random_ids(50)], 1)
        assert not decode._graphs
        run_all(engine, [random_ids(50)], 2)
        assert list(decode._graphs) == [(1, PLAN_HEADER + PLAN_ITEM)]


def test_a_plan_has_the_words_that_graphs_count_on():
    def words(kv_lens: list[int]) -> int:
        cu_q = torch.arange(len(kv_lens) + 1, dtype=torch.int32)
        lengths = torch.tensor(kv_lens, dtype=torch.int32)
        return ops.attn_plan(cu_q, lengths, 4, 2, 16, 2).numel()

    assert words([]) == PLAN_HEADER
    assert words([1, 1, 1]) == PLAN_HEADER + 3 * PLAN_ITEM


def test_packed_tensors_come_out_as_they_went_in():
    tensors = [
        torch.arange(5),
        torch.arange(3, dtype=torch.int32),
        torch.empty(0, dtype=torch.int64),
        -torch.arange(6, dtype=torch.int32).view(2, 3),
        torch.tensor([2**40]),
    ]
    packed = pack(tensors)
    assert packed.shape == (5 + 2 + 0 + 3 + 1,)
    for got, want in zip(unpack(packed, tensors), tensors, strict=True):
        assert torch.equal(got, want) and got.dtype == want.dtype


def test_tokens_are_chosen_for_each_row():
    logits = torch.randn(3, 50)
    params = (ca.SamplingParams(), ca.SamplingParams(temperature=1.0, seed=3), ca.SamplingParams())
    want = [Sampler(param)(row) for param, row in zip(params, logits, strict=True)]
    rows = [(Sampler(param), row) for param, row in zip(params, logits, strict=True)]
    assert choose(rows) == want
    assert choose([]) == []


@pytest.mark.parametrize(
    ("device", "has_cuda", "message"),
    [
        ("tpu", True, "device must be 'cpu', 'cuda' or 'cuda:N', not 'tpu'"),
        ("cuda:x", True, "device must be 'cpu', 'cuda' or 'cuda:N', not 'cuda:x'"),
        ("cuda", False, "device 'cuda': this build of cachedattn has no CUDA kernels"),
        ("cuda:1", True, "device 'cuda:1': torch .* sees no NVIDIA GPU here"),
    ],
)
def test_a_device_that_is_not_there_is_refused(device, has_cuda, message, monkeypatch):
    monkeypatch.setattr(ops, "has_cuda", lambda: has_cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        ca.AttentionStore(ca.StoreConfig(), make_layout(make_config()), device=device)
    with pytest.raises(ValueError, match=message):
        ca.Engine.from_pretrained("no such file", device=device)


def test_model_and_store_are_on_one_device():
    config = make_config(layers=1)
    store = ca.AttentionStore(DEVICE_POOL, make_layout(config))
    with store, pytest.raises(ValueError, match="the store is on cpu, the model on meta"):
        ca.Engine(make_model(config, "meta"), None, store, max_model_len=512)
