"""Tenants: no one finds another's KV, in any tier or after a restart; and each keeps its quota."""

import pytest
from tiny_models import BLOCK, open_engine, random_ids, save_model

import cachedattn as ca

GREEDY = ca.SamplingParams(max_tokens=4)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), layers=2)


def config(path, **fields) -> ca.StoreConfig:
    ssd = {"ssd": "64MiB", "path": str(path), "load": "always"}
    return ca.StoreConfig(dram="24MiB", block_size=BLOCK, **ssd, **fields)


def cached(engine: ca.Engine, ids: list[int], tenant: str) -> dict[str, int]:
    return engine.store.lookup(engine.store.new_chain([*ids, 1], tenant=tenant)).by_tier


def test_only_the_owner_hits_in_every_tier_and_after_a_restart(model_path, tmp_path):
    ids = random_ids(3 * BLOCK)
    with open_engine(model_path, config(tmp_path / "kv", device="24MiB")) as engine:
        first = engine.generate(ids, GREEDY, tenant="a")
        engine.store.flush()
        for tier in ("device", "dram", "ssd"):
            assert cached(engine, ids, "a")[tier] == len(ids)
            assert sum(cached(engine, ids, "b").values()) == 0
            assert sum(cached(engine, ids, "").values()) == 0
            if tier != "ssd":
                engine.store.drop_tier(tier)
    with open_engine(model_path, config(tmp_path / "kv", device="24MiB")) as engine:
        assert cached(engine, ids, "a")["ssd"] == len(ids)
        other = engine.generate(ids, GREEDY, tenant="b")
        again = engine.generate(ids, GREEDY, tenant="a")
    assert other.num_cached_tokens == 0
    assert again.num_cached_tokens == len(ids) - BLOCK  # one token is left to compute
    assert first.token_ids == other.token_ids == again.token_ids


def test_a_greedy_tenant_keeps_its_quota_and_harms_no_other(model_path, tmp_path):
    with open_engine(model_path, config(tmp_path / "kv")) as engine:
        slot_bytes = engine.store.stats()["tiers"]["dram"]
        slot_bytes = slot_bytes["capacity_bytes"] // slot_bytes["capacity_slots"]
    quota = 8
    limited = config(tmp_path / "kv", tenant_quota=quota * slot_bytes)
    modest_ids = random_ids(3 * BLOCK, seed=1)
    with open_engine(model_path, limited) as engine:
        engine.generate(modest_ids, GREEDY, tenant="modest")
        before = engine.store.tenant_usage("modest")
        assert before["dram"] >= 3
        for turn in range(12):
            engine.generate(random_ids(4 * BLOCK, seed=10 + turn), GREEDY, tenant="greedy")
            engine.store.flush()
            engine.store.poll()
            usage = engine.store.tenant_usage("greedy")
            assert usage["dram"] <= quota and usage["ssd"] <= quota
        assert usage["ssd"] == quota
        assert engine.store.tenant_usage("modest")["dram"] == before["dram"]
        reply = engine.generate([*modest_ids, 5], GREEDY, tenant="modest")
        assert reply.num_cached_tokens == len(modest_ids)
        engine.store.check_invariants()


def test_streams_and_requests_carry_the_tenant(model_path, tmp_path):
    ids = random_ids(2 * BLOCK, seed=3)
    with open_engine(model_path, config(tmp_path / "kv")) as engine:
        *_, first = engine.stream(ids, GREEDY, tenant="a")
        *_, same = engine.stream(ids, GREEDY, tenant="a")
        request = engine.add_request(ids, GREEDY, tenant="b")
        while not request.finished:
            engine.step()
    assert first.num_cached_tokens == 0
    assert same.num_cached_tokens == len(ids) - BLOCK
    assert request.reply().num_cached_tokens == 0


def test_a_quota_below_one_block_is_refused(model_path, tmp_path):
    with pytest.raises(ValueError, match="tenant_quota"):
        open_engine(model_path, config(tmp_path / "kv", tenant_quota=4096))
    with pytest.raises(ValueError, match="tenant_quota"):
        config(tmp_path / "kv", tenant_quota="much")
