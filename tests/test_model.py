"""The decoder against Transformers' own, float32."""

import dataclasses

import pytest
import torch
from tiny_models import open_engine, random_ids, reference_model, run, save_model

import cachedattn as ca
from cachedattn.checkpoint import load_checkpoint
from cachedattn.config import RopeConfig
from cachedattn.engine import Engine
from cachedattn.layers import Linear, LmHead
from cachedattn.model import CausalLM
from cachedattn.rope import inverse_frequencies

TOLERANCE = 1e-4  # of a logit

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.5}

MODELS = {
    "mha-64": {"heads": 4, "kv_heads": 4, "head_dim": 64},
    "gqa3-64-tied": {"heads": 6, "kv_heads": 2, "head_dim": 64, "tie_word_embeddings": True},
    "gqa4-80": {"heads": 4, "kv_heads": 1, "head_dim": 80},
    "gqa4-128": {"heads": 8, "kv_heads": 2, "head_dim": 128},
    "attention-bias": {"attention_bias": True},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": LINEAR},
    "yarn": {"rope_parameters": YARN},
    "mistral-window": {"kind": "mistral", "sliding_window": 24},
    "qwen2-bias": {"kind": "qwen2"},
}


def all_logits(engine: ca.Engine, ids: list[int]) -> torch.Tensor:
    """Logits [len(ids), vocab] of every position."""
    seen: list[torch.Tensor] = []
    request = engine.add_request(
        ids, ca.SamplingParams(max_tokens=1), on_logits=lambda _, first, logits: seen.append(logits)
    )
    while not request.finished:
        engine.step()
    return torch.cat(seen)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name, tmp_path):
    path = save_model(tmp_path, **MODELS[name])
    ids = random_ids(150)
    with torch.no_grad():
        expected = reference_model(path)(torch.tensor([ids])).logits[0]
    assert expected.std() > 0.5  # the comparison means something
    with open_engine(path, max_step_tokens=64) as engine:  # three chunks
        got = all_logits(engine, ids)
    assert (got - expected).abs().max() < TOLERANCE


def test_greedy_tokens_equal_transformers(tmp_path):
    path = save_model(tmp_path)
    ids = random_ids(40)
    model = reference_model(path)
    expected = list(ids)
    with torch.no_grad():
        for _ in range(12):
            expected.append(int(model(torch.tensor([expected])).logits[0, -1].argmax()))
    with open_engine(path) as engine:
        reply, _ = run(engine, ids, max_tokens=12)
    assert reply.token_ids == expected[len(ids) :]


def test_bfloat16_is_as_near_as_transformers(tmp_path):
    path = save_model(tmp_path)
    ids = random_ids(100)
    model = reference_model(path)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
        theirs = model.bfloat16()(torch.tensor([ids])).logits[0].float()
    with open_engine(path, dtype="bfloat16") as engine:
        got = all_logits(engine, ids)
    assert (got - expected).pow(2).mean() <= (theirs - expected).pow(2).mean()


def test_interleaved_pairs_give_the_same_logits(tmp_path):
    """q and k rows put in pair order, rotated as neighbours: the same products."""
    path = save_model(tmp_path)
    ids = random_ids(100)
    with open_engine(path) as engine:
        expected = all_logits(engine, ids)
    checkpoint = load_checkpoint(path, "float32")
    for name, weight in checkpoint.weights.items():
        if "q_proj" in name or "k_proj" in name:
            halves = weight.view(-1, 2, checkpoint.config.head_dim // 2, weight.shape[-1])
            checkpoint.weights[name] = halves.transpose(1, 2).reshape(weight.shape)
    rope = dataclasses.replace(checkpoint.config.rope, interleaved=True)
    config = dataclasses.replace(checkpoint.config, rope=rope)
    model = CausalLM(config, checkpoint.weights, 512)
    store = ca.AttentionStore(ca.StoreConfig(dram="16MiB"), checkpoint.kv_layout())
    with store, Engine(model, None, store, max_model_len=512) as engine:
        got = all_logits(engine, ids)
    assert (got - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("parameters", [LLAMA3, YARN, LINEAR], ids=lambda p: p["rope_type"])
def test_frequencies_equal_transformers(parameters, tmp_path):
    path = save_model(tmp_path, layers=1, rope_parameters=parameters)
    rotary = reference_model(path).model.rotary_emb
    rope = load_checkpoint(path).config.rope
    assert torch.allclose(inverse_frequencies(rope).float(), rotary.inv_freq, rtol=1e-6)
    assert rope.attention_factor == pytest.approx(rotary.attention_scaling)


def test_frequency_factors_divide():
    rope = RopeConfig(rotary_dim=4, freq_factors=(1.0, 8.0))
    plain = inverse_frequencies(RopeConfig(rotary_dim=4))
    assert torch.equal(inverse_frequencies(rope), plain / torch.tensor([1.0, 8.0]))


def test_packed_linear_equals_plain():
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 64).bfloat16(), torch.randn(48).bfloat16()
    linear = Linear(weight.clone(), bias)
    for rows in (1, 7, 64):
        x = torch.randn(rows, 64).bfloat16()
        expected = x.double() @ weight.double().T + bias.double()
        assert (linear(x) - expected).abs().max() < expected.abs().max() / 128


def test_the_likeliest_logits_are_exact():
    torch.manual_seed(0)
    weight, x = torch.randn(500, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    exact = x.double() @ weight.double().T
    logits = LmHead(weight)(x)
    top = logits.topk(4).indices
    assert (logits.gather(1, top) - exact.gather(1, top)).abs().max() < 1e-4
    assert (logits - exact).abs().max() > 1e-4  # rounding is there to be undone


def test_missing_and_misshapen_weights_are_named(tmp_path):
    checkpoint = load_checkpoint(save_model(tmp_path), "float32")
    weights = dict(checkpoint.weights)
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"no weight model\.layers\.1\.mlp\.up_proj\.weight"):
        CausalLM(checkpoint.config, weights, 512)
    weights = dict(checkpoint.weights)
    weights["model.norm.weight"] = torch.ones(5)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(5,\)"):
        CausalLM(checkpoint.config, weights, 512)
