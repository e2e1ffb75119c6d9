"""Markdown of what `cachedattn replay --json` printed: bench/replay_table.py RESULTS.jsonl"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def cells(rows: list[Row]) -> dict[tuple[float, int], dict[str, Row]]:
    """Rows by load and capacity, then by policy."""
    table: dict[tuple[float, int], dict[str, Row]] = {}
    for row in rows:
        table.setdefault((row["load"], row["capacity"]), {})[row["policy"]] = row
    return table


def markdown(rows: list[Row]) -> list[str]:
    """A line for each load and capacity: % of ideal by policy, the optimum last."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    lines = [
        "| load | queue | capacity | " + " | ".join(policies) + " | MIN |",
        "| ---: | ---: | ---: |" + " ---: |" * (len(policies) + 1),
    ]
    for (load, capacity), found in cells(rows).items():
        some = next(iter(found.values()))
        shares = [f"{100 * found[p]['of_ideal']:.1f}" if p in found else "-" for p in policies]
        values = [f"{load:g}", f"{some['mean_queue']:.1f}", f"{capacity / 1e12:.3f} TB", *shares]
        lines.append("| " + " | ".join([*values, f"{100 * some['min_of_ideal']:.1f}"]) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    text = parser.parse_args().results.read_text(encoding="utf-8")
    print("\n".join(markdown([json.loads(line) for line in text.splitlines()])))


if __name__ == "__main__":
    main()
