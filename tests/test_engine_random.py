"""Random conversations through tiers that are all too small: every answer equals a recomputed
one, and every tier served some of them."""

import random

import pytest
from tiny_models import BLOCK, open_engine, random_ids, save_model

import cachedattn as ca

NUM_CONVERSATIONS = 6
NUM_TURNS = 5


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), layers=2, heads=3, kv_heads=1)


SLOT_BYTES = 4096 + 2 * (2 * BLOCK * 64 * 4)


def play(engine: ca.Engine, seed: int) -> tuple[list[list[int]], dict[str, int]]:
    """All conversations in a random order, some at the same time; (answers, tokens by tier)."""
    rng = random.Random(seed)
    shared = random_ids(40, seed=99)
    histories = {c: list(shared) for c in range(NUM_CONVERSATIONS)}
    turns = [c for c in histories for _ in range(NUM_TURNS)]
    rng.shuffle(turns)
    running: dict[int, ca.Request] = {}
    answers, served = [], {"device": 0, "dram": 0, "ssd": 0}

    def step() -> None:
        engine.step()
        engine.store.check_invariants()
        for c in [c for c, request in running.items() if request.finished]:
            request = running.pop(c)
            histories[c] = request.tokens
            answers.append([c, *request.output_ids])
            for tier, count in request.cached_from.items():
                served[tier] += count

    for c in turns:
        while c in running or len(running) == 3:
            step()
        histories[c] = histories[c] + random_ids(rng.randint(1, 40), seed=rng.randint(0, 999))
        sampling = ca.SamplingParams(max_tokens=rng.randint(1, 9), ignore_eos=True)
        running[c] = engine.add_request(histories[c], sampling)
        for _ in range(rng.randint(0, 4)):
            step()
    while running:
        step()
    return sorted(answers, key=lambda answer: answer[0]), served


@pytest.mark.parametrize("policy", ["hazard", "lookahead", "lru", "fifo"])
@pytest.mark.parametrize("device_slots", [0, 30], ids=["dram", "device"])
def test_random_conversations(model_path, tmp_path, policy, device_slots):
    seed = 3 * device_slots + len(policy)
    # Kept tokens and ratio make blocks of 16 and the baseline's of 64 cut at the same places.
    truncation = ca.Truncation(ratio=0.5, keep_first=0)
    options = {"max_model_len": 128, "max_step_tokens": 48, "truncation": truncation}
    with open_engine(model_path, **options) as engine:
        want, _ = play(engine, seed)
    store = ca.StoreConfig(
        dram=24 * SLOT_BYTES,
        ssd=(60 * SLOT_BYTES) + (2 << 20),
        path=str(tmp_path / "kv"),
        device=device_slots * (SLOT_BYTES - 4096),
        block_size=BLOCK,
        policy=policy,
        load="always",
    )
    with open_engine(model_path, store, **options) as engine:
        got, served = play(engine, seed)
        stats = engine.store.stats()
    assert got == want
    assert stats["checksum_failures"] == 0
    assert served["dram"] > 0 and served["ssd"] > 0
    assert stats["evictions"]["dram"] > 0
    if device_slots:
        assert served["device"] > 0 and stats["evictions"]["device"] > 0
