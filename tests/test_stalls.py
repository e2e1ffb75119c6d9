"""What a turn says it has waited for, and that others do not wait with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import BLOCK, open_engine, random_ids, save_model

import cachedattn as ca

SLOT_BYTES = 4096 + 2 * (2 * BLOCK * 64 * 4)  # header, then two layers of K and V in float32
ANSWER = ca.SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), layers=2, heads=2, kv_heads=1)


def replies(engine: ca.Engine, prompts: list[list[int]]) -> list[ca.Reply]:
    """Of requests that come at one time; what the engine says in total is checked."""
    requests = [engine.add_request(prompt, ANSWER) for prompt in prompts]
    for _step in range(1000):
        if all(request.finished for request in requests):
            break
        engine.step()
    found = [request.reply() for request in requests]
    for reply in found:
        assert sum(reply.stall_s.values()) <= reply.duration_s
    for cause, seconds in engine.stats()["stall_s"].items():
        assert seconds == pytest.approx(sum(reply.stall_s[cause] for reply in found)), cause
    return found


def test_those_before_it(model_path: Path) -> None:
    with open_engine(model_path, max_model_len=256, max_num_seqs=1) as engine:
        first, second = replies(engine, [random_ids(30), random_ids(30, seed=1)])
    assert second.stall_s["queue"] > first.duration_s / 2
    assert first.stall_s["queue"] < second.stall_s["queue"]
    assert not any(reply.stall_s["slots"] for reply in (first, second))


def test_slots(model_path: Path) -> None:
    store = ca.StoreConfig(dram=6 * SLOT_BYTES, block_size=BLOCK, dram_reserve=0)
    with open_engine(model_path, store, max_model_len=5 * BLOCK) as engine:
        first, second = replies(
            engine, [random_ids(4 * BLOCK + 1), random_ids(4 * BLOCK + 1, seed=1)]
        )
    assert second.stall_s["slots"] > first.duration_s / 2
    assert first.stall_s["slots"] == 0


@pytest.mark.parametrize("device", [0, "12MiB"], ids=["dram", "device"])
def test_history(model_path: Path, tmp_path: Path, device: int | str) -> None:
    store = ca.StoreConfig(
        dram="24MiB",
        ssd="64MiB",
        path=str(tmp_path / "kv"),
        device=device,
        block_size=BLOCK,
        ssd_read_limit="8MB",
        io_deadline=30,
        load="always",
    )
    with open_engine(model_path, store, max_model_len=512) as engine:
        ids = random_ids(400)
        engine.generate(ids, ANSWER)
        engine.store.flush()
        for tier in ("device", "dram"):
            engine.store.drop_tier(tier)
        stats = engine.stats()
        assert stats["stall_s"]["ssd"] == stats["stall_s"]["copy"] == stats["loading_s"] == 0
        reply = engine.generate(ids + random_ids(8, seed=1), ANSWER)
        assert reply.cached_from["ssd"] > 350
        stats = engine.stats()
        at_least = stats["ssd_bytes_read"] / 8e6 / 2  # a part is read at once
        assert at_least < reply.stall_s["ssd"] < reply.ttft_s
        assert stats["stall_s"]["ssd"] + stats["stall_s"]["copy"] <= stats["loading_s"]
        assert stats["loading_s"] < reply.duration_s
        block = engine.store.layout.bytes_per_token * BLOCK
        read = -(-sum(reply.cached_from.values()) // BLOCK) * block
        assert stats["bytes_loaded"] == (read if device else 0)
        assert (stats["bytes_saved"] > 0) == bool(device)


def test_others_go_on_while_history_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model_path = save_model(
        tmp_path / "model", layers=4, heads=4, kv_heads=4, max_position_embeddings=4096
    )
    store = ca.StoreConfig(
        dram="48MiB",
        ssd="64MiB",
        path=str(tmp_path / "kv"),
        block_size=BLOCK,
        ssd_read_limit="8MB",
        io_deadline=30,
        load="always",
    )
    with open_engine(model_path, store, max_model_len=4096) as engine:
        ids = random_ids(400)
        engine.generate(ids, ANSWER)
        turn = ids + random_ids(8, seed=1)
        expected = engine.generate(turn, ANSWER)
        engine.store.flush()
        engine.store.drop_tier("dram")
        other = engine.add_request(
            random_ids(20, seed=2), ca.SamplingParams(max_tokens=4000, ignore_eos=True)
        )
        engine.step()
        cold = engine.add_request(turn, ANSWER)
        meanwhile = 0
        while not cold.output_ids:
            meanwhile += cold.sequence is not None and cold.sequence.loading
            assert engine.step() == []
        assert meanwhile > 5
        assert len(other.output_ids) > meanwhile
        while not cold.finished:
            engine.step()
        assert cold.output_ids == expected.token_ids
        assert cold.cached_from["ssd"] > 350
        assert cold.stall_s["queue"] > 10 * cold.stall_s["ssd"]
        engine.abort(other)
