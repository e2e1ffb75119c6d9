"""Engine: runs turns. `step()` is the turn table of csrc/README.md, one line a row."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch

from cachedattn.batch import Batch, Work, make_batch, num_logit_rows
from cachedattn.chat import ChatMemory, ChatName
from cachedattn.checkpoint import Progress, load_checkpoint
from cachedattn.config import KvLayout, StoreConfig, Truncation, parse_size
from cachedattn.graphs import DecodeGraphs
from cachedattn.model import CausalLM
from cachedattn.request import STALL_CAUSES, Delta, LogitsHook, Reply, Request
from cachedattn.sampling import SamplingParams, choose
from cachedattn.scheduler import Scheduler
from cachedattn.store import AttentionStore, compute_device
from cachedattn.tokenizer import Message, TextStream, Tokenizer

logger = logging.getLogger(__name__)

GREEDY = SamplingParams()
KEEP_FIRST_FOUR = Truncation()


class Engine:
    """One model, one store, any number of conversations. Belongs to one thread.

    Close it, or use it as a context manager: finished turns are then on the SSD tier, if any.
    Make one with `from_pretrained`.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer | None,
        store: AttentionStore,
        *,
        max_model_len: int,
        truncation: Truncation | None = KEEP_FIRST_FOUR,
        reuse: bool = True,
        owns_store: bool = False,
        max_num_seqs: int = 16,
        max_step_tokens: int = 512,
    ) -> None:
        """max_model_len: positions of a context, and with `truncation` the length at which it is
        cut. ValueError: model and store are on two devices, the store's pool cannot hold one such
        context, or nothing can be cut."""
        _check_same_device(store, model.device)
        self.model = model
        self.tokenizer = tokenizer
        self.store = store
        self.max_model_len = max_model_len
        self.truncation = truncation
        self.owns_store = owns_store
        self.scheduler = Scheduler(
            store, max_num_seqs=max_num_seqs, max_step_tokens=max_step_tokens, reuse=reuse
        )
        self.runner: CausalLM | DecodeGraphs = model
        if model.device.type == "cuda":
            max_blocks = -(-max_model_len // store.config.block_size)
            self.runner = DecodeGraphs(model, max_blocks)
        self._memory = ChatMemory(tokenizer) if tokenizer else None
        self._ids = itertools.count(1)
        self._stall_s = dict.fromkeys(STALL_CAUSES, 0.0)  # of turns that are over
        self._ssd_state = store.stats()["ssd_state"]
        self._check_capacity()
        if truncation:
            store.new_chain([0], window=max_model_len, truncation=truncation)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        store: AttentionStore | StoreConfig | None = None,
        device: str = "cpu",
        dtype: str = "bfloat16",
        max_model_len: int | None = None,
        truncation: Truncation | None = KEEP_FIRST_FOUR,
        max_num_seqs: int = 16,
        max_step_tokens: int = 512,
        progress: Progress | None = None,
    ) -> Engine:
        """An engine for a Hugging Face directory or a GGUF file.

        store: a StoreConfig opens a store that the engine closes; None computes every turn from
        its first token (the baseline). truncation None: prompts longer than max_model_len
        (default: what the model was made for) are refused. progress(done, total): bytes of the
        weights' fingerprint.

        device: 'cpu', 'cuda' or 'cuda:N', where the weights and the pool of running sequences lie.
        dtype: 'float32' or 'bfloat16', on CUDA also 'float16'.

        ValueError: bad argument, unsupported checkpoint, or a store of another model.
        FileNotFoundError: no such model. StoreError: the store does not open.
        """
        where = compute_device(device)
        if isinstance(store, AttentionStore):
            _check_same_device(store, where)
        for name, value in (("max_num_seqs", max_num_seqs), ("max_step_tokens", max_step_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        checkpoint = load_checkpoint(path, dtype, progress, where)
        positions = checkpoint.config.max_positions
        max_model_len = positions if max_model_len is None else max_model_len
        if not 1 <= max_model_len <= positions:
            raise ValueError(
                f"max_model_len must be in [1, {positions}], the model's positions, "
                f"not {max_model_len}"
            )
        layout = checkpoint.kv_layout()
        if isinstance(store, AttentionStore):
            _check_same_model(store.layout, layout)
        model = CausalLM(checkpoint.config, checkpoint.weights, max_model_len)
        opened = store
        if not isinstance(opened, AttentionStore):
            config = store or _baseline_store(layout, max_model_len)
            if where.type == "cuda" and parse_size(config.device) == 0:
                config = dataclasses.replace(config, device=model.pool_bytes(max_step_tokens))
            opened = AttentionStore(config, layout, device=where)
        try:
            return cls(
                model,
                checkpoint.tokenizer,
                opened,
                max_model_len=max_model_len,
                truncation=truncation,
                reuse=store is not None,
                owns_store=opened is not store,
                max_num_seqs=max_num_seqs,
                max_step_tokens=max_step_tokens,
            )
        except BaseException:
            if opened is not store:
                opened.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Aborts what runs and closes the store that the engine opened. Twice is fine."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self.abort(request)
        if self.owns_store:
            self.store.close()

    def add_request(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        sampling: SamplingParams = GREEDY,
        *,
        conversation: str | None = None,
        tenant: str = "",
        on_logits: LogitsHook | None = None,
    ) -> Request:
        """Queues a turn. `prompt` is token ids, text, or messages for the chat template.

        conversation: names a chat, so that the ids of its earlier turns are used again.
        tenant: whose turn it is; no tenant finds what was computed for another.
        on_logits(request, first, logits): sees, on the CPU, the logits [rows, vocab] of every row,
        the first of which belongs to the request's token `first`.

        ValueError: an empty prompt, ids outside the vocabulary, a prompt longer than
        max_model_len without truncation, or text for a model without a tokenizer.
        """
        truncation = self.truncation or KEEP_FIRST_FOUR
        prompt_ids, num_system_tokens = self._encode(
            prompt, (tenant, conversation), truncation.keep_system
        )
        keep_first = max(truncation.keep_first, num_system_tokens)
        request = Request(
            id=next(self._ids),
            prompt_ids=prompt_ids,
            sampling=sampling,
            eos_token_ids=frozenset(self.model.config.eos_token_ids),
            window=self.max_model_len if self.truncation else 0,
            truncation=dataclasses.replace(truncation, keep_first=keep_first),
            max_model_len=self.max_model_len,
            conversation=conversation,
            tenant=tenant,
            text_stream=TextStream(self.tokenizer, sampling.stop) if self.tokenizer else None,
            on_logits=on_logits,
        )
        if sampling.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none")
        self.scheduler.add(request)
        return request

    def step(self) -> list[Request]:
        """Computes once: a chunk of each prompt, a token of each answer. Those that finished."""
        self.store.use_current_stream()
        self.store.poll()  # what landed takes effect; room is made ahead of need
        work = self.scheduler.schedule()  # queue published, history found, loads begun
        if not work:
            return []
        batch = make_batch(work, self.store, self.model.config.num_heads)
        begin = time.perf_counter()
        logits = self.runner.forward(batch)  # layer by layer: wait, append, attend, save
        landed = list(self._landed(work, batch, logits))
        last = [(r.sampler, rows[-1]) for r, _, n, rows in landed if n == r.num_remaining]
        if last:
            self.store.poll_until_computed()
        if not batch.failed and (last or self.model.device.type == "cpu"):  # else it still runs
            self.scheduler.prefill.add(work, time.perf_counter() - begin - batch.waited_s)
        tokens = iter(choose(last))
        finished = []
        for request, first, num_tokens, rows in landed:
            request.sequence.append(request.tokens[first : first + num_tokens])
            if request.on_logits:
                request.on_logits(request, first, rows.cpu())
            if request.num_remaining == 0:
                request.accept(next(tokens))
            if request.finish_reason:
                self._finish(request)  # its blocks become findable
                finished.append(request)
        return finished

    def generate(
        self, prompt: str | Sequence[int], sampling: SamplingParams = GREEDY, *, tenant: str = ""
    ) -> Reply:
        """Runs one turn to its end (and others that wait, along the way)."""
        return self._run(self.add_request(prompt, sampling, tenant=tenant))

    def chat(
        self,
        conversation: str,
        messages: Sequence[Message],
        sampling: SamplingParams = GREEDY,
        *,
        tenant: str = "",
    ) -> Reply:
        """The answer to a chat. `messages` is the whole chat so far, the answers included."""
        return self._run(
            self.add_request(messages, sampling, conversation=conversation, tenant=tenant)
        )

    def stream(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        sampling: SamplingParams = GREEDY,
        *,
        conversation: str | None = None,
        tenant: str = "",
    ) -> Iterator[Delta | Reply]:
        """Runs one turn, yielding each token as it comes and the Reply last."""
        request = self.add_request(prompt, sampling, conversation=conversation, tenant=tenant)
        try:
            while not request.finished:
                self.step()
                yield from request.take_deltas()
        finally:
            if not request.finished:  # interrupted, or the caller lost interest
                self.abort(request)
        yield request.reply()

    def abort(self, request: Request) -> None:
        """Ends a request now; its finish_reason is 'abort'."""
        self.scheduler.remove(request)
        if request.sequence is not None:
            self._count_stalls(request)
            request.sequence.close()
        request.end("abort")

    def stats(self) -> dict[str, Any]:
        """`AttentionStore.stats`; `stall_s` with 'queue' and 'slots', too, of turns that are over:
        `cachedattn.request.STALL_CAUSES`."""
        stats = self.store.stats()
        return {**stats, "stall_s": {**self._stall_s, **stats["stall_s"]}}

    def _run(self, request: Request) -> Reply:
        try:
            while not request.finished:
                self.step()
        finally:
            if not request.finished:
                self.abort(request)
        return request.reply()

    def _landed(
        self, work: list[Work], batch: Batch, logits: torch.Tensor
    ) -> Iterator[tuple[Request, int, int, torch.Tensor]]:
        """(request, its first token in the step, how many, its logits), less those whose history
        could not be loaded: they wait again and are recomputed."""
        end = 0
        for request, num_tokens in work:
            start, end = end, end + num_logit_rows(request, num_tokens)
            if request.sequence in batch.failed:
                self.scheduler.retry(request)
                continue
            yield request, request.sequence.num_computed_tokens, num_tokens, logits[start:end]

    def _finish(self, request: Request) -> None:
        self.scheduler.remove(request)
        self._count_stalls(request)
        request.sequence.commit(request.finish_reason)
        request.end()
        if request.conversation is not None and self._memory:
            self._memory.remember((request.tenant, request.conversation), request)
        self._log_outage()

    def _count_stalls(self, request: Request) -> None:
        request.note_stop()
        for cause, seconds in request.stall_s.items():
            self._stall_s[cause] += seconds

    def _log_outage(self) -> None:
        stats = self.store.stats()
        if stats["ssd_state"] != self._ssd_state:
            self._ssd_state = stats["ssd_state"]
            logger.warning("SSD tier %s", stats["ssd_report"])

    def _encode(
        self,
        prompt: str | Sequence[int] | Sequence[Message],
        chat: ChatName,
        keep_system: bool,
    ) -> tuple[list[int], int]:
        """Checked token ids, and how many of them a cut must keep for the system prompt."""
        num_system_tokens = 0
        if len(prompt) == 0:
            raise ValueError("the prompt is empty")
        if isinstance(prompt, str):
            ids = self._need_tokenizer().encode(prompt)
        elif isinstance(prompt[0], dict):
            self._need_tokenizer()
            ids = self._memory.prompt_ids(chat, prompt)
            if keep_system:
                num_system_tokens = self._memory.num_system_tokens(prompt)
        else:
            ids = [int(token) for token in prompt]
        vocab_size = self.model.config.vocab_size
        bad = next((token for token in ids if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise ValueError(f"token id {bad} is not in the vocabulary [0, {vocab_size})")
        if self.truncation is None and len(ids) > self.max_model_len:
            raise ValueError(
                f"the prompt's {len(ids)} tokens exceed max_model_len {self.max_model_len} "
                "(truncation is off)"
            )
        return ids, num_system_tokens

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: pass token ids")
        return self.tokenizer

    def _check_capacity(self) -> None:
        """A context of max_model_len tokens must fit the pool that block tables index."""
        tiers = self.store.stats()["tiers"]
        tier = "device" if tiers["device"]["capacity_slots"] else "dram"
        held = tiers[tier]["capacity_slots"] * self.store.config.block_size
        if held < self.max_model_len:
            raise ValueError(
                f"{tier} holds {held} tokens of this model, fewer than max_model_len "
                f"{self.max_model_len}: give it more, or lower max_model_len"
            )


def _baseline_store(layout: KvLayout, max_model_len: int) -> StoreConfig:
    """A pool for two contexts and nothing else."""
    tokens = 2 * max_model_len + 1024
    padding = 4096 * (layout.num_layers + 1)  # a slice ends on a page, a slot begins with one
    return StoreConfig(dram=tokens * layout.bytes_per_token + (tokens // 64 + 1) * padding)


def _check_same_device(store: AttentionStore, device: torch.device) -> None:
    if store.device != device:
        raise ValueError(f"the store is on {store.device}, the model on {device}")


def _check_same_model(stored: KvLayout, wanted: KvLayout) -> None:
    for field in dataclasses.fields(KvLayout):
        ours, theirs = getattr(wanted, field.name), getattr(stored, field.name)
        if field.name != "model_name" and ours != theirs:
            raise ValueError(
                f"the store is for model {stored.model_name!r}, this is {wanted.model_name!r}: "
                f"{field.name} {_text(theirs)} differs from {_text(ours)}"
            )


def _text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
