"""A tiny random model that chats: one token per byte, a ChatML template."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_models import save_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_chat_model(directory: Path, seed: int = 0) -> Path:
    """A Hugging Face directory, 8192 positions."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate([*alphabet, START, END])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (START, END)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids = {"bos_token_id": vocab[START], "eos_token_id": vocab[END]}
    save_model(
        directory, seed=seed, vocab_size=len(vocab), max_position_embeddings=8192, layers=2, **ids
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "bos_token": START, "eos_token": END}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
