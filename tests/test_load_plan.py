"""Loading a history, recomputing it, and both at once; and what computing takes."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from tiny_models import BLOCK, open_engine, random_ids, run, save_model

import cachedattn as ca
from cachedattn._core import ComputeCost
from cachedattn.prefill_times import PrefillTimes

HISTORY = 107  # of 100 tokens and 8 new ones, the last of which is not computed


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), layers=2)


def leave_on_ssd(engine: ca.Engine) -> None:
    engine.store.flush()
    for tier in ("device", "dram"):
        engine.store.drop_tier(tier)


def block_seconds(engine: ca.Engine) -> float:
    """Of loading a block, as the store has measured it."""
    rate = engine.store.stats()["ssd_read_rate"]
    assert rate > 0
    return BLOCK * engine.store.layout.bytes_per_token / rate


@pytest.mark.parametrize("device", [0, "12MiB"], ids=["dram", "device"])
@pytest.mark.parametrize(
    ("blocks", "least", "most"),
    [(1, 2 * BLOCK, 5 * BLOCK), (1e-3, HISTORY, HISTORY), (1e3, 0, 0)],
    ids=["split", "recompute", "load"],
)
def test_same_tokens_whatever_is_loaded(
    model_path, tmp_path, monkeypatch, device, blocks, least, most
):
    """Computing a block takes `blocks` times as long as loading one."""
    store = ca.StoreConfig(
        dram="24MiB",
        ssd="64MiB",
        path=str(tmp_path / "kv"),
        device=device,
        block_size=BLOCK,
        ssd_read_limit="20MB",
    )
    with open_engine(model_path, store, max_model_len=256, max_step_tokens=BLOCK) as engine:
        first, other = random_ids(100), random_ids(100, seed=9)
        ids = first + run(engine, first)[0].token_ids + random_ids(20, seed=1)
        run(engine, other)
        leave_on_ssd(engine)
        assert run(engine, other)[0].cached_from["ssd"] > 0  # tells how fast the disk is
        cost = ComputeCost(step_tokens=BLOCK, token_s=blocks * block_seconds(engine) / BLOCK)
        monkeypatch.setattr(engine.scheduler.prefill, "cost", lambda: cost)
        reply, logits = run(engine, ids)
        stats = engine.store.stats()
        engine.store.check_invariants()
    with open_engine(model_path, max_model_len=256) as engine:
        want, want_logits = run(engine, ids)
    assert reply.token_ids == want.token_ids
    assert (logits - want_logits).abs().max() < 1e-4
    assert least <= stats["tokens_recomputed"] <= most
    assert reply.num_cached_tokens == HISTORY - stats["tokens_recomputed"]
    assert reply.cached_from["ssd"] == reply.num_cached_tokens


def test_a_sequence_takes_no_more_than_is_left_to_recompute(model_path, tmp_path):
    store = ca.StoreConfig(
        dram="24MiB", ssd="64MiB", path=str(tmp_path), block_size=BLOCK, ssd_read_limit="20MB"
    )
    ids = random_ids(6 * BLOCK + 3)
    with open_engine(model_path, store, max_model_len=256) as engine:
        for _ in range(2):
            run(engine, ids)
            leave_on_ssd(engine)
        step_s = 2 * block_seconds(engine)  # a step of two blocks
        sequence = engine.store.begin(
            engine.store.new_chain(ids),
            cost=ComputeCost(step_tokens=2 * BLOCK, step_s=step_s),
        )
        room = sequence.room
        assert room == sequence.cached.recomputed > 0 and sequence.context_len == 0
        with pytest.raises(ValueError, match="without a reserve"):
            sequence.append(ids[: room + 1])
        sequence.append(ids[:room])
        assert sequence.num_computed_tokens == sequence.cached.total + room
        sequence.close()
        with pytest.raises(ValueError, match="negative"):
            engine.store.begin(
                engine.store.new_chain(ids), cost=ComputeCost(step_tokens=1, step_s=-1)
            )


def work(*parts: tuple[int, int]) -> list:
    """(tokens in the context, new ones) of each request."""
    return [(SimpleNamespace(sequence=SimpleNamespace(context_len=c)), n) for c, n in parts]


def seconds_of(parts, step_s, token_s, pair_s) -> float:
    pairs = sum(n * c + n * (n - 1) / 2 for c, n in parts)
    return step_s + token_s * sum(n for _, n in parts) + pair_s * pairs


def test_times_are_learnt_from_steps():
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    step_s, token_s, pair_s = rng.uniform(0, 0.1), rng.uniform(1e-4, 1e-2), rng.uniform(0, 1e-6)
    times = PrefillTimes(512)
    for number in range(60):
        parts = [(rng.randrange(8000), rng.choice((1, rng.randrange(2, 400))))]
        parts += [(rng.randrange(8000), 2)] * rng.randrange(3)
        seconds = seconds_of(parts, step_s, token_s, pair_s) * rng.uniform(0.95, 1.05)
        times.add(work(*parts), 10 * seconds if number == 0 else seconds)
    fit = times.cost()
    for parts in ([(0, 512)], [(6000, 512)], [(3000, 64)]):
        want = seconds_of(parts, step_s, token_s, pair_s)
        got = seconds_of(parts, fit.step_s, fit.token_s, fit.pair_s)
        assert got == pytest.approx(want, rel=0.1), f"seed {seed}"


def test_times_are_not_known_at_first_and_never_negative():
    times = PrefillTimes(512)
    for _ in range(3):
        times.add(work((0, 512)), 1.0)
    times.add(work((100, 1), (200, 1)), 0.5)  # answers: steps of another kind
    assert times.cost().step_tokens == 0
    times.add(work((512, 512)), 0.9)
    times.add(work((1024, 512)), 0.8)  # as if a longer context took less
    fit = times.cost()
    assert fit.step_tokens == 512
    assert min(fit.step_s, fit.token_s, fit.pair_s) >= 0
    assert seconds_of([(0, 512)], fit.step_s, fit.token_s, fit.pair_s) == pytest.approx(1, rel=0.2)
