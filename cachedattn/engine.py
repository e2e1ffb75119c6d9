"""Engine: runs turns. `step()` is the turn table of csrc/README.md, one line a row."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch

from cachedattn.checkpoint import Checkpoint
from cachedattn.config import KvLayout, StoreConfig, Truncation, check_choice
from cachedattn.model import CausalLM
from cachedattn.request import Delta, LogitsHook, Reply, Request
from cachedattn.sampling import SamplingParams
from cachedattn.scheduler import Scheduler
from cachedattn.store import AttentionStore
from cachedattn.tokenizer import Tokenizer

Message = dict[str, str]  # {'role': 'system' | 'user' | 'assistant', 'content': text}


class Engine:
    """One model, one store, any number of conversations. Belongs to one thread.

    Close it, or use it as a context manager: finished turns are then on the SSD tier, if any.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer | None,
        store: AttentionStore,
        *,
        max_model_len: int,
        truncation: Truncation | None,
        reuse: bool = True,
        owns_store: bool = True,
        max_num_seqs: int = 16,
        max_step_tokens: int = 512,
    ) -> None: ...

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        store: AttentionStore | StoreConfig | None = None,
        device: str = "cpu",
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        truncation: Truncation | None = Truncation(),
        max_num_seqs: int = 16,
        max_step_tokens: int = 512,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Engine:
        """An engine for a Hugging Face directory or a GGUF file.

        store: a StoreConfig opens a store that the engine closes; None computes every turn from
        its first token (the baseline). truncation None: prompts longer than max_model_len
        (default: what the model was made for) are refused. progress(stage, done, total) in bytes
        while the weights are read. ValueError: bad argument, unsupported checkpoint, or a store
        of another model. FileNotFoundError: no such model. StoreError: the store does not open.
        """
        raise NotImplementedError

    def add_request(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        sampling: SamplingParams = SamplingParams(),
        *,
        conversation: str | None = None,
        on_logits: LogitsHook | None = None,
    ) -> Request:
        """Queues a turn. `prompt` is token ids, text, or messages for the chat template.

        conversation: names a chat, so that the ids of its earlier turns are used again.
        on_logits: sees the logits of every row computed for this request.
        """
        raise NotImplementedError

    def step(self) -> list[Request]:
        """Computes once: a chunk of each prompt, one token of each answer. The finished ones."""
        raise NotImplementedError

    def generate(
        self, prompt: str | Sequence[int], sampling: SamplingParams = SamplingParams()
    ) -> Reply:
        """Runs one turn to its end (and others that wait, along the way)."""
        raise NotImplementedError

    def stream(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        sampling: SamplingParams = SamplingParams(),
        *,
        conversation: str | None = None,
    ) -> Iterator[Delta | Reply]:
        """Runs one turn, yielding each token as it comes and the Reply last."""
        raise NotImplementedError

    def chat(
        self,
        conversation: str,
        messages: Sequence[Message],
        sampling: SamplingParams = SamplingParams(),
    ) -> Reply:
        """The answer to a chat. `messages` is the whole chat so far, the answers included."""
        raise NotImplementedError

    def abort(self, request: Request) -> None:
        """Ends a request now; finish_reason 'abort'."""
        raise NotImplementedError

    def close(self) -> None:
        """Aborts what runs and closes the store that the engine opened. Twice is fine."""
        raise NotImplementedError
