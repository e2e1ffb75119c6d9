"""Batch: one step's rows, and where their KV is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from cachedattn.request import Request
from cachedattn.store import AttentionStore

if TYPE_CHECKING:
    from cachedattn._core import Sequence

Work = tuple[Request, int]  # a running request and how many of its tokens this step computes

_TENSORS = ("token_ids", "slot_mapping", "logit_rows", "block_table", "kv_lens", "cu_q", "plan")


@dataclass
class Batch:
    """`Tq` new tokens of `B` sequences: prefill, extend and decode rows alike. Its tensors are
    made on the CPU; `move_to` takes them to where the model computes."""

    token_ids: torch.Tensor  # i64 [Tq]
    slot_mapping: torch.Tensor  # i64 [Tq]: slot * block_size + place in the block
    block_table: torch.Tensor  # i32 [B, max_blocks], -1 past a sequence's end
    kv_lens: torch.Tensor  # i32 [B]: tokens in the context, the new ones included
    cu_q: torch.Tensor  # i32 [B + 1]: first row of each sequence
    plan: torch.Tensor  # i32: how attention is split, see `ops.attn_plan`
    max_q_len: int  # rows of the longest sequence
    logit_rows: torch.Tensor  # i64 [n]: rows whose logits are wanted
    kv: list[torch.Tensor]  # by layer: [slots, 2, Hkv, P, D]
    loads: list[Sequence] = field(default_factory=list)  # history still on its way
    saves: list[tuple[Sequence, int]] = field(default_factory=list)  # and how many new tokens
    failed: list[Sequence] = field(default_factory=list)  # load failed: the rows are garbage
    waited_s: float = 0.0  # for loads

    def tensors(self) -> list[torch.Tensor]:
        """In the order that `set_tensors` takes."""
        return [getattr(self, name) for name in _TENSORS]

    def set_tensors(self, tensors: list[torch.Tensor]) -> None:
        """Puts `tensors` in the place of those that are there."""
        for name, tensor in zip(_TENSORS, tensors, strict=True):
            setattr(self, name, tensor)

    def move_to(self, device: torch.device) -> None:
        """Takes the tensors to `device` in one copy, which nobody waits for."""
        tensors = self.tensors()
        if tensors[0].device != device:
            self.set_tensors(unpack(pack(tensors).to(device, non_blocking=True), tensors))

    def wait_layer(self, layer: int) -> None:
        """Returns when the history's `layer` is in the slots, or its sequence in `failed`."""
        if not self.loads:
            return
        begin = time.perf_counter()
        self.failed += [sequence for sequence in self.loads if not sequence.wait_layer(layer)]
        self.loads = [s for s in self.loads if s not in self.failed and s.loading]
        self.waited_s += time.perf_counter() - begin

    def layer_done(self, layer: int) -> None:
        """The new tokens' `layer` is in the slots."""
        for sequence, num_tokens in self.saves:
            sequence.layer_done(layer, num_tokens)


def pack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The bytes of int32 and int64 tensors, each from a multiple of 8 on, as int64 [words] in
    memory that a GPU, if there is one, copies from by itself."""
    words = sum(_words(tensor) for tensor in tensors)
    packed = torch.empty(words, dtype=torch.int64, pin_memory=torch.cuda.is_available())
    for place, tensor in zip(unpack(packed, tensors), tensors, strict=True):
        place.copy_(tensor)
    return packed


def unpack(packed: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """Views of what `pack` made of tensors of the dtypes and shapes of `like`."""
    parts = packed.split([_words(tensor) for tensor in like])
    return [
        part.view(tensor.dtype)[: tensor.numel()].view(tensor.shape)
        for part, tensor in zip(parts, like, strict=True)
    ]


def _words(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // 8)


def num_logit_rows(request: Request, num_tokens: int) -> int:
    """How many of a step's rows need logits: the one that gives a token, or all that are seen."""
    if request.on_logits:
        return num_tokens
    return 1 if num_tokens == request.num_remaining else 0


def make_batch(work: list[Work], store: AttentionStore, num_heads: int) -> Batch:
    """The rows of `work`, whose slots are reserved, for a model of `num_heads` query heads."""
    block_size = store.config.block_size
    tables = [request.sequence.block_table() for request, _ in work]
    block_table = np.full((len(work), max(map(len, tables))), -1, np.int32)
    token_ids: list[int] = []
    slot_mapping, logit_rows = [], []
    kv_lens = np.empty(len(work), np.int32)
    cu_q = np.zeros(len(work) + 1, np.int32)
    for index, ((request, num_tokens), table) in enumerate(zip(work, tables, strict=True)):
        sequence = request.sequence
        first, context_len = sequence.num_computed_tokens, sequence.context_len
        token_ids += request.tokens[first : first + num_tokens]
        places = np.arange(context_len, context_len + num_tokens)
        slots = table[places // block_size].astype(np.int64)
        slot_mapping.append(slots * block_size + places % block_size)
        block_table[index, : len(table)] = table
        kv_lens[index] = context_len + num_tokens
        end = cu_q[index + 1] = cu_q[index] + num_tokens
        logit_rows.append(np.arange(end - num_logit_rows(request, num_tokens), end))
    sequences = [request.sequence for request, _ in work]
    saves = [(request.sequence, num_tokens) for request, num_tokens in work]
    lengths = torch.from_numpy(cu_q), torch.from_numpy(kv_lens)
    # On a GPU the items of most work are to come first, as they do for two workers or more.
    workers = torch.get_num_threads() if store.device.type == "cpu" else 2
    heads = num_heads, store.layout.num_kv_heads
    return Batch(
        token_ids=torch.tensor(token_ids),
        slot_mapping=torch.from_numpy(np.concatenate(slot_mapping)),
        block_table=torch.from_numpy(block_table),
        kv_lens=lengths[1],
        cu_q=lengths[0],
        plan=torch.ops.cachedattn.attn_plan(*lengths, *heads, block_size, workers),
        max_q_len=max(num_tokens for _, num_tokens in work),
        logit_rows=torch.from_numpy(np.concatenate(logit_rows).astype(np.int64)),
        kv=store.kv,
        loads=[sequence for sequence in sequences if sequence.loading],
        saves=saves if store.needs_layer_done else [],
    )
