"""Hugging Face transformers: recompute, a DynamicCache in memory, the cache as a file on disk."""

import os
import time

import torch
from protocol import Task, drop_page_cache, serve
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache


class Transformers:
    sources = ("recompute", "memory", "disk")

    def __init__(self, task: Task) -> None:
        torch.set_num_threads(task.threads)
        self.task = task
        self.model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.bfloat16).eval()
        self.file = os.path.join(task.scratch, "history.safetensors")
        self.cache = DynamicCache()
        self.step(task.history, self.cache)
        tensors = {}
        for i, layer in enumerate(self.cache.layers):
            tensors[f"{i}.k"] = layer.keys.contiguous()
            tensors[f"{i}.v"] = layer.values.contiguous()
        save_file(tensors, self.file)

    @torch.inference_mode()
    def step(self, ids: list[int], cache: DynamicCache) -> int:
        out = self.model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
        return int(out.logits[0, -1].argmax())

    def prepare(self, source: str) -> None:
        surplus = self.cache.get_seq_length() - len(self.task.history)
        if surplus:
            self.cache.crop(-surplus)  # tokens of the last trial
        if source == "disk":
            drop_page_cache(self.file)

    def first_token(self, source: str) -> int:
        if source == "recompute":
            return self.step(self.task.history + self.task.new, DynamicCache())
        if source == "memory":
            return self.step(self.task.new, self.cache)
        tensors = load_file(self.file)
        cache = DynamicCache()
        for i in range(len(tensors) // 2):
            cache.update(tensors[f"{i}.k"], tensors[f"{i}.v"], i)
        return self.step(self.task.new, cache)

    def decode_seconds(self) -> float:
        cache = DynamicCache()
        token = self.step(self.task.decode_context, cache)
        begin = time.perf_counter()
        for _ in range(self.task.decode_tokens):
            token = self.step([token], cache)
        return time.perf_counter() - begin


if __name__ == "__main__":
    serve(Transformers)
