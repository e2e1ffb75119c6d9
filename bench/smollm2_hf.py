"""Writes a GGUF file of the Llama family as a Hugging Face directory in bf16, for engines that
read nothing else. They get token ids, so there is no chat template.

    python bench/smollm2_hf.py MODEL.gguf OUTPUT_DIR
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

from cachedattn.checkpoint import load_checkpoint


def convert(source: Path, output: Path) -> None:
    checkpoint = load_checkpoint(source, "bfloat16")
    model, tokenizer = checkpoint.config, checkpoint.tokenizer
    if model.architecture != "llama" or model.rope.scaling != "default":
        raise SystemExit(f"{source}: only Llama models with plain RoPE are understood")
    if tokenizer is None:
        raise SystemExit(f"{source}: has no tokenizer")
    output.mkdir(parents=True, exist_ok=True)
    save_file(checkpoint.weights, output / "model.safetensors", metadata={"format": "pt"})
    special = tokenizer.special_tokens
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": round(model.rms_eps, 9),
        "rope_theta": model.rope.theta,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tied_embeddings,
        "bos_token_id": tokenizer.backend.token_to_id(special["bos_token"]),
        "eos_token_id": tokenizer.backend.token_to_id(special["eos_token"]),
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    (output / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer.backend.save(str(output / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special["bos_token"],
        "eos_token": special["eos_token"],
        "model_max_length": model.max_positions,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
