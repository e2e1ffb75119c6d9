"""What runs in a step, and what happens when the pool is full."""

import pytest
from tiny_models import BLOCK, open_engine, random_ids, save_model

import cachedattn as ca


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), layers=2, heads=2, kv_heads=1)


SLOT_BYTES = 4096 + 2 * (2 * BLOCK * 64 * 4)  # header, then two layers of K and V in float32


def pool(num_slots: int, **fields: object) -> ca.StoreConfig:
    return ca.StoreConfig(dram=num_slots * SLOT_BYTES, block_size=BLOCK, dram_reserve=0, **fields)


def sampling(max_tokens: int) -> ca.SamplingParams:
    return ca.SamplingParams(max_tokens=max_tokens, ignore_eos=True)


def finish(engine: ca.Engine, requests: list[ca.Request]) -> list[list[int]]:
    for _step in range(1000):
        if all(request.finished for request in requests):
            return [request.output_ids for request in requests]
        engine.step()
        engine.store.check_invariants()
    raise AssertionError("requests do not end")


def alone(path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Each prompt's answer with nothing else around."""
    answers = []
    for prompt in prompts:
        with open_engine(path, max_model_len=256) as engine:
            answers.append(engine.generate(prompt, sampling(max_tokens)).token_ids)
    return answers


def test_prompts_share_a_step_with_answers(model_path):
    with open_engine(model_path, pool(64), max_model_len=256, max_step_tokens=32) as engine:
        first = engine.add_request(random_ids(20), sampling(10))
        engine.step()
        second = engine.add_request(random_ids(70, seed=1), sampling(4))
        sizes = []
        while not first.finished:
            before = len(first.output_ids)
            work = [count for _, count in engine.scheduler.schedule()]
            sizes.append(work)
            engine.step()
            assert len(first.output_ids) == before + 1  # an answer never waits for a prompt
        assert sizes[:3] == [[1, 31], [1, 31], [1, 8]]
        assert finish(engine, [second])


def test_first_come_first_served(model_path):
    with open_engine(model_path, pool(64), max_model_len=256, max_num_seqs=2) as engine:
        requests = [engine.add_request(random_ids(9, seed=i), sampling(3 + i)) for i in range(5)]
        order = []
        while len(order) < len(requests):
            order += [request.id for request in engine.step()]
        assert order == [request.id for request in requests]


def test_the_queue_is_published_in_order(model_path):
    published = []
    with open_engine(model_path, pool(64), max_model_len=256, max_num_seqs=1) as engine:
        publish = engine.store.set_queue

        def listen(chains):
            published.append([chain.num_tokens for chain in chains])
            publish(chains)

        engine.store.set_queue = listen
        requests = [engine.add_request(random_ids(n), sampling(2)) for n in (7, 8, 9)]
        finish(engine, requests)
    assert published == [[7, 8, 9], [8, 9], [9], []]


def test_a_full_pool_preempts_the_latest(model_path):
    """Ten slots; three answers that grow to six blocks each."""
    prompts = [random_ids(30, seed=i) for i in range(3)]
    preempted = []
    with open_engine(model_path, pool(10), max_model_len=112) as engine:
        retry = engine.scheduler.retry

        def listen(request):
            preempted.append(request.id)
            retry(request)

        engine.scheduler.retry = listen
        requests = [engine.add_request(prompt, sampling(60)) for prompt in prompts]
        answers = finish(engine, requests)
    assert preempted and requests[0].id not in preempted
    assert answers == alone(model_path, prompts, 60)


def test_saves_in_flight_do_not_starve_a_request(model_path, tmp_path):
    """Blocks that wait to be written hold their slots; the request waits for them, not for ever."""
    stored = pool(10, ssd="4MiB", path=str(tmp_path / "kv"))
    prompts = [random_ids(100, seed=i) for i in range(4)]
    with open_engine(model_path, stored, max_model_len=112) as engine:
        requests = [engine.add_request(prompt, sampling(10)) for prompt in prompts]
        answers = finish(engine, requests)
        assert engine.store.stats()["ssd_bytes_written"] > 0
    assert answers == alone(model_path, prompts, 10)


def test_a_pool_smaller_than_the_window_is_refused(model_path):
    with pytest.raises(ValueError, match=r"dram holds 160 tokens .* max_model_len 256"):
        open_engine(model_path, pool(10), max_model_len=256)


def test_abort_waiting_and_running(model_path):
    with open_engine(model_path, pool(64), max_model_len=256, max_num_seqs=1) as engine:
        running = engine.add_request(random_ids(20), sampling(50))
        waiting = engine.add_request(random_ids(20, seed=1), sampling(5))
        other = engine.add_request(random_ids(20, seed=2), sampling(5))
        engine.step()
        engine.abort(running)
        engine.abort(waiting)
        assert running.reply().finish_reason == waiting.reply().finish_reason == "abort"
        assert len(finish(engine, [other])[0]) == 5
        assert engine.step() == []
