"""The paper's ablations on the engine: history loaded, and new KV saved, while layers compute.

    python bench/bench_overlap.py --json > overlap.jsonl          # the demo's model, on the CPU
    python bench/bench_overlap.py --device cuda --shape llama-13b
    python bench/paper_system.py overlap.jsonl                    # beside the paper's numbers

Preload (CachedAttention, USENIX ATC'24, section 3.2.1): a batch of turns, the history of each in
DRAM, until all of them have their first token.

    recompute   nothing is reused; what is saved is the full blocks of the new tokens, at the end
    NO-PL       all layers are waited for before the first is computed
    PL-Bn       layer l waits for layer l alone; the first n layers have been loaded before the
                clock starts, as a read buffer of n layers would have done under the last step
    floor       all of them have: what no way of loading can be faster than

Save (section 3.2.2): prompts of several lengths and some decode steps, in new conversations.

    wait        saves begin when a step is computed and are waited for, `waited_s` in all
    async       layer by layer under the step and later ones; `left_s` is what is left at the end
    nothing     all of it is in DRAM already: what no way of saving can be faster than

Link: bytes a second from DRAM to the device, nothing else to do but matrix products on a GPU.

    plain       as many bytes of pinned memory, in pieces of a layer slice, one stream: the limit
    store       the history of the batch, as NO-PL loads it
    .. busy     the same while matrix products run; `products_s` is what these took. Copies that
                take multiprocessors from them make that longer than without copies (`products`)

Sums, on a GPU: of the time of all kernels of a prefill, that of the sums of what is saved.

Without a GPU the device pool is memory of this process, and its streams are threads, which take
their time from the cores that compute. A block is saved when it is full, not token by token.

Ways take turns within each round; medians over the rounds, ratios within rounds. `model_s` is what
layer_times.py says of this `load_s` and this floor.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from layer_times import two_streams
from models import add_options, load_model
from torch.profiler import ProfilerActivity, profile

from cachedattn.batch import Batch
from cachedattn.config import KvLayout, StoreConfig
from cachedattn.engine import Engine
from cachedattn.model import CausalLM
from cachedattn.request import Request
from cachedattn.sampling import SamplingParams
from cachedattn.store import AttentionStore

BLOCK = 64
BUFFERS = {"PL-B0": 0, "PL-B5": 5, "PL-B10": 10, "PL-B15": 15}
PRELOADS = ("recompute", "NO-PL", *BUFFERS, "floor")
SAVES = ("wait", "async", "nothing")
LINKS = ("plain", "store")
BUSY_LINKS = (*LINKS, "products", "plain busy", "store busy")  # on a GPU
PRODUCTS, PRODUCT_SIZE = 64, 8192  # some 100 ms of an H100
STEP_TOKENS = 2048  # computed in a step at most; a preload's new tokens are one step in any case

Trial = dict[str, float]


class WaitFirst:
    """A model that waits for the first `layers` of the history before it computes."""

    def __init__(self, engine: Engine, layers: int) -> None:
        self.runner, self.store, self.layers = engine.runner, engine.store, layers
        self.waited_s = 0.0

    def forward(self, batch: Batch) -> torch.Tensor:
        begin = time.perf_counter()
        for layer in range(self.layers):
            batch.wait_layer(layer)
        self.store.poll_until_computed()  # a GPU has only been told to wait
        self.waited_s += time.perf_counter() - begin
        return self.runner.forward(batch)


@contextmanager
def engine_for(
    model: CausalLM, layout: KvLayout, batch: int, context: int, step_tokens: int, path: str = ""
) -> Iterator[Engine]:
    """An engine for batches of such contexts: the device pool holds one, DRAM two, in whole
    blocks with the padding of their slots; the SSD tier in `path`, if that is named, two."""
    blocks = batch * (-(-context // BLOCK) + 1)
    slot = BLOCK * layout.bytes_per_token + 4096 * (layout.num_layers + 1)
    dram = 2 * blocks * slot
    ssd = dram + 2**26 if path else 0
    config = StoreConfig(device=blocks * slot, dram=dram, ssd=ssd, path=path, load="always")
    with AttentionStore(config, layout, device=model.device) as store:
        engine = Engine(
            model,
            None,
            store,
            max_model_len=context,
            truncation=None,
            max_num_seqs=batch,
            max_step_tokens=step_tokens,
        )
        engine.scheduler.others_first = False  # the ways differ in this alone: what is waited for
        wait_until_pinned(store)
        yield engine
        engine.close()


def wait_until_pinned(store: AttentionStore) -> None:
    """On a GPU memory is pinned in the background; what is not yet is copied more slowly."""
    if store.device.type == "cpu":
        return
    before = -1
    while before < (now := store.stats()["pinned_bytes"]):
        before = now
        time.sleep(1)


def add_all(engine: Engine, prompts: list[list[int]], max_tokens: int) -> list[Request]:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return [engine.add_request(prompt, sampling) for prompt in prompts]


def preload(engine: Engine, way: str, prompts: list[list[int]], history: int) -> Trial:
    """Seconds until every prompt has its first token, and those that its loading was waited for
    ahead of the first layer. RuntimeError: the history came from elsewhere."""
    store, layers = engine.store, len(engine.store.kv)
    store.drop_tier("device")
    runner = engine.runner
    first = {"NO-PL": layers, "floor": layers, "recompute": 0, **BUFFERS}[way]
    waiting = engine.runner = WaitFirst(engine, min(first, layers))
    engine.scheduler.max_history = 0 if way == "recompute" else history
    store.needs_layer_done = way != "recompute"
    requests = add_all(engine, prompts, 2)  # the second token is not waited for
    unfinished = set(requests)
    begin = time.perf_counter()
    while unfinished:
        engine.step()
        for request in [r for r in unfinished if r.output_ids]:
            engine.abort(request)
            unfinished.remove(request)
    seconds = time.perf_counter() - begin
    engine.runner = runner
    found = {request.cached_from["dram"] for request in requests}
    if found != {engine.scheduler.max_history}:
        raise RuntimeError(f"{way}: the history of {history} is {found} in DRAM")
    buffered_s = 0.0 if way == "NO-PL" else waiting.waited_s
    return {"ttft_s": seconds - buffered_s, "load_s": waiting.waited_s}


def save(engine: Engine, way: str, prompts: list[list[int]], steps: int) -> Trial:
    """Seconds of all prompts and `steps` tokens of each, those of them that steps waited for
    saves, and those of the saves after that. RuntimeError: not all was saved."""
    store = engine.store
    store.drop_tier("device")
    if way != "nothing":
        store.drop_tier("dram")
    store.needs_layer_done = way == "async"  # else what is to be saved is when a step ends
    saved = store.stats()["bytes_saved"]
    requests = add_all(engine, prompts, steps + 1)
    waited_s = 0.0
    begin = time.perf_counter()
    while not all(request.finished for request in requests):
        engine.step()
        if way == "wait":
            waited_s += drain_s(store)
    seconds = time.perf_counter() - begin
    left_s = drain_s(store)
    saved = store.stats()["bytes_saved"] - saved
    full = sum(len(prompt) // BLOCK for prompt in prompts)
    if way != "nothing" and saved < full * BLOCK * store.layout.bytes_per_token:
        raise RuntimeError(f"{way}: only {saved} bytes were saved")
    return {"seconds": seconds, "waited_s": waited_s, "left_s": left_s, "saved_bytes": saved}


def drain_s(store: AttentionStore) -> float:
    """Seconds until nothing is being saved."""
    begin = time.perf_counter()
    store.drain()
    return time.perf_counter() - begin


class Link:
    """Trials of the ways to move a batch's history from DRAM to the device."""

    def __init__(self, engine: Engine, prompts: list[list[int]], history: int) -> None:
        self.engine, self.prompts, self.history = engine, prompts, history
        layout, device = engine.store.layout, engine.store.device
        slices = len(prompts) * history // BLOCK * layout.num_layers
        size = layout.bytes_per_token * BLOCK // layout.num_layers
        self.gpu = device.type == "cuda"
        self.host = torch.ones(slices, size, dtype=torch.uint8, pin_memory=self.gpu)
        self.device = torch.zeros(slices, size, dtype=torch.uint8, device=device)
        if self.gpu:
            self.stream = torch.cuda.Stream(device)
            self.factor = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device).bfloat16()
            self.product = torch.empty_like(self.factor)

    def copy_plainly(self) -> Trial:
        begin = time.perf_counter()
        if not self.gpu:
            self.device.copy_(self.host)
        else:
            with torch.cuda.stream(self.stream):
                for source, target in zip(self.host, self.device, strict=True):
                    target.copy_(source, non_blocking=True)
            self.stream.synchronize()
        return {"gb_s": 1e-9 * self.host.numel() / (time.perf_counter() - begin)}

    def load(self) -> Trial:
        before = self.engine.store.stats()
        preload(self.engine, "NO-PL", self.prompts, self.history)
        after = self.engine.store.stats()
        loaded, loading_s = (after[k] - before[k] for k in ("bytes_loaded", "loading_s"))
        return {"gb_s": 1e-9 * loaded / loading_s}

    def trial(self, way: str) -> Trial:
        products = way not in LINKS
        if products:
            times = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            times[0].record()
            for _ in range(PRODUCTS):
                torch.mm(self.factor, self.factor, out=self.product)
            times[1].record()
        trial = {"gb_s": 0.0}
        if way != "products":
            trial = self.copy_plainly() if way.startswith("plain") else self.load()
        if products:
            times[1].synchronize()
            trial["products_s"] = 1e-3 * times[0].elapsed_time(times[1])
        return trial


def in_turn(
    ways: tuple[str, ...], rounds: int, trial: Callable[[str], Trial]
) -> dict[str, list[Trial]]:
    """Every round's trials by way. Each round begins with another way."""
    trials: dict[str, list[Trial]] = {way: [] for way in ways}
    for number in range(rounds):
        first = number % len(ways)
        for way in ways[first:] + ways[:first]:
            trials[way].append(trial(way))
    return trials


def ratio(ours: list[Trial], others: list[Trial], name: str) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a[name] / b[name] for a, b in zip(ours, others, strict=True))


def medians(trials: list[Trial]) -> Trial:
    return {name: statistics.median(trial[name] for trial in trials) for name in trials[0]}


def preload_rows(
    args: argparse.Namespace, model: CausalLM, layout: KvLayout
) -> Iterator[dict[str, Any]]:
    """A row for each way."""
    rng = random.Random(1)
    vocab, length = model.config.vocab_size, args.history + args.new
    prompts = [[rng.randrange(vocab) for _ in range(length)] for _ in range(args.batch)]
    step_tokens = max(STEP_TOKENS, args.batch * args.new)
    with engine_for(model, layout, args.batch, length + 2, step_tokens) as engine:
        add_all(engine, [prompt[: args.history] for prompt in prompts], 1)
        while engine.scheduler.waiting or engine.scheduler.running:
            engine.step()

        def trial(way: str) -> Trial:
            return preload(engine, way, prompts, args.history)

        trial("PL-B0")  # warms up
        trials = in_turn(PRELOADS, args.rounds, trial)
        link = Link(engine, prompts, args.history)
        ways = BUSY_LINKS if link.gpu else LINKS
        links = in_turn(ways, args.rounds, link.trial)
    load_s = medians(trials["NO-PL"])["load_s"]
    floor_s = medians(trials["floor"])["ttft_s"]
    for way in PRELOADS:
        row = {"part": "preload", "way": way, "history": args.history, "new": args.new}
        row["ttft_s"] = medians(trials[way])["ttft_s"]
        row["to_no_preload"] = ratio(trials[way], trials["NO-PL"], "ttft_s")
        row["to_floor"] = ratio(trials[way], trials["floor"], "ttft_s")
        if way == "NO-PL" or way in BUFFERS:
            row["load_s"] = load_s
            row["model_s"] = two_streams(layout.num_layers, load_s, floor_s, BUFFERS.get(way))
        yield row
    for way in ways:
        yield {"part": "link", "way": way, "slice": link.host.shape[1], **medians(links[way])}


def save_rows(
    args: argparse.Namespace, model: CausalLM, layout: KvLayout
) -> Iterator[dict[str, Any]]:
    """A row for each length and way."""
    rng = random.Random(2)
    vocab, context = model.config.vocab_size, max(args.prompts) + args.steps + 1
    with engine_for(model, layout, args.batch, context, STEP_TOKENS) as engine:
        engine.scheduler.max_history = 0  # of `nothing`, too, all is computed
        for length in args.prompts:
            prompts = [[rng.randrange(vocab) for _ in range(length)] for _ in range(args.batch)]

            def trial(way: str, prompts: list[list[int]] = prompts) -> Trial:
                return save(engine, way, prompts, args.steps)

            trial("async")  # warms up, and leaves in DRAM what `nothing` finds there
            trials = in_turn(SAVES, args.rounds, trial)
            for way in SAVES:
                row = {"part": "save", "way": way, "prompt": length, "steps": args.steps}
                row |= medians(trials[way])
                row["to_wait"] = ratio(trials[way], trials["wait"], "seconds")
                row["to_nothing"] = ratio(trials[way], trials["nothing"], "seconds")
                yield row


def sums_rows(
    args: argparse.Namespace, model: CausalLM, layout: KvLayout
) -> Iterator[dict[str, Any]]:
    """One row. Without an SSD tier nothing is sealed, so nothing is summed."""
    if torch.device(args.device).type == "cpu":
        return
    length, vocab = max(args.prompts), model.config.vocab_size
    rng = random.Random(3)
    batches = [[[rng.randrange(vocab) for _ in range(length)] for _ in range(2)] for _ in "ab"]
    with (
        tempfile.TemporaryDirectory() as path,
        engine_for(model, layout, 2, length + 2, STEP_TOKENS, path) as engine,
    ):
        for prompts in batches:  # the first warms up
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                requests = add_all(engine, prompts, 1)
                while not all(request.finished for request in requests):
                    engine.step()
                engine.store.drain()
    times = {event.key: 1e-6 * event.self_device_time_total for event in profiler.key_averages()}
    sums_s = sum(seconds for name, seconds in times.items() if "LeafSums" in name)
    row = {"part": "sums", "way": "profile", "prompt": length, "sums_s": sums_s}
    yield row | {"kernels_s": sum(times.values()), "share": sums_s / sum(times.values())}


def text_of(row: dict[str, Any]) -> str:
    match row["part"]:
        case "preload":
            return f"{row['way']:24} {row['ttft_s']:8.4f} s, {row['to_no_preload']:.3f} of NO-PL"
        case "link":
            return f"link, {row['way']:18} {row['gb_s']:8.2f} GB/s"
        case "sums":
            return f"sums: {100 * row['share']:.2f} % of the kernels' time"
    what = f"{row['prompt']:,} + {row['steps']}, {row['way']}"
    return f"{what:24} {row['seconds']:8.4f} s, {row['to_wait']:.3f} of wait"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    add = parser.add_argument
    add("--batch", type=int, help="turns at a time; default: 16, as the paper's, on a CPU 2")
    add("--history", type=int, default=1024, help="tokens of each turn's history, whole blocks")
    add("--new", type=int, default=100, help="tokens of each turn that are not history")
    add("--prompts", default="1000,1200,1400,1600", help="tokens, with commas")
    add("--steps", type=int, default=20, help="decode steps after a prompt")
    add("--rounds", type=int, default=3)
    add("--json", action="store_true", help="print JSON lines alone")
    args = parser.parse_args()
    args.batch = args.batch or (2 if args.device == "cpu" else 16)
    args.prompts = [int(length) for length in args.prompts.split(",")]
    if args.history % BLOCK or min(args.history, args.new, args.steps, *args.prompts) < 1:
        parser.error(f"--history is in blocks of {BLOCK}; no count of tokens may be 0")
    return args


def main() -> None:
    args = parse_args()
    window = max(args.history + args.new + 2, max(args.prompts) + args.steps + 1)
    model, layout, name = load_model(args, window)
    about = {"model": name, "device": args.device, "dtype": args.dtype}
    about |= {"batch": args.batch, "rounds": args.rounds}
    for part in (preload_rows, sums_rows, save_rows):
        for row in part(args, model, layout):
            print(json.dumps(about | row) if args.json else text_of(row), flush=True)


if __name__ == "__main__":
    main()
