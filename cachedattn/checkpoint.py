"""Checkpoints: a Hugging Face directory or a GGUF file, ready to make a model of."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cachedattn import gguf
from cachedattn.config import (
    CUDA_DTYPES,
    DTYPES,
    KvLayout,
    ModelConfig,
    RopeConfig,
    check_choice,
)
from cachedattn.rope import yarn_attention_factor
from cachedattn.tokenizer import Tokenizer

# The meaning of the KV under an identity. Raise it when the same weights and fields come to give
# other KV bytes.
_KV_SCHEMA = 1
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
_HASH_BYTES = 4 << 20

CPU = torch.device("cpu")
Progress = Callable[[int, int], None]  # (bytes read, bytes in all)


@dataclass
class Checkpoint:
    """A model's configuration, weights in the compute dtype, tokenizer and identity."""

    name: str
    config: ModelConfig
    weights: dict[str, torch.Tensor]  # under Transformers' names
    tokenizer: Tokenizer | None
    dtype: str
    identity: bytes  # SHA-256 over the weight files' bytes and what else the KV depends on

    def kv_layout(self) -> KvLayout:
        """What a store must know of this model."""
        return KvLayout(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            identity=self.identity,
            model_name=self.name,
        )


def load_checkpoint(
    path: str | os.PathLike[str],
    dtype: str = "bfloat16",
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> Checkpoint:
    """Reads a Hugging Face directory (config.json, *.safetensors, tokenizer.json) or GGUF file,
    the weights one by one to `device`.

    FileNotFoundError: nothing there. ValueError: something that is not supported, named.
    ModuleNotFoundError: a package that reading models needs is not installed.
    """
    check_choice("dtype", dtype, DTYPES if device.type == "cpu" else CUDA_DTYPES)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no model at {path}")
    read = _read_directory if path.is_dir() else _read_gguf
    try:
        # Hashing releases the interpreter lock, so it runs beside everything else.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            config, tokenizer, weights, digest = read(
                path,
                getattr(torch, dtype),
                device,
                lambda files: pool.submit(_hash_files, files, progress).result,
            )
            identity = identity_of(digest(), config, dtype)
    except ModuleNotFoundError as error:
        message = f"reading models needs {error.name}: pip install 'cachedattn[hf]'"
        raise ModuleNotFoundError(message, name=error.name) from None
    return Checkpoint(path.stem, config, weights, tokenizer, dtype, identity)


Parts = tuple[ModelConfig, Tokenizer | None, dict[str, torch.Tensor], Callable[[], bytes]]
StartHash = Callable[[list[Path]], Callable[[], bytes]]  # of files; the result waits


def _read_directory(
    path: Path, dtype: torch.dtype, device: torch.device, start_hash: StartHash
) -> Parts:
    config = hf_config(_read_json(path / "config.json"))
    files = _safetensors_files(path)
    digest = start_hash(files)
    tokenizer = Tokenizer.from_directory(path)
    eos = {*config.eos_token_ids, *_generation_eos(path)}
    eos |= set(tokenizer.eos_token_ids) if tokenizer else set()
    config = dataclasses.replace(config, eos_token_ids=tuple(sorted(eos)))
    return config, tokenizer, _load_safetensors(files, dtype, device), digest


def _read_gguf(
    path: Path, dtype: torch.dtype, device: torch.device, start_hash: StartHash
) -> Parts:
    file = gguf.GgufFile(path)
    config = gguf.model_config(file)
    digest = start_hash([path])
    weights = {name: w.to(device) for name, w in gguf.weights(file, config, dtype)}
    return config, gguf.tokenizer(file), weights, digest


def identity_of(weights_digest: bytes, config: ModelConfig, dtype: str) -> bytes:
    """SHA-256 over the weights' digest and every other thing that the KV's values depend on."""
    fields = {"schema": _KV_SCHEMA, "dtype": dtype, "config": config.kv_fields()}
    return hashlib.sha256(weights_digest + json.dumps(fields, sort_keys=True).encode()).digest()


def hf_config(raw: dict[str, Any]) -> ModelConfig:
    """From the contents of config.json. ValueError naming what is not supported."""
    architecture = (raw.get("architectures") or [None])[0]
    check_choice("architecture", architecture, _ARCHITECTURES)
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"quantised checkpoints are not supported (quant_method {method!r})")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(raw.get(name), int):
            raise ValueError(f"config.json lacks {name}")
    heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // heads
    eos = raw.get("eos_token_id")
    return ModelConfig(
        architecture=architecture,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rms_eps=raw.get("rms_norm_eps", 1e-6),
        max_positions=raw.get("max_position_embeddings", 2048),
        rope=_rope_config(raw, head_dim),
        sliding_window=_sliding_window(raw, architecture),
        tied_embeddings=raw.get("tie_word_embeddings", False),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


def _sliding_window(raw: dict[str, Any], architecture: str) -> int:
    window = raw.get("sliding_window") or 0
    if architecture == "LlamaForCausalLM":
        return 0
    if architecture == "Qwen2ForCausalLM":
        if not raw.get("use_sliding_window", False):
            return 0
        if raw.get("max_window_layers", 0) > 0:
            raise ValueError("a sliding window in some layers only is not supported")
    return window


def _rope_config(raw: dict[str, Any], head_dim: int) -> RopeConfig:
    """From `rope_parameters` (new) or `rope_theta` and `rope_scaling` (old)."""
    params = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    scaling = params.get("rope_type") or params.get("type") or "default"
    check_choice("rope_type", scaling, ("default", "linear", "llama3", "yarn"))
    if params.get("partial_rotary_factor", 1.0) != 1.0:
        head_dim = int(head_dim * params["partial_rotary_factor"])
    common = {
        "theta": float(params.get("rope_theta", raw.get("rope_theta", 10000.0))),
        "rotary_dim": head_dim,
        "scaling": scaling,
    }
    if scaling == "default":
        return RopeConfig(**common)
    if "factor" not in params:
        raise ValueError(f"rope_type {scaling!r} lacks its factor")
    common["factor"] = float(params["factor"])
    if scaling == "linear":
        return RopeConfig(**common)
    original = params.get("original_max_position_embeddings") or raw["max_position_embeddings"]
    common["original_max_positions"] = original
    if scaling == "llama3":
        return RopeConfig(
            **common,
            low_freq_factor=float(params["low_freq_factor"]),
            high_freq_factor=float(params["high_freq_factor"]),
        )
    factor = params.get("attention_factor")
    if factor is None:
        mscales = params.get("mscale") or 0.0, params.get("mscale_all_dim") or 0.0
        factor = yarn_attention_factor(common["factor"], *mscales)
    return RopeConfig(
        **common,
        beta_fast=float(params.get("beta_fast") or 32.0),
        beta_slow=float(params.get("beta_slow") or 1.0),
        truncate=params.get("truncate", True),
        attention_factor=float(factor),
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: not a model directory")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _generation_eos(path: Path) -> list[int]:
    """The ending tokens that generation_config.json adds."""
    if not (path / "generation_config.json").exists():
        return []
    eos = _read_json(path / "generation_config.json").get("eos_token_id")
    return [] if eos is None else eos if isinstance(eos, list) else [eos]


def _safetensors_files(directory: Path) -> list[Path]:
    """The weight files, sorted by name. ValueError: none, or only pickled ones."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    elif (directory / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        pickled = sorted(path.name for path in directory.iterdir() if _is_pickle(path))
        hint = f" ({', '.join(pickled)} can run code when opened)" if pickled else ""
        raise ValueError(f"{directory} has no .safetensors weights; others are not read{hint}")
    for name in names:
        if Path(name).name != name or not (directory / name).exists():
            raise ValueError(f"{index.name} names {name}, which is not in {directory}")
    return [directory / name for name in names]


def _is_pickle(path: Path) -> bool:
    return path.suffix in (".bin", ".pt", ".pth")


def _load_safetensors(
    files: list[Path], dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    import safetensors

    weights = {}
    for path in files:
        try:
            with safetensors.safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    weights[name] = file.get_tensor(name).to(device, dtype)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    return weights


def _hash_files(files: list[Path], progress: Progress | None) -> bytes:
    digest = hashlib.sha256()
    total = sum(path.stat().st_size for path in files)
    done = 0
    for path in files:
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as file:
            while chunk := file.read(_HASH_BYTES):
                digest.update(chunk)
                done += len(chunk)
                if progress:
                    progress(done, total)
    return digest.digest()
