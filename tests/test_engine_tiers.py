"""The engine over all three tiers, with an emulated device: what is left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tiny_models import BLOCK, open_engine, random_ids, save_model

import cachedattn as ca
from cachedattn.batch import Batch

ANSWER = ca.SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), layers=2, heads=2, kv_heads=1)


def config(folder: Path, **sizes: str) -> ca.StoreConfig:
    sizes = {"device": "8MiB", "dram": "16MiB", "ssd": "64MiB"} | sizes
    return ca.StoreConfig(path=str(folder / "kv"), block_size=BLOCK, **sizes)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_nothing_leaks_over_a_thousand_turns(model_path: Path, tmp_path: Path) -> None:
    """Hits and misses in pools that are too small for all, so that every tier evicts."""
    store = config(tmp_path, device="512KiB", dram="1MiB", ssd="4MiB")
    before = 0
    with open_engine(model_path, store, max_model_len=128) as engine:
        for turn in range(1000):
            engine.generate(random_ids(30 + turn % 50, seed=turn * 7 % 300), ANSWER)
            if turn == 300:
                before = resident_bytes()
        grown = resident_bytes() - before
        engine.store.check_invariants()
        assert all(engine.store.stats()["evictions"].values())
        for tier in ("device", "dram"):
            engine.store.flush()
            engine.store.drop_tier(tier)
        stats = engine.store.stats()
    assert stats["tiers"]["device"]["used_slots"] == stats["tiers"]["dram"]["used_slots"] == 0
    assert grown < 16 << 20


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("tier", ["dram", "ssd"])
def test_an_interrupt_during_loads_leaves_a_clean_store(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str, layer: int
) -> None:
    ids = random_ids(300)
    interrupted = 0
    wait_layer = Batch.wait_layer

    def interrupt(batch: Batch, index: int) -> None:
        nonlocal interrupted
        if index == layer:
            interrupted += bool(batch.loads)
            raise KeyboardInterrupt
        wait_layer(batch, index)

    engine = open_engine(model_path, config(tmp_path), max_model_len=512)
    with pytest.raises(KeyboardInterrupt), engine:
        want = engine.generate(ids, ANSWER).token_ids
        engine.store.flush()
        for dropped in ("device", "dram")[: 1 + (tier == "ssd")]:
            engine.store.drop_tier(dropped)
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "wait_layer", interrupt)
            try:
                engine.generate(ids, ANSWER)
            finally:
                engine.store.check_invariants()
    assert interrupted or layer > 0  # all may have landed while the first layer was computed
    with open_engine(model_path, config(tmp_path), max_model_len=512) as engine:
        reply = engine.generate(ids, ANSWER)
        assert reply.token_ids == want and reply.cached_from["ssd"] > 250
        engine.store.check_invariants()
