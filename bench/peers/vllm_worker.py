"""vLLM on CPU: recompute, and its prefix cache in memory. `--eager` leaves torch.compile out."""

import os
import sys
import time

from protocol import Task, serve

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")


class Vllm:
    sources = ("recompute", "memory")

    def __init__(self, task: Task) -> None:
        from vllm import LLM

        self.task = task
        self.llm = LLM(
            model=task.model,
            dtype="bfloat16",
            max_model_len=len(task.history) + len(task.new) + 256,
            enforce_eager="--eager" in sys.argv,
            enable_prefix_caching=True,
        )

    def generate(self, ids: list[int], num_tokens: int) -> list[int]:
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        prompt = TokensPrompt(prompt_token_ids=ids)
        return list(self.llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids)

    def prepare(self, source: str) -> None:
        # The last trial's new tokens sit in the prefix cache too: start from nothing.
        while not self.llm.reset_prefix_cache():
            time.sleep(0.01)
        if source == "memory":
            self.generate(self.task.history, 1)

    def first_token(self, source: str) -> int:
        return self.generate(self.task.history + self.task.new, 1)[0]

    def decode_seconds(self) -> float:
        seconds = []
        for num_tokens in (1, 1 + self.task.decode_tokens):
            self.prepare("recompute")
            begin = time.perf_counter()
            self.generate(self.task.decode_context, num_tokens)
            seconds.append(time.perf_counter() - begin)
        return seconds[1] - seconds[0]


if __name__ == "__main__":
    serve(Vllm)
