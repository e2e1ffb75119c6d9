"""Generated conversations, any number of them, through the store in virtual time.

What is held is what lives, never what has been: memory does not grow with their number.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cachedattn import _core
from cachedattn.replay import HISTORY_BLOCKS, Hardware, share

STEPS = 10  # parts of a run that are measured one by one


@dataclass(frozen=True)
class Shape:
    """The workload: means, lengths in tokens (csrc/replay/generator.h)."""

    conversations: int
    turns: float = 3.0
    prompt: float = 300.0  # that a turn adds
    answer: float = 500.0
    think_s: float = 60.0
    context: int = 32768  # a conversation ends when another turn might not fit
    slots: int = 24
    load: float = 0.95
    seed: int = 0


def granularity_for(shape: Shape) -> int:
    """Tokens that one token of the store stands for: a power of two."""
    mean = shape.turns * (shape.prompt + shape.answer) / (_core.Replay.block_size * HISTORY_BLOCKS)
    return 1 << max(0, round(np.log2(max(mean, 1.0))))


def resident_bytes() -> int:
    """Memory of this process."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


class Steps:
    """What was done and held when each tenth of the conversations had ended."""

    def __init__(self, conversations: int) -> None:
        self.conversations = conversations
        self.rows: list[dict[str, Any]] = []
        self.before = {"turns": 0, "evictions": 0, "cpu_s": time.thread_time()}

    def note(self, now: dict[str, int]) -> None:
        """To be called on the thread that plays."""
        if now["ended"] * STEPS < (len(self.rows) + 1) * self.conversations:
            return
        cpu_s = time.thread_time()
        turns = now["turns"] - self.before["turns"]
        self.rows.append(
            {
                **now,
                "resident_bytes": resident_bytes(),
                "turn_us": 1e6 * share(cpu_s - self.before["cpu_s"], turns),
                "evictions_per_turn": share(now["evictions"] - self.before["evictions"], turns),
            }
        )
        self.before = {"turns": now["turns"], "evictions": now["evictions"], "cpu_s": cpu_s}


def simulate(
    shape: Shape,
    hardware: Hardware,
    policy: str,
    dram: int,
    ssd: int,
    granularity: int = 0,
    dram_reserve: float = 0.1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Plays one policy: its parameters, what was found, and what that took.

    `progress` is called with the number of conversations that have ended. ValueError names the
    option that is out of range.
    """
    granularity = granularity or granularity_for(shape)
    block = granularity * hardware.token_bytes * _core.Replay.block_size
    if 0 < ssd < block:
        raise ValueError(f"ssd: {ssd} bytes hold no block of {block}; try a finer --granularity")
    steps = Steps(shape.conversations)

    def report(now: dict[str, int]) -> None:
        steps.note(now)
        if progress is not None:
            progress(now["ended"])

    begin_s = time.perf_counter()
    result = _core.play_generated(
        **asdict(shape),
        granularity=granularity,
        policy=policy,
        dram_bytes=dram,
        ssd_bytes=ssd,
        token_bytes=hardware.token_bytes,
        dram_reserve=dram_reserve if ssd else 0.0,
        ssd_read_bytes_s=hardware.ssd_read,
        ssd_write_bytes_s=hardware.ssd_write,
        ssd_latency_s=hardware.ssd_latency_s,
        copy_bytes_s=hardware.copy,
        progress=report,
    )
    took_s = time.perf_counter() - begin_s
    turns, hits = result["turns"], result["hit_tokens"]
    return {
        "policy": policy,
        "capacity": dram + ssd,
        "dram": dram,
        "ssd": ssd,
        "load": shape.load,
        "mean_queue": result["mean_queue"],
        "conversations": shape.conversations,
        "turns": turns,
        "days": result["span_s"] / 86400,
        "of_ideal": share(hits, result["ideal_tokens"]),
        "per_turn": share(result["half"], turns),
        "full_prefix": share(result["full"], result["later_turns"]),
        "dram_share": share(result["dram_tokens"], hits),
        "ssd_wait_s": result["ssd_wait_s"],
        "bytes_read": result["ssd_bytes_read"],
        "bytes_written": result["ssd_bytes_written"],
        "bytes_written_per_prompt_token": share(
            result["ssd_bytes_written"], result["prompt_tokens"]
        ),
        "dram_evictions": result["dram_evictions"],
        "ssd_evictions": result["ssd_evictions"],
        "without_history": result["without_history"],
        "not_saved": result["not_saved"],
        "turns_per_s": share(turns, took_s),
        "steps": steps.rows,
    }
