"""Replays the policy experiments of the CachedAttention paper and reports them beside its numbers.

Workloads are named in bench/workloads/paper_policy.json and their traces are drawn
(bench/workloads/sharegpt_like.py). Writes RESULTS/paper_policy.jsonl, a row for each (workload,
policy, seed), and RESULTS/paper_policy.md from it. --scale plays a part of everything: sessions,
slots, tiers and disks, at the same times; a smaller part is faster and its numbers spread more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH.parent), str(BENCH), str(BENCH / "workloads")]

from layer_times import Machine, with_preload, with_saving  # noqa: E402
from sharegpt_like import write_trace  # noqa: E402

from cachedattn.config import parse_size  # noqa: E402
from cachedattn.cost import Prices  # noqa: E402
from cachedattn.replay import KV_BYTES, Cell, Hardware, Replayer, Server  # noqa: E402
from cachedattn.trace import Trace, read_trace  # noqa: E402

WORKLOADS = BENCH / "workloads" / "paper_policy.json"
TIME_TO_LIVE_S = 3600  # of the capacity experiment, and the time that its sessions are counted in

Row = dict[str, Any]


def tiers(workload: Row) -> tuple[int, int]:
    """Bytes of DRAM and SSD at full scale."""
    dram = parse_size(workload["dram"])
    if "ratio" not in workload:
        return dram, int(workload["usable"] * parse_size(workload["ssd"]))
    # CCpUT: the sessions that arrive in that time, each of the longest KV there is.
    longest = workload["window"] * KV_BYTES[workload["model"]]
    all_of_them = TIME_TO_LIVE_S * workload["per_second"] * longest
    return dram, int(workload["ratio"] * all_of_them) - dram


def trace_of(workload: Row, seed: int, scale: float, folder: Path) -> Trace:
    """The drawn trace."""
    path = folder / "trace.jsonl.gz"
    rate = scale * workload["per_second"]
    about = write_trace(path, int(scale * workload["sessions"]), rate, workload["think_s"], seed)
    print(f"  seed {seed}: {about}", file=sys.stderr, flush=True)
    return read_trace(path)


def play(workload: Row, seed: int, scale: float, folder: Path) -> list[Row]:
    """A row for each policy."""
    trace = trace_of(workload, seed, scale, folder)
    server = Server(
        slots=int(scale * workload["slots"]),
        turns_per_second=scale * workload["turns_per_second"],
        window=workload["window"],
        prefill_rate=workload["prefill_rate"],
    )
    hardware = Hardware(
        token_bytes=KV_BYTES[workload["model"]],
        ssd_read=scale * parse_size(workload["ssd_read"]),
        ssd_write=scale * parse_size(workload["ssd_write"]),
    )
    replayer = Replayer(
        trace,
        server,
        hardware,
        workload["granularity"],
        warmup=int(scale * workload["warmup"]),
        # The part of a machine: prices of a GPU are of the whole.
        prices=Prices(gpu=scale * Prices().gpu, gpus=workload["gpus"]),
    )
    dram, ssd = (int(scale * size) for size in tiers(workload))
    rows = []
    for policy in workload["policies"]:
        row = replayer.play(Cell(policy, 0.0, dram, ssd))
        span = float(replayer.schedule(0.0).completion.max())
        shown = f"{100 * row['per_turn']:.1f} % of turns, {100 * row['dram_share']:.1f} % in DRAM"
        print(f"  {workload['name']} {policy}: {shown}", file=sys.stderr, flush=True)
        rows.append({"workload": workload["name"], "seed": seed, "scale": scale, **row})
        rows[-1]["read_rate"] = row["bytes_read"] / span / scale
    return rows


def play_all(spec: Row, scale: float, num_seeds: int, only: str, output: Path) -> None:
    """Plays those whose names begin with `only` and that `output` lacks, adding row by row."""
    known = set()
    if output.exists():
        for text in output.read_text(encoding="utf-8").splitlines():
            row = json.loads(text)
            known.add((row["workload"], row["seed"], row["scale"]))
    every = [w for experiment in spec["experiments"] for w in experiment["workloads"]]
    workloads = [workload for workload in every if workload["name"].startswith(only)]
    with tempfile.TemporaryDirectory() as folder, output.open("a", encoding="utf-8") as file:
        for number, workload in enumerate(workloads, 1):
            workload = {**spec["defaults"], **workload}
            print(f"{workload['name']} ({number} of {len(workloads)})", file=sys.stderr, flush=True)
            for seed in workload["seeds"][:num_seeds]:
                if (workload["name"], seed, scale) in known:
                    continue
                for row in play(workload, seed, scale, Path(folder)):
                    file.write(json.dumps(row) + "\n")
                file.flush()


def spread(rows: list[Row], name: str) -> str:
    """Mean in percent, and the range where there are several."""
    values = [100 * row[name] for row in rows]
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f}-{max(values):.1f})"


def percent(value: float | None) -> str:
    """Of the paper's numbers; those that it does not give are '-'."""
    return "-" if value is None else f"{100 * value:.3g}"


def table(experiment: Row, rows: list[Row]) -> list[str]:
    """Markdown of one experiment."""
    lines = [
        "| workload | policy | scale | turns: paper | turns | best possible | later turns whole "
        "| from DRAM: paper | from DRAM | saved: paper | saved |",
        "| --- | --- |" + " ---: |" * 9,
    ]
    for workload in experiment["workloads"]:
        here = [row for row in rows if row["workload"] == workload["name"]]
        for policy, scale in dict.fromkeys((row["policy"], row["scale"]) for row in here):
            own = [row for row in here if (row["policy"], row["scale"]) == (policy, scale)]
            for row in own:
                row["saved"] = 1 - row["cost"]["total"] / row["cost_without"]["total"]
            values = [
                workload["name"],
                policy,
                f"{scale:g}",
                percent(workload.get("paper", {}).get(policy)),
                spread(own, "per_turn"),
                spread(own, "min_per_turn"),
                spread(own, "full_prefix"),
                percent(workload.get("paper_dram", {}).get(policy)),
                spread(own, "dram_share"),
                percent(workload.get("saved") if policy == "lookahead" else None),
                # A part of the slots would not prefill at a part of the speed.
                spread(own, "saved") if scale == 1 else "-",
            ]
            lines.append("| " + " | ".join(values) + " |")
    return lines


def layer_tables() -> list[str]:
    """Markdown of the time model."""
    machine = Machine()
    none = with_preload(machine, 16, 1000, 100, None)
    paper = {0: "-35", 15: "-61"}
    lines = ["| read buffer, layers | paper, % | model, % |", "| ---: | ---: | ---: |"]
    for buffer in (0, 5, 10, 15, 20):
        change = 100 * (with_preload(machine, 16, 1000, 100, buffer) / none - 1)
        lines.append(f"| {buffer} | {paper.get(buffer, '-')} | {change:.0f} |")
    lines += ["", "| prompt, tokens | paper, % | model, % |", "| ---: | ---: | ---: |"]
    for prompt in (1000, 1200, 1400, 1600):
        times = [with_saving(machine, 16, prompt, 20, way) for way in (True, False)]
        lines.append(f"| {prompt} | -13 to -15 | {100 * (times[0] / times[1] - 1):.1f} |")
    return lines


def report(spec: Row, rows: list[Row], notes: str) -> str:
    """The whole report; `notes` say why numbers differ."""
    lines = [
        "# The paper's policy experiments",
        "",
        "Generated by `bench/paper_policy.py`; every row is in `paper_policy.jsonl`. Shares in "
        "percent, ranges over seeds. *Scale*: the part of sessions, slots, tiers and disks.",
        "*Turns*: all measured turns, first ones included, that found at least half of their "
        "history. *From DRAM*: of the tokens found, those in DRAM when their turn began. "
        "*Saved*: of the cost of a million turns without a store, at the paper's prices.",
        "",
        notes.strip(),
    ]
    for experiment in spec["experiments"]:
        lines += ["", f"## {experiment['title']}", "", *table(experiment, rows)]
    lines += ["", "## Layer-wise preloading and asynchronous saving", "", *layer_tables()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=BENCH / "results")
    parser.add_argument("--scale", type=float, default=1.0, help="part of everything (default: 1)")
    parser.add_argument("--seeds", type=int, default=3, help="at most so many (default: 3)")
    parser.add_argument("--only", default="", help="workloads whose names begin like this")
    parser.add_argument("--quick", action="store_true", help="scale 0.125, the first seed alone")
    parser.add_argument("--report", action="store_true", help="write the report, play nothing")
    args = parser.parse_args()
    if not 1 / 24 <= args.scale <= 1:
        parser.error("--scale: must be from 1/24 to 1")
    spec = json.loads(WORKLOADS.read_text(encoding="utf-8"))
    output = args.results / "paper_policy.jsonl"
    if not args.report:
        scale, seeds = (0.125, 1) if args.quick else (args.scale, args.seeds)
        play_all(spec, scale, seeds, args.only, output)
    rows = [json.loads(text) for text in output.read_text(encoding="utf-8").splitlines()]
    notes = (BENCH / "workloads" / "paper_policy_notes.md").read_text(encoding="utf-8")
    (args.results / "paper_policy.md").write_text(report(spec, rows, notes), encoding="utf-8")


if __name__ == "__main__":
    main()
