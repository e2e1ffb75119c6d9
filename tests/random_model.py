"""Random decoders made in place: no file, and no package beside torch. For machines with a GPU."""

from __future__ import annotations

import torch

import cachedattn as ca
from cachedattn.config import ModelConfig, RopeConfig
from cachedattn.model import CausalLM

VOCAB = 199
BLOCK = 16
HIDDEN, INNER = 96, 160


def make_config(
    heads: int = 6, kv_heads: int = 2, head_dim: int = 64, layers: int = 3
) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_eps=1e-6,
        max_positions=1024,
        rope=RopeConfig(rotary_dim=head_dim),
        eos_token_ids=(VOCAB - 1,),
    )


def make_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """float32 on the CPU, the same for the same config. Logits lie well apart."""
    generator = torch.Generator().manual_seed(0)
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    names = {
        f"model.layers.{index}.{name}": shape
        for index in range(config.num_layers)
        for name, shape in shapes.items()
    }
    vocab = (config.vocab_size, hidden)
    names |= {"model.norm": (hidden,), "model.embed_tokens": vocab, "lm_head": vocab}
    return {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.15 + (len(shape) == 1)
        for name, shape in names.items()
    }


def make_model(
    config: ModelConfig, device: str | torch.device = "cpu", dtype: str = "float32"
) -> CausalLM:
    place = {"device": device, "dtype": getattr(torch, dtype)}
    weights = {name: weight.to(**place) for name, weight in make_weights(config).items()}
    return CausalLM(config, weights, config.max_positions)


def make_layout(config: ModelConfig, dtype: str = "float32") -> ca.KvLayout:
    shape = config.num_layers, config.num_kv_heads, config.head_dim
    return ca.KvLayout(*shape, dtype=dtype, identity=bytes(32), model_name="random")


def make_engine(model: CausalLM, store: ca.StoreConfig, **options: object) -> ca.Engine:
    """On the model's device; the engine closes its store."""
    layout = make_layout(model.config, str(model.dtype).removeprefix("torch."))
    opened = ca.AttentionStore(store, layout, device=model.device)
    options = {"max_model_len": 512, "owns_store": True, **options}
    return ca.Engine(model, None, opened, **options)


def random_ids(count: int, seed: int = 0) -> list[int]:
    """Token ids that do not end an answer."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB - 2, (count,), generator=generator).tolist()


def greedy(max_tokens: int) -> ca.SamplingParams:
    return ca.SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def run(engine: ca.Engine, ids: list[int], max_tokens: int = 8) -> tuple[ca.Reply, torch.Tensor]:
    """One greedy turn and the logits [tokens, vocab] that its tokens were chosen from."""
    chosen: list[torch.Tensor] = []

    def keep_last(request: ca.Request, first: int, logits: torch.Tensor) -> None:
        assert torch.isfinite(logits).all()
        if first + len(logits) == len(request.tokens):
            chosen.append(logits[-1].clone())

    request = engine.add_request(ids, greedy(max_tokens), on_logits=keep_last)
    while not request.finished:
        engine.step()
    return request.reply(), torch.stack(chosen)


def run_all(engine: ca.Engine, prompts: list[list[int]], max_tokens: int = 8) -> list[list[int]]:
    """The answers of turns that run side by side."""
    requests = [engine.add_request(prompt, greedy(max_tokens)) for prompt in prompts]
    while not all(request.finished for request in requests):
        engine.step()
        engine.store.check_invariants()
    return [request.output_ids for request in requests]
