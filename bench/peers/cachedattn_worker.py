"""cachedattn: recompute, history in DRAM, history on SSD (O_DIRECT, nothing of it in DRAM)."""

import os

import torch
from protocol import Task, serve

from cachedattn.bench import leave_history
from cachedattn.config import StoreConfig
from cachedattn.engine import Engine
from cachedattn.sampling import SamplingParams


class CachedAttention:
    sources = ("recompute", "memory", "disk")

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.threads)
        self.task = task
        path = os.path.join(task.scratch, "kv")
        store = StoreConfig(dram="1GiB", ssd="1GiB", path=path)
        self.engine = Engine.from_pretrained(task.model, store=store)
        # What earlier trials left of the new tokens is not to be found.
        self.engine.scheduler.max_history = len(task.history)
        self.recompute = Engine.from_pretrained(task.model)

    def prepare(self, source: str) -> None:
        if source != "recompute":
            leave_history(self.engine, self.task.history, "dram" if source == "memory" else "ssd")

    def first_token(self, source: str) -> int:
        engine = self.recompute if source == "recompute" else self.engine
        ids = self.task.history + self.task.new
        reply = engine.generate(ids, SamplingParams(max_tokens=1))
        tier = {"recompute": "device", "memory": "dram", "disk": "ssd"}[source]
        expected = 0 if source == "recompute" else len(self.task.history)
        if reply.cached_from[tier] != expected:
            raise RuntimeError(f"{source}: history came from {reply.cached_from}")
        return reply.token_ids[0]

    def decode_seconds(self) -> float:
        params = SamplingParams(max_tokens=self.task.decode_tokens + 1, ignore_eos=True)
        reply = self.recompute.generate(self.task.decode_context, params)
        return reply.duration_s - reply.ttft_s


if __name__ == "__main__":
    serve(CachedAttention)
