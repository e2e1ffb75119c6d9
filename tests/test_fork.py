"""A store and the processes that multiprocessing makes: a forked one is told that the store is not
its own, a spawned one that it is taken; the parent goes on."""

import multiprocessing
from multiprocessing.connection import Connection

import pytest

import cachedattn as ca

LAYOUT = ca.KvLayout(4, 2, 16, "bfloat16", bytes(32), "tiny")


def open_store(path: str) -> ca.AttentionStore:
    config = ca.StoreConfig(dram="4MiB", ssd="8MiB", path=path, block_size=16)
    return ca.AttentionStore(config, LAYOUT)


def play(store: ca.AttentionStore, tokens: list[int]) -> int:
    """One turn without a model. The tokens found."""
    sequence = store.begin(store.new_chain(tokens))
    assert sequence is not None
    found = sequence.num_computed_tokens
    for layer in range(LAYOUT.num_layers):
        assert sequence.wait_layer(layer)
    assert sequence.reserve(len(tokens) - found)
    sequence.append(tokens[found:])
    sequence.commit()
    return found


def try_to_open(path: str, answers: Connection) -> None:
    try:
        open_store(path)
    except ca.StoreError as error:
        answers.send(error.code)


def try_to_use(store: ca.AttentionStore, sequence: object, answers: Connection) -> None:
    """Every call, in a process that has inherited the store."""
    for call in (
        lambda: store.begin(store.new_chain([1, 2, 3])),
        lambda: store.set_queue([]),
        store.poll,
        store.flush,
        lambda: store.drop_tier("dram"),
        store.stats,
        lambda: sequence.reserve(1),
        lambda: sequence.wait_layer(0),
        sequence.commit,
        store.close,
    ):
        try:
            call()
            answers.send("no error")
        except ca.StoreError as error:
            good = error.code == "closed" and "open a store after the fork" in str(error)
            answers.send("refused" if good else str(error))


def answers_of(method: str, target: object, *arguments: object) -> list[str]:
    context = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, sender))
    process.start()
    sender.close()
    answers = []
    try:
        while True:
            answers.append(receiver.recv())
    except EOFError:
        pass
    process.join(timeout=60)
    assert process.exitcode == 0
    return answers


def test_a_forked_child_is_refused_and_the_parent_goes_on(tmp_path):
    tokens = list(range(100))
    with open_store(str(tmp_path / "kv")) as store:
        assert play(store, tokens) == 0
        store.drop_tier("dram")
        sequence = store.begin(store.new_chain(tokens))
        assert sequence.loading
        assert answers_of("fork", try_to_use, store, sequence) == ["refused"] * 10
        assert all(sequence.wait_layer(layer) for layer in range(LAYOUT.num_layers))
        sequence.close()
        assert play(store, [*tokens, 7]) == 100
    with open_store(str(tmp_path / "kv")) as store:
        assert play(store, [*tokens, 7, 8]) == 101


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_cannot_open_the_parents_store(tmp_path, method):
    path = str(tmp_path / "kv")
    with open_store(path):
        assert answers_of(method, try_to_open, path) == ["busy"]
    assert answers_of(method, try_to_open, path) == []
