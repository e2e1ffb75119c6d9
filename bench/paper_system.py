"""Markdown of what bench_multiturn.py --json printed, beside the paper's numbers:
bench/paper_system.py RESULTS.jsonl"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# CachedAttention (USENIX ATC 2024), section 4.2: against recomputing, by model.
PAPER = {
    "LLaMA-13B": (-85, 6.8, 86),
    "LLaMA-65B": (-61, 2.6, 71),
    "LLaMA-70B": (-87, 7.8, 89),
    "Falcon-40B": (-86, 7.2, 90),
}


def table(rows: list[Row]) -> list[str]:
    """A line a mode, against the first."""
    lines = [
        "| mode | turns | reused, % | TTFT mean, s | p50 | p99 | TTFT, % | prompt tokens/s | x "
        "| busy, s | waited for: ssd | copy | queue | slots | $ a million turns |",
        "| --- |" + " ---: |" * 14,
    ]
    base = rows[0]
    for row in rows:
        values = [
            row["mode"],
            f"{row['turns']}",
            f"{100 * row['hit']:.1f}",
            f"{row['ttft_mean_s']:.3f}",
            f"{row['ttft_p50_s']:.3f}",
            f"{row['ttft_p99_s']:.3f}",
            f"{100 * (row['ttft_mean_s'] / base['ttft_mean_s'] - 1):+.0f}",
            f"{row['prompt_tokens_s']:,.0f}",
            f"{row['prompt_tokens_s'] / base['prompt_tokens_s']:.2f}",
            f"{row['busy_s']:.1f}",
            *(f"{row['stall_s'][cause]:.2f}" for cause in ("ssd", "copy", "queue", "slots")),
            f"{row['cost']['total']:,.0f}",
        ]
        lines.append("| " + " | ".join(values) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.results.read_text(encoding="utf-8").splitlines()]
    print("| the paper, 4 x A100 | TTFT, % | prompt tokens/s, x | turns with a hit, % |")
    print("| --- | ---: | ---: | ---: |")
    for model, (ttft, rate, hits) in PAPER.items():
        print(f"| {model} | {ttft} | {rate} | {hits} |")
    for model, device in dict.fromkeys((row["model"], row["device"]) for row in rows):
        print(f"\n{model} on {device}:\n")
        own = [row for row in rows if (row["model"], row["device"]) == (model, device)]
        print("\n".join(table(own)))


if __name__ == "__main__":
    main()
