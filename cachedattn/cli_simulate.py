"""`cachedattn simulate`: generated conversations through the store, in virtual time."""

from __future__ import annotations

import json
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from cachedattn import _core
from cachedattn.cli_common import progress_bar
from cachedattn.cli_replay import parts, size_text
from cachedattn.replay import Hardware
from cachedattn.simulate import Shape, simulate


def print_table(shape: Shape, rows: list[dict[str, Any]]) -> None:
    """A row for each policy."""
    table = Table(
        title=f"{shape.conversations:,} conversations, {rows[0]['turns']:,} turns in "
        f"{rows[0]['days']:,.1f} days, load {shape.load:g}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption="ideal: tokens found, of an unlimited store's; turn: turns that found half; "
        "full: later turns that found all (%); us a turn, memory: CPU time of all that the store "
        "does, and resident memory, in the first tenth of the run and in the last",
    )
    names = ("queue", "size", "policy", "ideal", "turn", "full", "DRAM", "wait, s", "written")
    for name in (*names, "turns/s", "us a turn", "memory"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for row in rows:
        ends = (row["steps"][0], row["steps"][-1]) if row["steps"] else ()
        table.add_row(
            f"{row['mean_queue']:.1f}",
            size_text(row["capacity"]),
            row["policy"],
            *(f"{100 * row[name]:.1f}" for name in ("of_ideal", "per_turn", "full_prefix")),
            f"{100 * row['dram_share']:.1f}",
            f"{row['ssd_wait_s']:,.0f}",
            size_text(row["bytes_written"]),
            f"{row['turns_per_s']:,.0f}",
            " - ".join(f"{step['turn_us']:.1f}" for step in ends),
            " - ".join(size_text(step["resident_bytes"]) for step in ends),
        )
    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(table)


def run_simulate(
    shape: Shape,
    hardware: Hardware,
    policy: str,
    dram: int,
    ssd: int,
    granularity: int,
    as_json: bool,
) -> None:
    """Plays and prints one policy after the other; none runs when an option is wrong."""
    policies = parts(policy, "--policy")
    for name in policies:
        _core.check_policy(name)
    columns = (TextColumn("simulating"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    rows = []
    with progress_bar(*columns) as bar:
        task = bar.add_task("", total=len(policies) * shape.conversations)
        for number, name in enumerate(policies):
            before = number * shape.conversations

            def report(ended: int, before: int = before) -> None:
                bar.update(task, completed=before + ended)

            rows.append(simulate(shape, hardware, name, dram, ssd, granularity, progress=report))
            if as_json:
                print(json.dumps(rows[-1]), flush=True)
    if not as_json:
        print_table(shape, rows)
