"""Markdown of what bench_multiturn.py and bench_overlap.py printed with --json, beside the paper's
numbers: bench/paper_system.py RESULTS.jsonl .."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
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

# Sections 3.2 and 4.3, LLaMA-13B on one A100, batch 16: against no preload, against waiting saves.
PAPER_PRELOAD = {"PL-B0": "-35", "PL-B15": "-61"}
PAPER_SAVE = {"async": "-13 to -15"}


def markdown(head: str, lines: Iterable[list[str]]) -> list[str]:
    """A table: its first column is text, the others are numbers."""
    rule = "| --- |" + " ---: |" * (head.count("|") - 2)
    return [head, rule, *("| " + " | ".join(line) + " |" for line in lines)]


def table(rows: list[Row]) -> list[str]:
    """A line a mode, against the first."""
    head = (
        "| mode | turns | reused, % | TTFT mean, s | p50 | p99 | TTFT, % | prompt tokens/s | x "
        "| busy, s | waited for: ssd | copy | queue | slots | $ a million turns |"
    )
    base = rows[0]
    lines = [
        [
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
        for row in rows
    ]
    return markdown(head, lines)


def preload_table(rows: list[Row]) -> list[str]:
    """A line a way of loading."""
    about = "{history:,} tokens of history, {new} new, batch {batch}".format_map(rows[0])
    head = (
        f"| {about} | TTFT, s | to NO-PL, % | to the floor, x | two streams, s "
        "| the paper (1K, 100 new, batch 16), % |"
    )
    lines = [
        [
            row["way"],
            f"{row['ttft_s']:.4f}",
            f"{100 * (row['to_no_preload'] - 1):+.1f}",
            f"{row['to_floor']:.3f}",
            f"{row['model_s']:.4f}" if "model_s" in row else "-",
            PAPER_PRELOAD.get(row["way"], "-"),
        ]
        for row in rows
    ]
    return markdown(head, lines)


def save_table(rows: list[Row]) -> list[str]:
    """A line a length and way of saving."""
    about = "{steps} decode steps, batch {batch}".format_map(rows[0])
    head = (
        f"| {about} | prompt | s | waited, s | left, s | to wait, % | to nothing, x "
        "| the paper (batch 16), % |"
    )
    lines = [
        [
            row["way"],
            f"{row['prompt']:,}",
            f"{row['seconds']:.3f}",
            f"{row['waited_s']:.4f}",
            f"{row['left_s']:.4f}",
            f"{100 * (row['to_wait'] - 1):+.1f}",
            f"{row['to_nothing']:.3f}",
            PAPER_SAVE.get(row["way"], "-"),
        ]
        for row in rows
    ]
    return markdown(head, lines)


def link_table(rows: list[Row]) -> list[str]:
    """A line a way over the link; ratios are to the plain copy beside as much other work."""
    plain = {row["way"]: row["gb_s"] for row in rows}
    about = f"DRAM to device, slices of {rows[0]['slice']:,} bytes"
    lines = []
    for row in rows:
        base = plain[row["way"].replace("store", "plain")]
        products = f"{row['products_s']:.4f}" if "products_s" in row else "-"
        rate = [f"{row['gb_s']:.2f}", f"{row['gb_s'] / base:.3f}"] if base else ["-", "-"]
        lines.append([row["way"], *rate, products])
    return markdown(f"| {about} | GB/s | to plain, x | products, s |", lines)


def sums_table(rows: list[Row]) -> list[str]:
    """A line."""
    shares = ", ".join(f"{100 * row['share']:.2f} %" for row in rows)
    return [f"Sums of what is saved, of the time of all kernels of a prefill: {shares}"]


TABLES = {"system": table, "preload": preload_table, "save": save_table}
TABLES |= {"link": link_table, "sums": sums_table}


def print_paper() -> None:
    head = "| the paper, 4 x A100 | TTFT, % | prompt tokens/s, x | turns with a hit, % |"
    print("\n".join(markdown(head, ([model, *map(str, row)] for model, row in PAPER.items()))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    lines = [line for path in args.results for line in path.read_text("utf-8").splitlines()]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in map(json.loads, lines):
        key = row["model"], row["device"], row.get("part", "system")
        groups.setdefault(key, []).append(row)
    if any(part == "system" for _, _, part in groups):
        print_paper()
    for (model, device, part), rows in groups.items():
        print(f"\n{model} on {device}:\n")
        print("\n".join(TABLES[part](rows)))


if __name__ == "__main__":
    main()
