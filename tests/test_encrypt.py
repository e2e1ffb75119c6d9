"""Encryption at rest: master keys, encrypted stores, tenants that are erased."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import cachedattn as ca
from cachedattn import cli
from cachedattn.keys import write_master_key

LAYOUT = ca.KvLayout(2, 2, 16, "float32", b"i" * 32, "tiny")
TOKENS = list(range(1000, 1100))
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    write_master_key(tmp_path / "master.key")
    return tmp_path / "master.key"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command: exit code, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cachedattn", *map(str, args)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        return done.value.code or 0, *capfd.readouterr()

    return call


def config(path: Path, key: Path | str) -> ca.StoreConfig:
    return ca.StoreConfig(dram="4MiB", ssd="8MiB", path=str(path), encrypt=str(key), block_size=32)


def play(store: ca.AttentionStore, marker: float = 1.0) -> int:
    """A turn over TOKENS; how many of them were reused."""
    chain = store.new_chain(TOKENS)
    sequence = store.begin(chain)
    assert sequence is not None
    reused = sequence.num_computed_tokens
    count = len(TOKENS) - reused
    assert sequence.reserve(count)
    for layer in range(LAYOUT.num_layers):
        assert not sequence.loading or sequence.wait_layer(layer)
        store.kv[layer][sequence.block_table()] = marker
        sequence.layer_done(layer, count)
    sequence.append(np.asarray(TOKENS[reused:], np.int32))
    sequence.commit()
    store.flush()
    return reused


def test_an_encrypted_store_comes_back_with_its_key(tmp_path: Path, key: Path) -> None:
    marker = np.float32(12345.678)
    reused = {}
    for name, encrypt in (("plain", ""), ("kv", key)):
        with ca.AttentionStore(config(tmp_path / name, encrypt), LAYOUT) as store:
            assert play(store, float(marker)) == 0
        files = [path.read_bytes() for path in (tmp_path / name).iterdir()]
        assert any(marker.tobytes() * 4 in data for data in files) == (name == "plain")
        with ca.AttentionStore(config(tmp_path / name, encrypt), LAYOUT) as store:
            reused[name] = play(store, float(marker))
            assert store.stats()["checksum_failures"] == 0
    assert reused["kv"] == reused["plain"] >= 96
    write_master_key(tmp_path / "other")
    for wrong in ("", tmp_path / "other"):
        with pytest.raises(ca.StoreError, match="master key") as error:
            ca.AttentionStore(config(tmp_path / "kv", wrong), LAYOUT)
        assert error.value.code == "mismatch"


def test_a_bad_key_is_refused(tmp_path: Path, key: Path) -> None:
    with pytest.raises(ValueError, match="encrypt needs ssd"):
        ca.StoreConfig(encrypt=str(key))
    with pytest.raises(ca.StoreError, match="No such file"):
        ca.AttentionStore(config(tmp_path / "kv", tmp_path / "absent"), LAYOUT)
    key.chmod(0o640)
    with pytest.raises(ca.StoreError, match="must have mode 0600"):
        ca.AttentionStore(config(tmp_path / "kv", key), LAYOUT)
    key.chmod(0o600)
    key.write_text("short")
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        ca.AttentionStore(config(tmp_path / "kv", key), LAYOUT)
    assert not (tmp_path / "kv").exists()


def test_erase_in_a_running_store(tmp_path: Path, key: Path) -> None:
    with ca.AttentionStore(config(tmp_path / "kv", key), LAYOUT) as store:
        play(store)
        chain = store.new_chain([*TOKENS, 1])
        assert store.lookup(chain).total >= 96
        assert store.erase_tenant("") is True
        assert store.lookup(chain).total == 0
        assert store.erase_tenant("") is False
        assert play(store) == 0
    with (
        ca.AttentionStore(config(tmp_path / "plain", ""), LAYOUT) as store,
        pytest.raises(ValueError, match="encrypted"),
    ):
        store.erase_tenant("")


def test_commands(tmp_path: Path, key: Path, run: Cli) -> None:
    kv = tmp_path / "kv"
    with ca.AttentionStore(config(kv, key), LAYOUT) as store:
        play(store)
        code, _, err = run("erase", kv, "--tenant", "", "--key", key)
        assert code == 2 and "open in another process" in err
    code, out, _ = run("inspect", kv)
    assert code == 0 and "encrypted" in out
    assert run("check", kv)[0] == 0
    code, _, err = run("check", kv, "--deep")
    assert code == 2 and "encrypted" in err
    assert run("check", kv, "--deep", "--key", key)[0] == 0
    assert run("erase", kv, "--tenant", "nobody", "--key", key)[0] == 1
    code, out, _ = run("erase", kv, "--tenant", "", "--key", key)
    assert code == 0 and "erased" in out
    assert run("erase", kv, "--tenant", "", "--key", key)[0] == 1
    with ca.AttentionStore(config(kv, key), LAYOUT) as store:
        assert store.lookup(store.new_chain([*TOKENS, 1])).total == 0


def test_keygen_makes_a_private_file(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        write_master_key(tmp_path / "a")
        write_master_key(tmp_path / "b")
    finally:
        os.umask(old)
    keys = [(tmp_path / name).read_text() for name in "ab"]
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert all(len(bytes.fromhex(key)) == 32 for key in keys)
    assert keys[0] != keys[1]


@pytest.mark.parametrize("kind", ["file", "link", "dangling", "folder"])
def test_keygen_overwrites_nothing(kind: str, tmp_path: Path) -> None:
    path, other = tmp_path / "key", tmp_path / "other"
    other.write_text("precious")
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(other if kind == "link" else tmp_path / "absent")
    with pytest.raises(FileExistsError):
        write_master_key(path)
    assert other.read_text() == "precious"
    assert not (tmp_path / "absent").exists()


def test_keygen_command(tmp_path: Path, run: Cli) -> None:
    path = tmp_path / "key"
    code, out, _ = run("keygen", path)
    assert code == 0 and str(path) in out
    assert run("keygen", path) == (2, "", f"error: {path}: File exists\n")
