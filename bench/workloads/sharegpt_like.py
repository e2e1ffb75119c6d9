"""Writes a trace of chats like the sample of ShareGPT that the CachedAttention paper used.

Of it the paper says: 9,000 conversations, 5.75 turns on average, 47 % of them longer than 2,000
tokens and 30 % longer than 4,000, arriving at random (Poisson), one a second. Lengths are drawn to
agree with that; the check is printed. It does not give a think time: a next turn is sent as soon
as the answer is complete, unless --think says otherwise. Lines: bench/workloads/README.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MAX_TURNS, MAX_QUERY, MAX_ANSWER = 50, 2000, 1500


def draw(sessions: int, per_second: float, think_s: float, seed: int) -> Iterator[dict[str, int]]:
    """The lines of the trace, session by session."""
    random = np.random.default_rng(seed)
    begins = np.cumsum(random.exponential(1 / per_second, sessions))
    turns = np.ceil(random.lognormal(0.85, 1.34, sessions)).clip(1, MAX_TURNS).astype(int)
    wordy = random.lognormal(-0.18, 0.6, sessions)  # some chats are: mean 1
    line = -1
    for session in range(sessions):
        length = 0
        count = turns[session]
        queries = 300 * wordy[session] * random.lognormal(-0.72, 1.2, count)
        answers = 600 * wordy[session] * random.lognormal(-0.245, 0.7, count)
        for k in range(count):
            query = int(queries[k].clip(1, MAX_QUERY))
            answer = int(answers[k].clip(1, MAX_ANSWER))
            yield {
                "t": int(1000 * begins[session]),
                "s": session,
                "k": k + 1,
                "p": line if k else -1,
                "c": int(k > 0),
                "in": length + query,
                "out": answer,
                "w": int(1000 * think_s) if k else 0,
            }
            line += 1
            length += query + answer


def write_trace(path: Path, sessions: int, per_second: float, think_s: float, seed: int) -> str:
    """Writes it; returns what it is like."""
    lengths: dict[int, int] = {}
    turns = 0
    with gzip.open(path, "wt", compresslevel=3, encoding="utf-8") as file:
        for line in draw(sessions, per_second, think_s, seed):
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
            lengths[line["s"]] = line["in"] + line["out"]
            turns += 1
    tokens = np.array(list(lengths.values()))
    return (
        f"{sessions:,} sessions, {turns:,} turns (mean {turns / sessions:.2f}), "
        f"{100 * (tokens > 2000).mean():.0f} % above 2,000 tokens, "
        f"{100 * (tokens > 4000).mean():.0f} % above 4,000"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="JSON lines, gzip")
    parser.add_argument("--sessions", type=int, default=9000)
    parser.add_argument("--per-second", type=float, default=1.0, help="sessions that arrive")
    parser.add_argument("--think", type=float, default=0.0, help="seconds before a next turn")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.sessions < 1 or args.per_second <= 0 or args.think < 0:
        parser.error("--sessions and --per-second must be above 0, --think not below")
    print(write_trace(args.output, args.sessions, args.per_second, args.think, args.seed))


if __name__ == "__main__":
    main()
