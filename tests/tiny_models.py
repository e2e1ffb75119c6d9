"""Tiny random models, saved as Hugging Face directories, and engines over them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

import cachedattn as ca

VOCAB = 199
BLOCK = 16

_CLASSES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}


def save_model(
    directory: Path,
    *,
    kind: str = "llama",
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 64,
    layers: int = 3,
    seed: int = 0,
    shard: str = "1GB",
    **config: object,
) -> Path:
    """Writes config.json and model.safetensors of a random model whose logits lie well apart."""
    make_config, make_model = _CLASSES[kind]
    torch.manual_seed(seed)
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "eos_token_id": VOCAB - 1,
        "bos_token_id": VOCAB - 2,
    }
    model = make_model(make_config(**{**fields, **config}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(directory, max_shard_size=shard)
    return directory


def reference_model(directory: Path) -> torch.nn.Module:
    """The same model in Transformers, float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def random_ids(count: int, seed: int = 0) -> list[int]:
    """Token ids that are not special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB - 2, (count,), generator=generator).tolist()


def open_engine(
    directory: Path, store: ca.AttentionStore | ca.StoreConfig | None = None, **options: object
) -> ca.Engine:
    """An engine in float32 unless `options` say otherwise."""
    return ca.Engine.from_pretrained(directory, store=store, **{"dtype": "float32", **options})


def run(engine: ca.Engine, ids: list[int], max_tokens: int = 8) -> tuple[ca.Reply, torch.Tensor]:
    """One greedy turn and the logits [tokens, vocab] that its tokens were chosen from."""
    chosen: list[torch.Tensor] = []

    def keep_last(request: ca.Request, first: int, logits: torch.Tensor) -> None:
        if first + len(logits) == len(request.tokens):
            chosen.append(logits[-1])

    sampling = ca.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    request = engine.add_request(ids, sampling, on_logits=keep_last)
    while not request.finished:
        engine.step()
    return request.reply(), torch.stack(chosen)
