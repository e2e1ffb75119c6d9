"""CUDA graphs of decode steps: one launch instead of a dozen kernels a layer, each started by
Python, which a GPU computes faster than they are started."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from cachedattn.batch import Batch, pack, unpack
from cachedattn.model import CausalLM

# int32 words of a plan's header and of an item in it: csrc/kernels/attn_plan.h. Items of zeros
# have no rows; on CUDA they may follow the others.
PLAN_HEADER, PLAN_ITEM = 5, 9


class DecodeGraphs:
    """Runs a model's steps over one store's pool on CUDA: decode steps as graphs.

    A graph is captured when its size is first met: the rows and the items of their attention, each
    rounded up to a power of two. All share one pool of memory: the next overwrites what one left.
    """

    def __init__(self, model: CausalLM, max_blocks: int) -> None:
        """max_blocks: most blocks of a context."""
        self.model = model
        self.max_blocks = max_blocks
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}
        self._pool: Any = None

    def forward(self, batch: Batch) -> torch.Tensor:
        """As `CausalLM.forward`; the logits hold until the next call.

        In a graph the layers' hooks have no place: it waits for no load, and saves begin behind it.
        """
        num_rows = len(batch.token_ids)
        if batch.max_q_len > 1 or batch.loads or len(batch.logit_rows) < num_rows:
            return self.model.forward(batch)
        padded = pad(batch, self.max_blocks)
        size = len(padded.token_ids), len(padded.plan)
        if size not in self._graphs:
            self._graphs[size] = DecodeGraph(self.model, padded, self._pool)
            self._pool = self._graphs[size].pool
        logits = self._graphs[size].run(padded)
        for layer in range(len(self.model.layers)):
            batch.layer_done(layer)
        return logits[:num_rows]


class DecodeGraph:
    """One captured size: the step's inputs lie at a fixed place, and so do its logits."""

    def __init__(self, model: CausalLM, batch: Batch, pool: Any) -> None:
        """Runs `batch` once, to load the kernels, and captures it. `pool` is None or a pool."""
        tensors = batch.tensors()
        self.inputs = pack(tensors).to(model.device)
        static = dataclasses.replace(batch, loads=[], saves=[])
        static.set_tensors(unpack(self.inputs, tensors))
        model.forward(static)
        compute = functools.partial(model.forward, static)
        self._replay, self._logits, self.pool = capture(compute, pool, model.device)

    def run(self, batch: Batch) -> torch.Tensor:
        """Logits of `batch`, of this size."""
        self.inputs.copy_(pack(batch.tensors()), non_blocking=True)
        self._replay()
        return self._logits


def capture(
    compute: Callable[[], torch.Tensor], pool: Any, device: torch.device
) -> tuple[Callable[[], None], torch.Tensor, Any]:
    """What runs the kernels of `compute` on `device` again, the result that they write to, and the
    pool of memory that they use."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream(device)
    # The store's threads may register memory meanwhile; that is no part of the capture.
    with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
        result = compute()
    return graph.replay, result, graph.pool()


def pad(batch: Batch, max_blocks: int) -> Batch:
    """`batch`, one row a sequence, with as many rows and items as a graph has. Rows that are added
    belong to sequences without rows, store nothing and attend to nothing."""
    num_rows = len(batch.token_ids)
    more_rows = _round_up(num_rows) - num_rows
    more_blocks = max_blocks - batch.block_table.shape[1]
    num_items = (len(batch.plan) - PLAN_HEADER) // PLAN_ITEM
    more_items = _round_up(num_items) - num_items
    return dataclasses.replace(
        batch,
        token_ids=functional.pad(batch.token_ids, (0, more_rows)),
        slot_mapping=functional.pad(batch.slot_mapping, (0, more_rows), value=-1),
        logit_rows=torch.arange(num_rows + more_rows),
        block_table=functional.pad(batch.block_table, (0, more_blocks, 0, more_rows), value=-1),
        kv_lens=functional.pad(batch.kv_lens, (0, more_rows)),
        cu_q=functional.pad(batch.cu_q, (0, more_rows), value=num_rows),
        plan=functional.pad(batch.plan, (0, more_items * PLAN_ITEM)),
    )


def _round_up(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
