"""Promises 1, 2 and 5 on whole conversations: whatever tier the history comes from, and whatever
happens to the file under the running store, the answers are those of recomputing, every request
ends, and a fault costs one prefill of the request that it hits and nothing of the others.

Free slots hold NaN: a read too early or too late shows in the logits. More conversations, or the
one that failed: CACHEDATTN_DIALOGUES=3000 CACHEDATTN_SEED=7 pytest tests/test_engine_faults.py
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_models import BLOCK, VOCAB, open_engine, save_model

import cachedattn as ca
from cachedattn._core import ComputeCost

LAYERS = 4
SLICE = 2 * BLOCK * 64 * 4
SLOT_BYTES = 4096 + LAYERS * SLICE
AT_ONCE = 3  # conversations in one engine
TURNS = 3
NUM_GROUPS = -(-int(os.environ.get("CACHEDATTN_DIALOGUES", "36")) // AT_ONCE)
FIRST_SEED = int(os.environ.get("CACHEDATTN_SEED", "1"))
LOGIT_TOLERANCE = 1e-4  # float32: other chunking, same products
OPTIONS = {"max_model_len": 384}  # no prompt waits for the budget of a step


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    path = save_model(tmp_path_factory.mktemp("model"), layers=LAYERS, heads=3, kv_heads=1)
    with open_engine(path, **OPTIONS) as engine:
        yield engine


class Group:
    """Conversations side by side in one engine, twice: recomputed, and over a store."""

    def __init__(self, baseline: ca.Engine, folder: Path, seed: int, faults: float) -> None:
        self.rng, costs = random.Random(seed), random.Random(f"costs {seed}")
        self.faults = faults
        self.baseline = baseline
        self.folder = folder / str(seed)
        device = self.rng.choice((0, 80 * (SLOT_BYTES - 4096)))
        self.config = ca.StoreConfig(
            dram=90 * SLOT_BYTES,
            ssd=120 * SLOT_BYTES + (4 << 20),
            path=str(self.folder),
            device=device,
            block_size=BLOCK,
            load=costs.choice(("always", "auto")),
            debug_poison=True,
        )
        self.cost = ComputeCost(step_tokens=48, token_s=10 ** costs.uniform(-6, -3))
        self.cuts = faults > 0 and self.rng.random() < 0.25
        self.seen: Counter[str] = Counter()

    def open(self) -> ca.Engine:
        layout = self.baseline.store.layout
        store = ca.AttentionStore(self.config, layout)
        engine = ca.Engine(self.baseline.model, None, store, owns_store=True, **OPTIONS)
        engine.scheduler.prefill.cost = lambda: self.cost
        return engine

    def play(self) -> Counter[str]:
        shared = self.tokens(self.rng.choice((0, 40)))
        histories = [shared + self.tokens(20) for _ in range(AT_ONCE)]
        engine = self.open()
        try:
            for turn in range(TURNS):
                prompts = [history + self.tokens(self.rng.randint(1, 40)) for history in histories]
                lengths = [self.rng.randint(1, 6) for _ in prompts]
                want, want_logits = self.run(self.baseline, prompts, lengths)
                got, logits = self.run(engine, prompts, lengths)
                assert got == want
                for ours, theirs in zip(logits, want_logits, strict=True):
                    assert (ours - theirs).abs().max() < LOGIT_TOLERANCE
                histories = [p + answer for p, answer in zip(prompts, got, strict=True)]
                if turn < TURNS - 1:
                    engine = self.between_turns(engine)
        finally:
            self.count(engine)
            engine.close()
        return self.seen

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(VOCAB - 2) for _ in range(count)]

    def run(
        self, engine: ca.Engine, prompts: list[list[int]], lengths: list[int]
    ) -> tuple[list[list[int]], list[torch.Tensor]]:
        """The answers, and the logits of all their tokens."""
        chosen: dict[int, list[torch.Tensor]] = {}

        def keep_last(request: ca.Request, first: int, logits: torch.Tensor) -> None:
            assert torch.isfinite(logits).all()
            if first + len(logits) == len(request.tokens):
                chosen.setdefault(request.id, []).append(logits[-1])

        requests = [
            engine.add_request(
                prompt, ca.SamplingParams(max_tokens=n, ignore_eos=True), on_logits=keep_last
            )
            for prompt, n in zip(prompts, lengths, strict=True)
        ]
        failed_before = engine.store.stats()["failed_loads"]
        retries = self.step_to_end(engine, requests)
        faults = engine.store.stats()["failed_loads"] - failed_before
        assert max(retries.values(), default=0) <= faults
        self.seen["retries"] += sum(retries.values())
        if engine is not self.baseline:
            for request in requests:
                self.seen.update(request.cached_from)
        return (
            [request.output_ids for request in requests],
            [torch.stack(chosen[request.id]) for request in requests],
        )

    def step_to_end(self, engine: ca.Engine, requests: list[ca.Request]) -> Counter[int]:
        """How often each request had to start over. The others move on in the same step."""
        retries: Counter[int] = Counter()
        again: list[ca.Request] = []
        scheduler = engine.scheduler
        retry = type(scheduler).retry
        scheduler.retry = lambda request: (again.append(request), retry(scheduler, request))
        for _ in range(100):
            if all(request.finished for request in requests):
                return retries
            before = {request.id: progress(request) for request in requests}
            again.clear()
            engine.step()
            engine.store.check_invariants()
            # Whose history is still loaded does not move, nor hold up others.
            beside = [r for r in requests if r.finished or (r in scheduler.running and r.started)]
            beside = [r for r in beside if before[r.id] != "finished"]
            assert all(progress(request) != before[request.id] for request in beside)
            retries.update(request.id for request in again)
            self.seen["beside"] += len(beside) * bool(again)
        raise AssertionError("a request does not end")

    def between_turns(self, engine: ca.Engine) -> ca.Engine:
        """The history moves to another tier; faults come over the file."""
        engine.store.flush()
        where = self.rng.choice(
            ("ssd", "restart") if self.faults else ("", "dram", "ssd", "restart")
        )
        if where == "restart":
            self.count(engine)
            engine.close()
            engine = self.open()
        if where in ("dram", "ssd") and self.config.device:
            engine.store.drop_tier("device")
        if where == "ssd":
            engine.store.drop_tier("dram")
        if self.faults:
            self.damage(engine.store.stats()["tiers"]["ssd"]["capacity_slots"])
        return engine

    def damage(self, num_slots: int) -> None:
        path = self.folder / "blocks"
        if self.cuts:
            os.truncate(path, (2 << 20) + self.rng.randrange(8 * SLOT_BYTES))
            self.seen["cuts"] += 1
            return
        with path.open("r+b") as file:
            for slot in range(num_slots):
                if self.rng.random() >= self.faults:
                    continue
                # In the header now and then, else in the K and V of one layer.
                header = self.rng.random() < 0.1
                place = self.rng.randrange(*((0, 4096) if header else (4096, SLOT_BYTES)))
                at = (2 << 20) + slot * SLOT_BYTES + place
                byte = os.pread(file.fileno(), 1, at)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << self.rng.randrange(8)]), at)

    def count(self, engine: ca.Engine) -> None:
        stats = engine.store.stats()
        for name in ("failed_loads", "checksum_failures"):
            self.seen[name] += stats[name]


def progress(request: ca.Request) -> object:
    """Changes with every step that computes something for the request."""
    if request.finished:
        return "finished"
    computed = request.sequence.num_computed_tokens if request.sequence else 0
    return len(request.output_ids), computed


def play_groups(baseline: ca.Engine, folder: Path, faults: float) -> Counter[str]:
    seen: Counter[str] = Counter()
    for seed in range(FIRST_SEED, FIRST_SEED + NUM_GROUPS):
        try:
            seen += Group(baseline, folder, seed, faults).play()
        except Exception:
            print(f"repeat: CACHEDATTN_SEED={seed} CACHEDATTN_DIALOGUES=1 pytest {__file__}")
            raise
    print(f"{NUM_GROUPS * AT_ONCE} conversations: {dict(seen)}")
    return seen


def test_conversations_from_every_tier(baseline, tmp_path):
    seen = play_groups(baseline, tmp_path, faults=0)
    assert seen["checksum_failures"] == seen["failed_loads"] == seen["retries"] == 0
    if NUM_GROUPS >= 10:
        assert min(seen["device"], seen["dram"], seen["ssd"]) > 0


def test_conversations_over_a_failing_disk(baseline, tmp_path):
    seen = play_groups(baseline, tmp_path, faults=0.1)
    if NUM_GROUPS >= 10:
        assert min(seen["failed_loads"], seen["checksum_failures"], seen["cuts"]) > 0
        assert seen["retries"] > 0 and seen["beside"] > 0 and seen["ssd"] > 0


def test_an_outage_is_logged_once(baseline, tmp_path, caplog):
    config = ca.StoreConfig(
        dram=90 * SLOT_BYTES,
        ssd=120 * SLOT_BYTES + (4 << 20),
        path=str(tmp_path),
        block_size=BLOCK,
        load="always",
    )
    store = ca.AttentionStore(config, baseline.store.layout)
    prompt = list(range(1, 10 * BLOCK))
    few = ca.SamplingParams(max_tokens=4)
    with ca.Engine(baseline.model, None, store, owns_store=True, **OPTIONS) as engine:
        want = engine.generate(prompt, few)
        store.flush()
        store.drop_tier("dram")
        os.truncate(tmp_path / "blocks", 2 << 20)
        assert [engine.generate(prompt, few).token_ids for _ in range(2)] == [want.token_ids] * 2
        assert store.stats()["outages"] == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith("SSD tier off: ")
