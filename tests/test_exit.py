"""A process that ends without closing its store ends at once, in its own way, and leaves a store
that opens again."""

import signal
import subprocess
import sys

import pytest

import cachedattn as ca

# Leaves while blocks are on their way to the SSD.
CHILD = """
import os, signal, sys
import cachedattn as ca

layout = ca.KvLayout(4, 2, 16, "bfloat16", bytes(32), "tiny")
config = ca.StoreConfig(dram="1MiB", ssd="64MiB", path=sys.argv[1], block_size=16)
store = ca.AttentionStore(config, layout)
first = 0
while store.stats()["writes_in_flight"] == 0 or first < 500:
    tokens = list(range(first, first + 100))
    first += 1
    while (sequence := store.begin(store.new_chain(tokens))) is None:
        store.poll()
    found = sequence.num_computed_tokens
    for layer in range(layout.num_layers):
        sequence.wait_layer(layer)
    while not sequence.reserve(len(tokens) - found):
        store.poll()
    sequence.append(tokens[found:])
    if first % 2:
        sequence.commit()
    store.poll()
print(store.stats()["writes_in_flight"], flush=True)
"""
WAYS = {
    "the end": ("", 0),
    "exit": ("sys.exit(3)", 3),
    "an exception": ("raise RuntimeError('no more')", 1),
    "an exit without clean-up": ("os._exit(4)", 4),
    "a signal": ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    "an interrupt": ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_process_ends_without_close(way: str, tmp_path) -> None:
    line, code = WAYS[way]
    path = str(tmp_path / "kv")
    done = subprocess.run(
        [sys.executable, "-c", CHILD + line, path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert int(done.stdout) > 0, "nothing was being written when it ended"
    assert ("no more" in done.stderr) == (way == "an exception")
    layout = ca.KvLayout(4, 2, 16, "bfloat16", bytes(32), "tiny")
    config = ca.StoreConfig(dram="1MiB", ssd="64MiB", path=path, block_size=16)
    with ca.AttentionStore(config, layout) as store:
        assert store.stats()["tiers"]["ssd"]["used_slots"] > 0
        store.check_invariants()
