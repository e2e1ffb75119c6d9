"""The models that benchmarks of the engine run: random weights of real shapes, or a file's."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cachedattn.config import KvLayout, ModelConfig, RopeConfig
from cachedattn.engine import Engine
from cachedattn.model import CausalLM

# hidden, intermediate, layers, heads, KV heads, vocabulary: random weights of real shapes.
SHAPES = {
    "llama-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama-70b-8-layers": (8192, 28672, 8, 64, 8, 32000),
    "tiny": (256, 512, 4, 4, 2, 2000),
}


def random_model(shape: str, window: int, dtype: str, device: str) -> CausalLM:
    """Made where it computes: no file, and no copy to there."""
    hidden, inner, layers, heads, kv_heads, vocab = SHAPES[shape]
    head_dim = hidden // heads
    config = ModelConfig(
        architecture="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_eps=1e-5,
        max_positions=window,
        rope=RopeConfig(rotary_dim=head_dim),
    )
    torch.manual_seed(0)

    def weight(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=getattr(torch, dtype), device=device) * 0.02

    names = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    weights = {"model.embed_tokens.weight": weight(vocab, hidden)}
    weights |= {"lm_head.weight": weight(vocab, hidden), "model.norm.weight": weight(hidden) + 1}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, rows in names.items():
            weights[f"{prefix}self_attn.{name}_proj.weight"] = weight(rows, hidden)
        weights[f"{prefix}self_attn.o_proj.weight"] = weight(hidden, heads * head_dim)
        for name in ("gate", "up"):
            weights[f"{prefix}mlp.{name}_proj.weight"] = weight(inner, hidden)
        weights[f"{prefix}mlp.down_proj.weight"] = weight(hidden, inner)
        for name in ("input", "post_attention"):
            weights[f"{prefix}{name}_layernorm.weight"] = weight(hidden) + 1
    return CausalLM(config, weights, window)


def layout_of(model: CausalLM, dtype: str) -> KvLayout:
    """Of a model that has no file to take the identity from."""
    config = model.config
    identity = bytes(31) + b"\1"
    return KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, dtype, identity)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `load_model` reads."""
    add = parser.add_argument
    add("--model", type=Path, help="Hugging Face directory or GGUF file (default: the demo's)")
    add("--shape", choices=SHAPES, help="random weights of this shape instead")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--dtype", default="bfloat16")
    add("--threads", type=int, help="of the CPU")


def load_model(args: argparse.Namespace, window: int) -> tuple[CausalLM, KvLayout, str]:
    """The model for contexts of `window` tokens, the layout of its KV, and its name."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.shape:
        model = random_model(args.shape, window, args.dtype, args.device)
        return model, layout_of(model, args.dtype), f"{args.shape}, random weights"
    from cachedattn.cli_common import find_model  # a GPU machine may lack what it imports

    path = find_model(args.model)
    on = {} if args.device == "cpu" else {"device": args.device}
    with Engine.from_pretrained(path, dtype=args.dtype, max_model_len=window, **on) as engine:
        return engine.model, engine.store.layout, path.stem
