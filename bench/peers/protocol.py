"""The loop of a peer's worker: one JSON request a line on stdin, one JSON answer a line on stdout.

A worker runs in the peer's own interpreter, so this file needs the standard library only.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Task:
    """What every engine is given: the same token ids, the same number of threads."""

    model: str  # Hugging Face directory, bf16
    gguf: str  # the GGUF file that directory was converted from
    history: list[int]
    new: list[int]
    decode_context: list[int]
    decode_tokens: int
    threads: int
    scratch: str  # an empty folder for state files


class Engine(Protocol):
    """One engine. `sources` names what `prepare` and `first_token` understand:
    'recompute', 'memory' and, where the engine has it, 'disk'."""

    sources: tuple[str, ...]

    def prepare(self, source: str) -> None:
        """Brings the history where `source` says it is. Not timed."""

    def first_token(self, source: str) -> int:
        """Greedy first token after history + new. Timed."""

    def decode_seconds(self) -> float:
        """Seconds for `decode_tokens` greedy tokens after `decode_context`, without prefill."""


def drop_page_cache(path: str) -> None:
    """So that a plain file is really read from disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def serve(build: Callable[[Task], Engine]) -> None:
    """Answers {'source': s} with {'ttft_s', 'token'} and {'decode': true} with {'seconds'}."""
    # Engines print to stdout, from C too: answers go to a copy of it, the rest to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    started = time.perf_counter()
    engine = build(Task(**json.loads(sys.stdin.readline())))
    ready = {"sources": engine.sources, "start_s": time.perf_counter() - started}
    answers.write(json.dumps(ready) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        if "decode" in request:
            answers.write(json.dumps({"seconds": engine.decode_seconds()}) + "\n")
            continue
        engine.prepare(request["source"])
        begin = time.perf_counter()
        token = engine.first_token(request["source"])
        reply = {"ttft_s": time.perf_counter() - begin, "token": token}
        answers.write(json.dumps(reply) + "\n")
