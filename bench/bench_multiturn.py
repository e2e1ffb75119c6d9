"""The paper's system experiment: chats with think times, played in real time on one engine a mode.

    python bench/bench_multiturn.py --json                        # the demo's model, on the CPU
    python bench/bench_multiturn.py --device cuda --shape llama-8b

Conversations are drawn by a seed: turns geometric, lengths lognormal after what CachedAttention
(USENIX ATC'24, section 4.1) says of ShareGPT; sessions arrive as a Poisson process, and a user
thinks before each further turn. Answers have the drawn length, their ids are what the model says.
Every mode plays the same conversations:

    recompute   nothing is found: each turn computes its whole history (the paper's RE). On a GPU
                its KV still leaves for DRAM, asynchronously, which costs this mode a little
    overflow    a store whose history is lost whenever a context overflows: the client cuts its
                oldest half (OF)
    wait        a store; all layers are waited for before the first is computed, and each step
                waits for its saves
    preload     the same, layer l waits for layer l alone (the paper's PL-B0)
    buffer      the same, a turn joins the others when its computing hides the rest of its loading
                (a read buffer as deep as that takes)
    store       the same, and saves run on under later steps: the product

Prints one JSON line a mode, then a table. `hit` is reused of prompt tokens; `busy_s` the seconds
in steps; `prompt_tokens_s` prompt tokens, the reused ones included, a second in steps that had a
prompt in them; `stall_s` the seconds that turns waited, by cause; `cost` dollars for a million
turns at the paper's prices, as if --device were one of its GPUs.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from models import add_options, load_model

from cachedattn.config import KvLayout, StoreConfig, parse_size
from cachedattn.cost import PAPER_PRICES, cost
from cachedattn.engine import Engine
from cachedattn.model import CausalLM
from cachedattn.request import Request
from cachedattn.sampling import SamplingParams
from cachedattn.store import AttentionStore

MODES = ("recompute", "overflow", "wait", "preload", "buffer", "store")
STEP_TOKENS = 512  # computed in a step at most


@dataclass
class Conversation:
    """A chat to be played: its turns as (user's tokens, answer's tokens), and what was said."""

    arrival_s: float
    turns: list[tuple[int, int]]
    think_s: list[float]
    tokens: list[int] = field(default_factory=list)
    done: int = 0


@dataclass
class Turn:
    """What a turn measured."""

    ttft_s: float
    prompt: int
    reused: int


def draw(args: argparse.Namespace) -> list[Conversation]:
    """The conversations of `args.seed`, by arrival."""
    rng = random.Random(args.seed)
    now, out = 0.0, []
    for _ in range(args.conversations):
        now += rng.expovariate(args.rate)
        count = 1 + min(int(math.log(1 - rng.random()) / math.log(1 - 1 / args.turns)), 39)
        turns = [(lognormal(rng, args.user), lognormal(rng, args.answer)) for _ in range(count)]
        thinking = [rng.expovariate(1 / args.think) for _ in turns]
        out.append(Conversation(now, turns, thinking))
    return out


def lognormal(rng: random.Random, mean: float, sigma: float = 0.8) -> int:
    return max(1, round(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))


class WaitFirst:
    """A model that waits for all layers of the history before it computes the first."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def forward(self, batch: Any) -> torch.Tensor:
        for layer in range(len(batch.kv)):
            batch.wait_layer(layer)
        return self.runner.forward(batch)


class Player:
    """Plays conversations on an engine, in real time."""

    def __init__(self, engine: Engine, mode: str, args: argparse.Namespace) -> None:
        self.engine, self.mode, self.args = engine, mode, args
        self.rng = random.Random(args.seed + 1)
        self.turns: list[Turn] = []
        self.busy_s = self.prompt_s = self.span_s = 0.0
        self.stall_s: dict[str, float] = {}
        self.running: dict[int, tuple[Request, Conversation]] = {}

    def start(self, conversation: Conversation) -> None:
        user, answer = conversation.turns[conversation.done]
        vocab = self.engine.model.config.vocab_size
        conversation.tokens += [self.rng.randrange(vocab) for _ in range(user)]
        limit = self.args.window - answer
        if self.mode in ("recompute", "overflow") and len(conversation.tokens) > limit:
            conversation.tokens = conversation.tokens[-(self.args.window // 2) :]
        sampling = SamplingParams(max_tokens=answer, ignore_eos=True)
        request = self.engine.add_request(conversation.tokens, sampling)
        self.running[request.id] = (request, conversation)

    def step(self) -> list[Conversation]:
        """One step of the engine; the conversations whose turn ended."""
        begin = time.perf_counter()
        waiting = {i for i, (request, _) in self.running.items() if not request.output_ids}
        ended = self.engine.step()
        if self.mode in ("wait", "preload", "buffer"):
            self.engine.store.drain()
        seconds = time.perf_counter() - begin
        self.busy_s += seconds
        self.prompt_s += seconds if waiting else 0.0
        out = []
        for request in ended:
            reply = request.reply()
            _, conversation = self.running.pop(request.id)
            cached = min(reply.num_cached_tokens, reply.num_prompt_tokens)
            self.turns.append(Turn(reply.ttft_s, reply.num_prompt_tokens, cached))
            conversation.tokens = conversation.tokens + reply.token_ids
            conversation.done += 1
            out.append(conversation)
        return out

    def play(self, conversations: list[Conversation], advance: Callable[[], None]) -> None:
        begin = time.perf_counter()
        due = [(c.arrival_s, i, c) for i, c in enumerate(conversations)]
        heapq.heapify(due)
        while due or self.running:
            now = time.perf_counter() - begin
            while due and due[0][0] <= now:
                self.start(heapq.heappop(due)[2])
            if not self.running:
                time.sleep(max(0.0, due[0][0] - now))
                continue
            for conversation in self.step():
                advance()
                if conversation.done < len(conversation.turns):
                    back = time.perf_counter() - begin + conversation.think_s[conversation.done]
                    heapq.heappush(due, (back, id(conversation), conversation))
        self.span_s = time.perf_counter() - begin
        self.stall_s = self.engine.stats()["stall_s"]

    def tiers(self) -> tuple[int, int]:
        """Bytes of DRAM and SSD that are paid for."""
        if self.mode == "recompute":
            return 0, 0
        return parse_size(self.args.dram), parse_size(self.args.ssd)

    def row(self) -> dict[str, Any]:
        ttft = sorted(turn.ttft_s for turn in self.turns)
        prompt = sum(turn.prompt for turn in self.turns)
        return {
            "mode": self.mode,
            "turns": len(self.turns),
            "prompt_tokens": prompt,
            "hit": sum(turn.reused for turn in self.turns) / prompt,
            "ttft_mean_s": statistics.fmean(ttft),
            "ttft_p50_s": statistics.median(ttft),
            "ttft_p99_s": ttft[min(len(ttft) - 1, int(0.99 * len(ttft)))],
            "prompt_tokens_s": prompt / self.prompt_s,
            "busy_s": self.busy_s,
            "stall_s": self.stall_s,
            "cost": cost(PAPER_PRICES, self.busy_s, self.span_s, *self.tiers(), len(ttft)),
        }


@contextmanager
def engine_for(
    mode: str, model: CausalLM, layout: KvLayout, args: argparse.Namespace
) -> Iterator[Engine]:
    """An engine of its own for the mode, with an empty store."""
    pool: int | str = args.pool
    if args.device != "cpu" and parse_size(pool) == 0:
        pool = model.pool_bytes(STEP_TOKENS)
    with tempfile.TemporaryDirectory(dir=".", prefix="cachedattn-bench-") as folder:
        config = StoreConfig(
            dram=args.dram,
            device=pool,
            **({} if mode == "recompute" else {"ssd": args.ssd, "path": folder + "/store"}),
            policy=args.policy,
        )
        on = {} if args.device == "cpu" else {"device": args.device}
        with AttentionStore(config, layout, **on) as store:
            engine = Engine(
                model,
                None,
                store,
                max_model_len=args.window,
                reuse=mode != "recompute",
                max_num_seqs=args.slots,
                max_step_tokens=STEP_TOKENS,
            )
            if mode == "wait":
                engine.runner = WaitFirst(engine.runner)
            if mode in ("wait", "preload"):
                engine.scheduler.others_first = False
            yield engine
            engine.close()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    add = parser.add_argument
    add("--modes", default=",".join(MODES), help="with commas, in this order")
    add("--conversations", type=int, default=40)
    add("--rate", type=float, default=1.0, help="new conversations a second")
    add("--turns", type=float, default=5.75, help="mean of a conversation")
    add("--think", type=float, default=10.0, help="mean seconds before a further turn")
    add("--user", type=float, default=100, help="mean tokens of a user's message")
    add("--answer", type=float, default=60, help="mean tokens of an answer")
    add("--window", type=int, default=2048, help="tokens at which a context overflows")
    add("--slots", type=int, default=16, help="conversations computed at a time")
    add("--pool", default="0", help="device pool; 0: none; on CUDA what is free")
    add("--dram", default="1GiB")
    add("--ssd", default="8GiB")
    add("--policy", default="hazard")
    add("--seed", type=int, default=1)
    add("--json", action="store_true", help="print JSON lines alone")
    args = parser.parse_args()
    args.modes = args.modes.split(",")
    if unknown := set(args.modes) - set(MODES):
        parser.error(f"--modes: {', '.join(unknown)} is none of {', '.join(MODES)}")
    if args.turns <= 1 or min(args.rate, args.think, args.user, args.answer) <= 0:
        parser.error("--turns must be above 1; --rate, --think, --user and --answer positive")
    return args


@contextmanager
def progress(mode: str, total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """What is called behind each turn. rich is needed only where its bar is shown."""
    if not shown:
        yield lambda: None
        return
    from cachedattn.cli_common import progress_bar

    with progress_bar() as bar:
        task = bar.add_task(mode, total=total)
        yield lambda: bar.advance(task)


def print_table(rows: list[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in ("mode", "turns", "hit", "TTFT mean", "p50", "p99", "prompt tok/s", "busy s"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for row in rows:
        times = [f"{row[f'ttft_{name}_s']:.3f}" for name in ("mean", "p50", "p99")]
        rate, busy = f"{row['prompt_tokens_s']:,.0f}", f"{row['busy_s']:.1f}"
        table.add_row(row["mode"], str(row["turns"]), f"{row['hit']:.1%}", *times, rate, busy)
    Console().print(table)


def main() -> None:
    args = parse_args()
    model, layout, name = load_model(args, args.window)
    shown = not args.json and sys.stderr.isatty()
    rows = []
    for mode in args.modes:
        conversations = draw(args)
        total = sum(len(c.turns) for c in conversations)
        with (
            progress(mode, total, shown) as advance,
            engine_for(mode, model, layout, args) as engine,
        ):
            player = Player(engine, mode, args)
            player.play(conversations, advance)
        rows.append({"model": name, "device": args.device, **player.row()})
        if args.json:
            print(json.dumps(rows[-1]), flush=True)
    if not args.json:
        print_table(rows, f"{name}, {args.conversations} conversations, seed {args.seed}")


if __name__ == "__main__":
    main()
