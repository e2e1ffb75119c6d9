"""llama.cpp in this process: recompute, the context kept in memory, a sequence's state file."""

import ctypes
import os
import time

import llama_cpp as ll
import numpy as np
from protocol import Task, drop_page_cache, serve


def bf16_copy(gguf: str, scratch: str) -> str:
    """The model as bf16, the format the other engines run: Q4_1's prompt path is slower."""
    path = os.path.join(scratch, "model-bf16.gguf")
    params = ll.llama_model_quantize_default_params()
    params.ftype = ll.LLAMA_FTYPE_MOSTLY_BF16
    params.allow_requantize = True
    if ll.llama_model_quantize(gguf.encode(), path.encode(), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp could not convert {gguf} to bf16")
    return path


class LlamaCpp:
    sources = ("recompute", "memory", "disk")

    def __init__(self, task: Task) -> None:
        self.task = task
        ll.llama_backend_init()
        path = bf16_copy(task.gguf, task.scratch)
        self.model = ll.llama_model_load_from_file(path.encode(), ll.llama_model_default_params())
        params = ll.llama_context_default_params()
        params.n_ctx = len(task.history) + len(task.new) + 256
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = task.threads
        self.ctx = ll.llama_init_from_model(self.model, params)
        self.memory = ll.llama_get_memory(self.ctx)
        self.vocab_size = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.file = os.path.join(task.scratch, "history.bin").encode()
        self.fill_history()
        ids = (ll.llama_token * len(task.history))(*task.history)
        if not ll.llama_state_seq_save_file(self.ctx, self.file, 0, ids, len(task.history)):
            raise RuntimeError("llama.cpp could not save the sequence")

    def step(self, ids: list[int]) -> int:
        for i in range(0, len(ids), 512):
            part = ids[i : i + 512]
            tokens = (ll.llama_token * len(part))(*part)  # the batch only points at it
            if ll.llama_decode(self.ctx, ll.llama_batch_get_one(tokens, len(part))) != 0:
                raise RuntimeError("llama_decode failed")
        logits = ll.llama_get_logits_ith(self.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def fill_history(self) -> None:
        ll.llama_memory_clear(self.memory, True)
        self.step(self.task.history)

    def prepare(self, source: str) -> None:
        if source == "memory":
            self.fill_history()
            return
        ll.llama_memory_clear(self.memory, True)
        if source == "disk":
            drop_page_cache(self.file.decode())

    def first_token(self, source: str) -> int:
        if source == "recompute":
            return self.step(self.task.history + self.task.new)
        if source == "disk":
            count = ctypes.c_size_t(0)
            capacity = len(self.task.history)
            ids = (ll.llama_token * capacity)()
            if not ll.llama_state_seq_load_file(
                self.ctx, self.file, 0, ids, capacity, ctypes.byref(count)
            ):
                raise RuntimeError("llama.cpp could not load the sequence")
        return self.step(self.task.new)

    def decode_seconds(self) -> float:
        ll.llama_memory_clear(self.memory, True)
        token = self.step(self.task.decode_context)
        begin = time.perf_counter()
        for _ in range(self.task.decode_tokens):
            token = self.step([token])
        return time.perf_counter() - begin


if __name__ == "__main__":
    serve(LlamaCpp)
