"""GGUF files: metadata, weights under Transformers' names, and the tokenizer they carry.

The format is the one of the `gguf` package (github.com/ggml-org/ggml, docs/gguf.md), which also
dequantises the less common types; reading is done here because the metadata's hundred thousand
strings take that package seconds.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cachedattn.config import ModelConfig, RopeConfig, check_choice
from cachedattn.rope import yarn_attention_factor
from cachedattn.tokenizer import Tokenizer

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_STRING, _ARRAY = 8, 9
_CONTROL, _USER_DEFINED = 3, 4  # token types

# Names in a layer, and at the top: theirs -> ours.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

# How text is split before the merges, by the file's name for it.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    "smollm": "digits",
    "default": "gpt2",
    "gpt-2": "gpt2",
    "llama-bpe": _WORDS % "{1,3}",
    "qwen2": _WORDS % "",
}


class GgufFile:
    """A mapped file. `metadata` holds plain Python values, `tensors` name -> (shape, type,
    bytes); shapes are [out, in]. ValueError: not a GGUF file, or cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8 or head[:4] != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file")
            version = struct.unpack_from("<I", head, 4)[0]
            if version not in (2, 3):
                raise ValueError(f"{path} is GGUF version {version}; versions 2 and 3 are known")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 8
        try:
            num_tensors, num_values = self._scalar("Q"), self._scalar("Q")
            self.metadata = {self._string(): self._value() for _ in range(num_values)}
            infos = [self._tensor_info() for _ in range(num_tensors)]
        except (struct.error, UnicodeDecodeError, KeyError, IndexError) as error:
            raise ValueError(f"{path}: damaged or cut short ({error})") from None
        alignment = int(self.metadata.get("general.alignment", 32))
        start = -(-self._at // alignment) * alignment
        self.tensors: dict[str, tuple[tuple[int, ...], int, np.ndarray]] = {}
        raw = np.frombuffer(self._map, np.uint8)
        starts = sorted(info[3] for info in infos)
        ends = dict(zip(starts, [*starts[1:], len(raw) - start], strict=True))
        for name, shape, kind, offset in infos:
            if start + offset >= len(raw):
                raise ValueError(f"{path}: cut short, tensor {name} lies past the end")
            data = raw[start + offset : start + ends[offset]]
            self.tensors[name] = (shape, kind, data)

    def _scalar(self, code: str) -> Any:
        value = struct.unpack_from("<" + code, self._map, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        end = self._at + length
        if end > len(self._map):
            raise IndexError("a string runs past the end")
        text = self._map[self._at : end].decode("utf-8")
        self._at = end
        return text

    def _value(self) -> Any:
        return self._typed(self._scalar("I"))

    def _typed(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        item, count = self._scalar("I"), self._scalar("Q")
        if item in (_STRING, _ARRAY):
            return [self._typed(item) for _ in range(count)]
        values = struct.unpack_from(f"<{count}{_SCALARS[item]}", self._map, self._at)
        self._at += struct.calcsize(f"<{count}{_SCALARS[item]}")
        return list(values)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._scalar("I")
        shape = tuple(self._scalar("Q") for _ in range(num_dims))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def weight(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor `name`, dequantised. ValueError: an unsupported type."""
        shape, kind, data = self.tensors[name]
        return dequantize(name, shape, kind, data).to(dtype)


def dequantize(name: str, shape: tuple[int, ...], kind: int, data: np.ndarray) -> torch.Tensor:
    """Values of a tensor stored as ggml type `kind`: float32, or its own 16-bit float type."""
    count = math.prod(shape)
    plain = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}.get(kind)
    block_bytes = {3: 20, 8: 34}.get(kind)
    try:
        if plain is not None:
            raw = torch.from_numpy(data[: count * plain.itemsize].copy())
            return raw.view(plain).view(shape)
        if block_bytes is None:
            return _dequantize_other(name, shape, kind, data)
        raw = torch.from_numpy(data[: count // 32 * block_bytes].copy()).view(-1, block_bytes)
        out = (_q4_1 if kind == 3 else _q8_0)(raw)
        return out.view(shape)
    except RuntimeError:
        raise ValueError(f"tensor {name}: the file holds fewer bytes than its shape says") from None


def _q4_1(raw: torch.Tensor) -> torch.Tensor:
    """Blocks of scale, minimum (f16) and 16 bytes; low nibbles are the first 16 values."""
    scale, minimum = raw[:, :4].contiguous().view(torch.float16).float().unsqueeze(-1).unbind(1)
    nibbles = raw[:, 4:].contiguous()
    values = torch.cat([nibbles & 15, nibbles >> 4], dim=1)
    return values.float().mul_(scale).add_(minimum)


def _q8_0(raw: torch.Tensor) -> torch.Tensor:
    """Blocks of a scale (f16) and 32 signed bytes."""
    scale = raw[:, :2].contiguous().view(torch.float16).float()
    return raw[:, 2:].view(torch.int8) * scale


def _dequantize_other(
    name: str, shape: tuple[int, ...], kind: int, data: np.ndarray
) -> torch.Tensor:
    import gguf

    try:
        quantization = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[quantization]
        rows = data[: math.prod(shape) // block * size].reshape(*shape[:-1], -1)
        return torch.from_numpy(gguf.quants.dequantize(rows, quantization))
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"tensor {name}: unsupported GGUF type {kind} ({error})") from None


def model_config(file: GgufFile) -> ModelConfig:
    """The model's configuration. ValueError: an architecture that is not Llama's or Qwen2's."""
    meta = file.metadata
    arch = meta.get("general.architecture")
    check_choice(f"{file.path.name}: architecture", arch, ("llama", "qwen2"))

    def get(name: str, default: Any = None) -> Any:
        value = meta.get(f"{arch}.{name}", default)
        if value is None:
            raise ValueError(f"{file.path.name}: metadata lacks {arch}.{name}")
        return value

    if get("expert_count", 0):
        raise ValueError(f"{file.path.name}: mixture-of-experts models are not supported")
    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", hidden // heads)
    eos = {meta.get("tokenizer.ggml.eos_token_id"), meta.get("tokenizer.ggml.eot_token_id")}
    return ModelConfig(
        architecture=arch,
        vocab_size=file.tensors["token_embd.weight"][0][0],
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length"),
        num_layers=get("block_count"),
        num_heads=heads,
        num_kv_heads=get("attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_eps=get("attention.layer_norm_rms_epsilon"),
        max_positions=get("context_length"),
        rope=_rope_config(file, get, head_dim),
        tied_embeddings="output.weight" not in file.tensors,
        eos_token_ids=tuple(sorted(token for token in eos if token is not None)),
    )


def _rope_config(file: GgufFile, get: Callable[..., Any], head_dim: int) -> RopeConfig:
    scaling = get("rope.scaling.type", "none")
    check_choice(f"{file.path.name}: rope.scaling.type", scaling, ("none", "linear", "yarn"))
    factor = get("rope.scaling.factor", 1.0)
    freq_factors: tuple[float, ...] = ()
    if "rope_freqs.weight" in file.tensors:
        freq_factors = tuple(file.weight("rope_freqs.weight", torch.float64).tolist())
    return RopeConfig(
        theta=get("rope.freq_base", 10000.0),
        rotary_dim=get("rope.dimension_count", head_dim),
        scaling="default" if scaling == "none" else scaling,
        factor=factor,
        original_max_positions=get("rope.scaling.original_context_length", 0),
        attention_factor=yarn_attention_factor(factor) if scaling == "yarn" else 1.0,
        freq_factors=freq_factors,
    )


def weights(
    file: GgufFile, config: ModelConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under Transformers' name."""
    for name in file.tensors:
        if name == "rope_freqs.weight":
            continue
        weight = file.weight(name, dtype)
        if name in _TOP_NAMES:
            yield _TOP_NAMES[name], weight
            continue
        parts = name.split(".")
        if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _LAYER_NAMES:
            raise ValueError(f"{file.path.name}: unknown tensor {name}")
        if config.architecture == "llama" and parts[2] in ("attn_q", "attn_k"):
            weight = _unpermute(weight, config.head_dim)
        yield f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}", weight


def _unpermute(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """llama.cpp stores q and k rows so that rotary pairs are neighbours; back to half-split."""
    split = weight.view(-1, head_dim // 2, 2, *weight.shape[1:])
    return split.transpose(1, 2).reshape(weight.shape)


def tokenizer(file: GgufFile) -> Tokenizer | None:
    """The byte-level BPE tokenizer in the file; None without one. ValueError: another kind."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    meta = file.metadata
    kind = meta.get("tokenizer.ggml.model")
    if kind is None:
        return None
    check_choice(f"{file.path.name}: tokenizer.ggml.model", kind, ("gpt2",))
    pre = meta.get("tokenizer.ggml.pre", "default")
    check_choice(f"{file.path.name}: tokenizer.ggml.pre", pre, tuple(_PRE_TOKENIZERS))
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    backend = tokenizers.Tokenizer(bpe)
    split = _PRE_TOKENIZERS[pre]
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=split in ("digits", "gpt2")
    )
    if split == "gpt2":
        backend.pre_tokenizer = byte_level
    elif split == "digits":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        words = pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    backend.decoder = decoders.ByteLevel()
    types = meta.get("tokenizer.ggml.token_type", [])
    for special in (True, False):
        wanted = _CONTROL if special else _USER_DEFINED
        added = [tokens[i] for i, kind in enumerate(types) if kind == wanted]
        backend.add_tokens(
            [tokenizers.AddedToken(text, normalized=False, special=special) for text in added]
        )
    special_tokens = {}
    for name in ("bos", "eos"):
        token = meta.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            special_tokens[f"{name}_token"] = tokens[token]
    if meta.get("tokenizer.ggml.add_bos_token") and "bos_token" in special_tokens:
        bos = special_tokens["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, vocab[bos])]
        )
    return Tokenizer(backend, meta.get("tokenizer.chat_template"), special_tokens)
