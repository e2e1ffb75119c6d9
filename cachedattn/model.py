"""CausalLM: a Llama-family decoder over a mixed batch of prefill, extend and decode rows."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch.nn import functional

from cachedattn.batch import Batch
from cachedattn.config import ModelConfig
from cachedattn.layers import Linear, LmHead, RmsNorm, float32_is_faster, silu_and_mul
from cachedattn.rope import rope_tables


class DecoderLayer:
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(
        self, config: ModelConfig, weights: WeightReader, index: int, tables: RopeTables
    ) -> None:
        self.config = config
        self.index = index
        self.tables = tables
        prefix = f"model.layers.{index}."
        hidden, inner = config.hidden_size, config.intermediate_size
        self.q_size = config.num_heads * config.head_dim
        self.kv_size = config.num_kv_heads * config.head_dim
        self.input_norm = weights.norm(prefix + "input_layernorm", hidden, config.rms_eps)
        self.post_norm = weights.norm(prefix + "post_attention_layernorm", hidden, config.rms_eps)
        sizes = (self.q_size, self.kv_size, self.kv_size)
        names = [prefix + f"self_attn.{name}_proj" for name in "qkv"]
        self.qkv = weights.linear(names, sizes, hidden)
        self.o = weights.linear([prefix + "self_attn.o_proj"], (hidden,), self.q_size)
        names = [prefix + f"mlp.{name}_proj" for name in ("gate", "up")]
        self.gate_up = weights.linear(names, (inner, inner), hidden)
        self.down = weights.linear([prefix + "mlp.down_proj"], (hidden,), inner)

    def __call__(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Adds to x, float32 [Tq, hidden]."""
        batch.wait_layer(self.index)
        x += self.attention(self.input_norm(x), batch)
        x += self.down(silu_and_mul(self.gate_up(self.post_norm(x))))
        batch.layer_done(self.index)
        return x

    def attention(self, x: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Appends the rows' K and V, then attends over the whole context."""
        config, tables = self.config, self.tables
        qkv = self.qkv(x).view(x.shape[0], -1, config.head_dim)
        q, k, v = qkv.split((config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1)
        kv = batch.kv[self.index]
        torch.ops.cachedattn.kv_append(k, v, kv, batch.slot_mapping)
        out, _ = torch.ops.cachedattn.attn_paged(
            q,
            kv,
            batch.block_table,
            batch.kv_lens,
            batch.cu_q,
            batch.plan,
            batch.max_q_len,
            tables.lo,
            tables.hi,
            tables.sm_scale,
            interleaved=config.rope.interleaved,
            window=config.sliding_window,
        )
        return self.o(out.view(x.shape[0], self.q_size))


class CausalLM:
    """The whole model, on the device where `weights` are. They are named as in Transformers'
    LlamaForCausalLM and are used up: each leaves the dict as it is taken, so that packing needs no
    second copy of the model.

    ValueError: a weight is missing or has another shape than the configuration says.
    """

    def __init__(
        self, config: ModelConfig, weights: dict[str, torch.Tensor], max_positions: int
    ) -> None:
        self.config = config
        reader = WeightReader(weights)
        vocab, hidden = config.vocab_size, config.hidden_size
        self.embedding = reader.take("model.embed_tokens.weight", (vocab, hidden))
        self.dtype = self.embedding.dtype
        self.device = self.embedding.device
        tables = RopeTables(config, max_positions, self.device)
        self.layers = [
            DecoderLayer(config, reader, index, tables) for index in range(config.num_layers)
        ]
        self.norm = reader.norm("model.norm", hidden, config.rms_eps)
        head = self.embedding
        if not config.tied_embeddings:
            head = reader.take("lm_head.weight", (vocab, hidden))
        self.lm_head = LmHead(head)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits, float32 [len(logit_rows), vocab], on the model's device. On CUDA nothing here
        waits for the device."""
        batch.move_to(self.device)
        # The sum of all layers' outputs is kept in float32: in bf16 its rounding is the largest
        # error of the model.
        x = functional.embedding(batch.token_ids, self.embedding).float()
        for layer in self.layers:
            x = layer(x, batch)
        return self.lm_head(self.norm(x[batch.logit_rows]))

    def pool_bytes(self, max_step_tokens: int) -> int:
        """Memory of a CUDA device for a pool of KV: nine tenths of what is free, less what a step
        takes at most. ValueError: nothing."""
        config, size = self.config, self.dtype.itemsize
        # A row's results, each once, the residual stream in float32; then its logits twice, and
        # attention's splits: o, m and l of up to 32.
        row = (8 + 4 * size) * config.hidden_size + 4 * size * config.intermediate_size
        row += 4 * size * config.num_heads * config.head_dim + (4 + size) * config.vocab_size
        row += 32 * config.num_heads * (config.head_dim + 2) * 4
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(self.device)[0]
        num_bytes = free * 9 // 10 - max_step_tokens * row
        if num_bytes <= 0:
            raise ValueError(
                f"beside the weights {free >> 20} MiB of {self.device} are free: too few for steps "
                f"of max_step_tokens {max_step_tokens}"
            )
        return num_bytes


class RopeTables:
    """What attention needs to turn q and k by their positions."""

    def __init__(self, config: ModelConfig, max_positions: int, device: torch.device) -> None:
        self.lo, self.hi = (table.to(device) for table in rope_tables(config.rope, max_positions))
        # yarn scales q and k alike, so their product by the square.
        self.sm_scale = config.head_dim**-0.5 * config.rope.attention_factor**2


class WeightReader:
    """Takes weights out of a dict by name, checking shapes."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights
        # float32 copies double the speed of prefill on some CPUs, for twice the bf16 memory.
        num_bytes = 4 * sum(weight.numel() for weight in weights.values())
        is_bf16 = any(w.is_cpu and w.dtype == torch.bfloat16 for w in weights.values())
        fits = num_bytes < _physical_memory() // 8
        self.widen = is_bf16 and fits and float32_is_faster()

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The weight `name`. ValueError: missing, or of another shape."""
        weight = self.weights.pop(name, None)
        if weight is None:
            raise ValueError(f"the checkpoint has no weight {name}")
        if weight.shape != shape:
            raise ValueError(f"weight {name} has shape {tuple(weight.shape)}, expected {shape}")
        return weight

    def norm(self, name: str, size: int, eps: float) -> RmsNorm:
        """The norm `name`."""
        return RmsNorm(self.take(f"{name}.weight", (size,)), eps)

    def linear(self, names: Sequence[str], out_sizes: Sequence[int], in_size: int) -> Linear:
        """The linears `names` over one input, fused into one; their biases, if any."""
        sizes = list(zip(names, out_sizes, strict=True))
        weight = torch.cat([self.take(f"{name}.weight", (size, in_size)) for name, size in sizes])
        if not any(f"{name}.bias" in self.weights for name in names):
            return Linear(weight, widen=self.widen)
        bias = [self.take(f"{name}.bias", (size,)) for name, size in sizes]
        return Linear(weight, torch.cat(bias), widen=self.widen)


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
