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


@dataclass
class Batch:
    """`Tq` new tokens of `B` sequences: prefill, extend and decode rows alike."""

    token_ids: torch.Tensor  # i64 [Tq]
    slot_mapping: torch.Tensor  # i64 [Tq]: slot * block_size + place in the block
    block_table: torch.Tensor  # i32 [B, max_blocks], -1 past a sequence's end
    kv_lens: torch.Tensor  # i32 [B]: tokens in the context, the new ones included
    cu_q: torch.Tensor  # i32 [B + 1]: first row of each sequence
    max_q_len: int  # rows of the longest sequence
    logit_rows: torch.Tensor  # i64 [n]: rows whose logits are wanted
    kv: list[torch.Tensor]  # by layer: [slots, 2, Hkv, P, D]
    loads: list[Sequence] = field(default_factory=list)  # history still on its way
    saves: list[tuple[Sequence, int]] = field(default_factory=list)  # and how many new tokens
    failed: list[Sequence] = field(default_factory=list)  # load failed: the rows are garbage
    waited_s: float = 0.0  # for loads

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


def num_logit_rows(request: Request, num_tokens: int) -> int:
    """How many of a step's rows need logits: the one that gives a token, or all that are seen."""
    if request.on_logits:
        return num_tokens
    return 1 if num_tokens == request.num_remaining else 0


def make_batch(work: list[Work], store: AttentionStore) -> Batch:
    """The rows of `work`, whose slots are reserved."""
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
    return Batch(
        token_ids=torch.tensor(token_ids),
        slot_mapping=torch.from_numpy(np.concatenate(slot_mapping)),
        block_table=torch.from_numpy(block_table),
        kv_lens=torch.from_numpy(kv_lens),
        cu_q=torch.from_numpy(cu_q),
        max_q_len=max(num_tokens for _, num_tokens in work),
        logit_rows=torch.from_numpy(np.concatenate(logit_rows).astype(np.int64)),
        kv=store.kv,
        loads=[sequence for sequence in sequences if sequence.loading],
        saves=saves if store.needs_layer_done else [],
    )
