"""`cachedattn replay`: what the store would have found of a recorded workload's histories."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from cachedattn import _core
from cachedattn.cli_common import progress_bar
from cachedattn.config import parse_size
from cachedattn.cost import Prices
from cachedattn.replay import KV_BYTES, Cell, Hardware, Replayer, Server, play_all
from cachedattn.trace import Trace, draw_sessions, read_trace


@dataclass(frozen=True)
class ReplayArgs:
    """The options of the command, as they were given."""

    trace: Path
    policy: str
    capacity: str
    dram: str | None
    ssd: str | None
    load: str | None
    turns_per_second: float | None
    slots: int | None
    window: int | None
    prefill_rate: float | None
    decode_rate: float | None
    model: str
    ssd_read: str
    ssd_write: str
    copy: str
    arrivals_per_hour: float
    hours: float
    seed: int
    warmup: int
    granularity: int
    jobs: int | None
    gpus: int
    gpu_price: float
    dram_price: float
    ssd_price: float
    plot: Path | None
    as_json: bool


def parts(text: str, option: str) -> list[str]:
    """What stands between the commas. ValueError: nothing does."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise ValueError(f"{option}: the list is empty")
    return found


def token_bytes(model: str) -> int:
    """Bytes of KV of one token, from a model's name or a number."""
    if model in KV_BYTES:
        return KV_BYTES[model]
    if model.isdecimal() and int(model) > 0:
        return int(model)
    raise ValueError(f"--model: '{model}' is none of {', '.join(KV_BYTES)}, nor a number of bytes")


def capacity_bytes(text: str, footprint: int) -> int:
    """A size, or a percentage of `footprint` bytes."""
    if not text.endswith("%"):
        return parse_size(text)
    try:
        percent = float(text[:-1])
    except ValueError:
        raise ValueError(f"--capacity: '{text}' is not a percentage") from None
    if not 0 < percent <= 1000:
        raise ValueError(f"--capacity: {text} is not above 0 % and at most 1000 %")
    return int(percent / 100 * footprint)


def loads(args: ReplayArgs, server: Server) -> list[float]:
    """The loads to play; 0 stands for the server's turns a second."""
    if args.load is None:
        return [0.0] if server.turns_per_second else [server.load]
    if args.turns_per_second is not None:
        raise ValueError("--load and --turns-per-second exclude each other")
    try:
        values = [float(part) for part in parts(args.load, "--load")]
    except ValueError:
        raise ValueError(f"--load: '{args.load}' is not a list of numbers") from None
    if not all(0 < value <= 100 for value in values):
        raise ValueError("--load: must be above 0 and at most 100")
    return values


def tiers(args: ReplayArgs, footprint: int) -> list[tuple[int, int]]:
    """(DRAM, SSD) bytes of each capacity."""
    if args.ssd is not None:
        if args.dram is None:
            raise ValueError("--ssd needs --dram; --capacity alone is DRAM alone")
        return [(parse_size(args.dram), parse_size(args.ssd))]
    sizes = [capacity_bytes(part, footprint) for part in parts(args.capacity, "--capacity")]
    if args.dram is None:
        return [(size, 0) for size in sizes]
    dram = parse_size(args.dram)
    for size in sizes:
        if size < dram:
            raise ValueError(f"--capacity: {size} bytes are less than the {dram} of --dram")
    return [(dram, size - dram) for size in sizes]


def hardware_of(model: str, ssd_read: str, ssd_write: str, copy: str) -> Hardware:
    """The modelled devices."""
    rates = {"ssd_read": parse_size(ssd_read), "ssd_write": parse_size(ssd_write)}
    for name, rate in rates.items():
        if not rate:
            raise ValueError(f"--{name.replace('_', '-')}: must be above 0")
    return Hardware(token_bytes=token_bytes(model), copy=parse_size(copy), **rates)


def server_of(args: ReplayArgs) -> Server:
    """The server that the options describe."""
    names = ("slots", "window", "turns_per_second", "prefill_rate", "decode_rate")
    given = {name: getattr(args, name) for name in names}
    return replace(Server(), **{k: v for k, v in given.items() if v is not None})


def prepare(args: ReplayArgs) -> tuple[Trace, Replayer, list[Cell]]:
    """All that is to be played. ValueError names the option or the line that is wrong."""
    policies = parts(args.policy, "--policy")
    for policy in policies:
        _core.check_policy(policy)
    server = server_of(args)
    hardware = hardware_of(args.model, args.ssd_read, args.ssd_write, args.copy)
    load_values = loads(args, server)
    trace = read_trace(args.trace)
    if trace.relative:
        trace = draw_sessions(trace, args.arrivals_per_hour, args.hours, args.seed)
    prices = Prices(args.gpu_price, args.dram_price, args.ssd_price, args.gpus)
    replayer = Replayer(
        trace, server, hardware, args.granularity, warmup=args.warmup, prices=prices
    )
    if args.warmup >= len(trace):
        raise ValueError(f"--warmup: the trace has only {len(trace)} turns")
    for load in load_values:
        replayer.schedule(load)  # what is wrong with the window shows here
    block = replayer.granularity * hardware.token_bytes * _core.Replay.block_size
    sizes = tiers(args, trace.footprint * hardware.token_bytes)
    for size in (size for pair in sizes for size in pair):
        if 0 < size < block or size < 0:
            raise ValueError(f"{size} bytes hold no block of {block}; try a finer --granularity")
    cells = [
        Cell(policy, load, dram, ssd)
        for load in load_values
        for dram, ssd in sizes
        for policy in policies
    ]
    if any(cell.dram == 0 for cell in cells):
        raise ValueError("--dram: must be above 0")
    return trace, replayer, cells


def size_text(num_bytes: int) -> str:
    """'1.5 TB'."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def print_table(trace: Trace, replayer: Replayer, rows: list[dict[str, Any]]) -> None:
    """A row for each policy, capacity and load, MIN beside it."""
    bytes_text = size_text(trace.footprint * replayer.hardware.token_bytes)
    table = Table(
        title=f"{len(trace):,} turns, {trace.footprint / 1e6:.1f} M tokens ({bytes_text}), "
        f"{replayer.server.slots} slots",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption="ideal: tokens found, of an unlimited store's; MIN: the best possible; "
        "turn: turns that found half or more; full: later turns that found all (%)",
    )
    two_tiers = any(row["ssd"] for row in rows)
    for name in ("load", "queue", "size", "policy", "ideal", "MIN", "turn", "full", "MIN"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for name in ("DRAM", "wait, s", "written") if two_tiers else ():
        table.add_column(name, justify="right")
    table.add_column("TTFT p50", justify="right")
    table.add_column("p99, s", justify="right")
    shares = ("of_ideal", "min_of_ideal", "per_turn", "full_prefix", "min_full_prefix")
    for row, following in zip(rows, [*rows[1:], rows[-1]], strict=True):
        tiers = (
            f"{100 * row['dram_share']:.1f}",
            f"{row['ssd_wait_s']:,.0f}",
            size_text(row["bytes_written"]),
        )
        table.add_row(
            f"{row['load']:g}" if row["load"] else "rate",
            f"{row['mean_queue']:.1f}",
            size_text(row["capacity"]),
            row["policy"],
            *(f"{100 * row[name]:.1f}" for name in shares),
            *(tiers if two_tiers else ()),
            f"{row['ttft_s']['p50']:.2f}",
            f"{row['ttft_s']['p99']:.2f}",
            end_section=(row["load"], row["capacity"])
            != (following["load"], following["capacity"]),
        )
    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table)
    console.print(cost_table(replayer, rows))


def cost_table(replayer: Replayer, rows: list[dict[str, Any]]) -> Table:
    """What a million turns cost; the line without a policy recomputes every history."""
    prices = replayer.prices
    table = Table(
        title="Dollars for a million turns",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption=f"{prices.gpus} GPUs at ${prices.gpu:g}/h, DRAM ${prices.dram:g} and SSD "
        f"${prices.ssd:g} a GB and hour",
    )
    for name in ("load", "size", "policy", "GPU", "DRAM", "SSD", "all", "saved, %"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    parts = ("gpu", "dram", "ssd", "total")
    last = None
    for row in rows:
        load = f"{row['load']:g}" if row["load"] else "rate"
        without = row["cost_without"]
        if last != row["load"]:
            table.add_row(load, "0", "none", *(f"{without[part]:,.0f}" for part in parts), "")
        last = row["load"]
        table.add_row(
            load,
            size_text(row["capacity"]),
            row["policy"],
            *(f"{row['cost'][part]:,.0f}" for part in parts),
            f"{100 * (1 - row['cost']['total'] / without['total']):.1f}",
        )
    return table


def load_pyplot() -> Any:
    """matplotlib's pyplot, for files. ModuleNotFoundError: it is not installed."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    return pyplot


def draw_chart(rows: list[dict[str, Any]], path: Path) -> None:
    """Share of ideal against capacity, a panel for each load, MIN as the dashed line."""
    pyplot = load_pyplot()
    panels = sorted({row["load"] for row in rows})
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False
    )
    for axes, load in zip(grid[0], panels, strict=True):
        here = sorted((r for r in rows if r["load"] == load), key=lambda row: row["capacity"])
        for policy in dict.fromkeys(row["policy"] for row in here):
            own = [row for row in here if row["policy"] == policy]
            sizes = [row["capacity"] / 1e12 for row in own]
            axes.plot(sizes, [100 * row["of_ideal"] for row in own], "o-", label=policy)
        axes.plot(sizes, [100 * row["min_of_ideal"] for row in own], "k--", label="MIN")
        axes.set_title(f"load {load:g}" if load else "fixed rate")
        axes.set_xlabel("capacity, TB")
        axes.set_ylabel("tokens found, % of an unlimited store's")
        axes.set_ylim(0, 101)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def run_replay(args: ReplayArgs) -> None:
    """Replays and prints; nothing runs when an option or a line of the trace is wrong."""
    if args.plot is not None:
        load_pyplot()
    trace, replayer, cells = prepare(args)
    columns = (TextColumn("replaying"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    rows = []
    with progress_bar(*columns) as bar:
        task = bar.add_task("", total=len(cells) * len(trace))
        jobs = args.jobs or len(os.sched_getaffinity(0))
        for row in play_all(replayer, cells, jobs, lambda turns: bar.advance(task, turns)):
            rows.append(row)
            if args.as_json:
                print(json.dumps(row), flush=True)
    if not args.as_json:
        print_table(trace, replayer, rows)
    if args.plot is not None:
        draw_chart(rows, args.plot)
