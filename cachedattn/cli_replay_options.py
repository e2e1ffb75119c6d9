"""The options of `cachedattn replay` and `cachedattn simulate`; what they run is imported late."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]

KvModel = Annotated[
    str, typer.Option(help="llama-8b, -13b, -65b or -70b, or bytes of KV per token.")
]
SsdRead = Annotated[str, typer.Option(help="Read rate of the SSD, a second.")]
SsdWrite = Annotated[str, typer.Option(help="Write rate of the SSD, a second.")]
Copy = Annotated[
    str, typer.Option(help="Rate between DRAM and device, a second; 0: takes no time.")
]
Policies = Annotated[
    str,
    typer.Option(
        help="Policies with commas: lookahead, hazard, lru, fifo, each with any of +ended "
        "(told of last turns), +ttl=SECONDS (of idle sessions), +in-service (DRAM drops "
        "running ones first), +whole, +per-token."
    ),
]

replay_app = typer.Typer()


@replay_app.command()
def replay(
    trace: Annotated[
        Path, typer.Argument(help="JSON lines, plain or gzip; '-' reads standard input.")
    ],
    policy: Policies = "hazard,lookahead,lru",
    capacity: Annotated[
        str,
        typer.Option(help="Sizes with commas: percent of the trace's KV, or '4.4TB'."),
    ] = "2%,5%,10%",
    dram: Annotated[
        str | None, typer.Option(help="DRAM of each capacity; the rest is SSD. Default: all.")
    ] = None,
    ssd: Annotated[
        str | None, typer.Option(help="Size of the SSD tier, with --dram, in place of --capacity.")
    ] = None,
    load: Annotated[
        str | None, typer.Option(help="Loads with commas: work offered per slot. Default: 0.95.")
    ] = None,
    turns_per_second: Annotated[
        float | None, typer.Option(min=1e-6, help="Of all slots when busy, in place of a load.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, help="Turns that run at one time. Default: 24.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=0, help="Context in tokens; its oldest half is dropped.")
    ] = None,
    prefill_rate: Annotated[
        float | None, typer.Option(min=1e-6, help="New tokens a second. Default: 8000.")
    ] = None,
    decode_rate: Annotated[
        float | None, typer.Option(min=1e-6, help="Tokens a second of one answer. Default: 33.")
    ] = None,
    model: KvModel = "llama-13b",
    ssd_read: SsdRead = "5GB",
    ssd_write: SsdWrite = "3GB",
    copy: Copy = "0",
    arrivals_per_hour: Annotated[
        float, typer.Option(min=1e-6, help="Sessions, where a trace times only within them.")
    ] = 120.0,
    hours: Annotated[float, typer.Option(min=1e-6, help="Length of such a replay.")] = 12.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the arrivals that are drawn.")] = 0,
    warmup: Annotated[int, typer.Option(min=0, help="First turns that are not measured.")] = 0,
    granularity: Annotated[
        int, typer.Option(min=0, help="Tokens that are moved as one. Default: by mean prompt.")
    ] = 0,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Replays at one time. Default: cores.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="That the server has, for the costs.")] = 1,
    gpu_price: Annotated[float, typer.Option(min=0, help="Dollars for one, an hour.")] = 5.0,
    dram_price: Annotated[float, typer.Option(min=0, help="Dollars a GB and hour.")] = 0.0088,
    ssd_price: Annotated[float, typer.Option(min=0, help="Dollars a GB and hour.")] = 0.000082,
    plot: Annotated[Path | None, typer.Option(help="Draw the shares of ideal (PNG).")] = None,
    as_json: Json = False,
) -> None:
    """Replay a recorded workload through the store, in virtual time on modelled hardware.

    What is kept, prefetched and dropped is decided by the code of the live store. Prints, for
    every load, capacity and policy, the tokens found as a share of what an unlimited store
    would find, beside the best possible (MIN), the share of turns that found at least half of
    their history, and the share of later turns that found all of it; then what a million turns
    cost with the store and without.
    """
    given = dict(locals())
    from cachedattn.cli_replay import ReplayArgs, run_replay

    run_replay(ReplayArgs(**given))


@replay_app.command()
def simulate(
    conversations: Annotated[int, typer.Argument(min=1, help="How many to generate.")],
    turns: Annotated[float, typer.Option(help="Mean turns of a conversation (geometric).")] = 3.0,
    prompt: Annotated[
        float, typer.Option(help="Mean tokens that a turn's prompt adds (lognormal).")
    ] = 300.0,
    answer: Annotated[float, typer.Option(help="Mean tokens of an answer (lognormal).")] = 500.0,
    think: Annotated[
        float, typer.Option(help="Mean seconds from an answer to the next turn (exponential).")
    ] = 60.0,
    context: Annotated[
        int, typer.Option(help="Tokens; a conversation ends when another turn might not fit.")
    ] = 32768,
    load: Annotated[
        float, typer.Option(help="Work offered per slot; says how often conversations arrive.")
    ] = 0.95,
    slots: Annotated[int, typer.Option(min=1, help="Turns that run at one time.")] = 24,
    policy: Annotated[str, typer.Option(help="Policies with commas, as in replay.")] = "hazard",
    dram: Annotated[str, typer.Option(help="Size of the DRAM tier.")] = "128GB",
    ssd: Annotated[str, typer.Option(help="Size of the SSD tier; 0: none.")] = "10TB",
    model: KvModel = "llama-13b",
    ssd_read: SsdRead = "5GB",
    ssd_write: SsdWrite = "3GB",
    copy: Copy = "0",
    granularity: Annotated[
        int, typer.Option(min=0, help="Tokens that are moved as one. Default: by mean lengths.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    as_json: Json = False,
) -> None:
    """Play generated conversations, any number of them, through the store in virtual time.

    They arrive at random and are drawn as they come up, so memory is bounded by what lives and
    what the modelled tiers hold. Prints what replay prints of a trace where it makes sense, and
    what the store's decisions took: turns a second, CPU time a turn and memory, early and late.
    """
    from cachedattn.cli_replay import hardware_of
    from cachedattn.cli_simulate import run_simulate
    from cachedattn.config import parse_size
    from cachedattn.simulate import Shape

    shape = Shape(conversations, turns, prompt, answer, think, context, slots, load, seed)
    hardware = hardware_of(model, ssd_read, ssd_write, copy)
    sizes = (parse_size(dram), parse_size(ssd))
    run_simulate(shape, hardware, policy, *sizes, granularity, as_json)
