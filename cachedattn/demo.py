"""`cachedattn demo`: a recorded conversation, with a restart in its middle, both ways.

Each half of the conversation runs in a process of its own (`demo_worker`), so what the second
half reuses came through the SSD tier.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cachedattn.cli_common import find_model, progress_bar, tiers_text

MAX_TOKENS = 24  # per answer


def conversation() -> dict[str, Any]:
    """The recorded conversation: 'title', 'system' and 'user_turns'."""
    return json.loads((files("cachedattn") / "data" / "garden.json").read_text("utf-8"))


def worker(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Plays `task` in a new process and yields its turns. ValueError with the worker's message
    when it cannot."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cachedattn.demo_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    with process:
        process.stdin.write(json.dumps(task))
        process.stdin.close()
        try:
            for line in process.stdout:
                record = json.loads(line)
                if "error" in record:
                    raise ValueError(record["error"])
                yield record
        except BaseException:  # Ctrl-C, or the caller has had enough
            process.terminate()
            raise
    if process.returncode != 0:
        raise RuntimeError(f"the demo's process ended with exit code {process.returncode}")


def play(task: dict[str, Any], user_turns: list[str], bar: Progress) -> list[dict[str, Any]]:
    """All turns: the first half in one process, the rest in another."""
    progress = bar.add_task("turn", total=len(user_turns))
    messages = [{"role": "system", "content": task["system"]}] if task["system"] else []
    turns: list[dict[str, Any]] = []
    half = len(user_turns) // 2
    for number, part in enumerate((user_turns[:half], user_turns[half:]), start=1):
        bar.update(progress, description=f"process {number}: loading the model")
        for turn in worker({**task, "messages": messages, "user_turns": part}):
            turns.append({"turn": len(turns) + 1, "process": number, **turn})
            messages.append({"role": "user", "content": user_turns[len(turns) - 1]})
            messages.append({"role": "assistant", "content": turn["answer"]})
            bar.update(progress, completed=len(turns), description=f"process {number}: turn")
    return turns


def totals(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums over all turns."""
    recompute = sum(turn["ttft_recompute_s"] for turn in turns)
    store = sum(turn["ttft_store_s"] for turn in turns)
    return {
        "prompt_tokens": sum(turn["prompt_tokens"] for turn in turns),
        "new_tokens": sum(turn["new_tokens"] for turn in turns),
        "ttft_recompute_s": recompute,
        "ttft_store_s": store,
        "ratio": store / recompute,
    }


def equal_text(turn: dict[str, Any]) -> str:
    """'yes', 'no', or what makes a difference a near tie."""
    if turn["equal"]:
        return "yes"
    return f"near tie at token {turn['tie']['position']}" if turn["near_tie"] else "NO"


def print_table(console: Console, result: dict[str, Any]) -> None:
    """The table of turns, the totals, and every near tie with both logits."""
    turns = result["turns"]
    table = Table(title=f"{result['conversation']}: {result['model']}, {result['dtype']}")
    table.add_column("turn", justify="right")
    table.add_column("history", justify="right")
    table.add_column("new", justify="right")
    table.add_column("history from")
    table.add_column("TTFT, recompute all, s", justify="right")
    table.add_column("TTFT, with the store, s", justify="right")
    table.add_column("ratio", justify="right")
    table.add_column("answers equal")
    for turn, following in zip(turns, [*turns[1:], turns[-1]], strict=True):
        table.add_row(
            str(turn["turn"]),
            f"{turn['history_tokens']:,}",
            f"{turn['new_tokens']:,}",
            tiers_text(turn["cached_from"]),
            f"{turn['ttft_recompute_s']:.3f}",
            f"{turn['ttft_store_s']:.3f}",
            f"{turn['ratio']:.3f}",
            equal_text(turn),
            end_section=following["process"] != turn["process"],
        )
    console.print(table)
    console.print("The line in the table is where the process ended and a new one went on.")
    total = result["totals"]
    console.print(
        f"Tokens computed before the first token: {total['prompt_tokens']:,} recomputing all, "
        f"{total['new_tokens']:,} with the store.\n"
        f"Time to first token, all turns: {total['ttft_recompute_s']:.2f} s recomputing all, "
        f"{total['ttft_store_s']:.2f} s with the store (ratio {total['ratio']:.3f})."
    )
    for turn in turns:
        if turn["near_tie"]:
            tie = turn["tie"]
            console.print(
                f"Turn {turn['turn']}, token {tie['position']}: the answers part where the top "
                f"two logits nearly tie. Recomputed {tie['recompute']}, from the store "
                f"{tie['store']}."
            )
    console.print(f"Chart: {result['chart']}")


def draw_chart(result: dict[str, Any], path: Path) -> None:
    """TTFT against history for both ways, as a PNG file."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    turns = result["turns"]
    history = [turn["history_tokens"] for turn in turns]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(history, [t["ttft_recompute_s"] for t in turns], "o-", label="recompute all")
    axes.plot(history, [t["ttft_store_s"] for t in turns], "s-", label="with the store")
    restart = next(turn for turn in turns if turn["process"] == 2)["history_tokens"]
    axes.axvline(restart, color="grey", linestyle=":", label="new process, history from SSD")
    axes.set_title(f"Time to first token, {result['model']}, {result['dtype']}")
    axes.set_xlabel("history, tokens")
    axes.set_ylabel("time to first token, s")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def run_demo(
    model: Path | None, output: Path, dtype: str, threads: int | None, as_json: bool
) -> int:
    """Plays, prints and draws; the exit code: 1 if an answer differs, near ties apart."""
    path = find_model(model)
    output.mkdir(parents=True, exist_ok=True)
    recorded = conversation()
    task = {
        "model": str(path),
        "dtype": dtype,
        "threads": threads,
        "max_tokens": MAX_TOKENS,
        "system": recorded["system"],
    }
    # Not in the system's folder for temporary files, which may lie in memory.
    with (
        tempfile.TemporaryDirectory(dir=output, prefix="store-") as folder,
        progress_bar() as bar,
    ):
        turns = play({**task, "store": folder}, recorded["user_turns"], bar)
    result: dict[str, Any] = {
        "conversation": recorded["title"],
        "model": path.stem,
        "dtype": dtype,
        "turns": turns,
        "totals": totals(turns),
        "all_equal": all(turn["equal"] for turn in turns),
        "chart": str(output / "ttft.png"),
    }
    draw_chart(result, output / "ttft.png")
    if as_json:
        print(json.dumps(result))
    else:
        print_table(Console(), result)
    return 0 if all(turn["equal"] or turn["near_tie"] for turn in turns) else 1
