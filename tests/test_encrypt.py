"""Encryption at rest: master keys."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from cachedattn import cli
from cachedattn.keys import write_master_key


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


def test_keygen_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "key"
    monkeypatch.setattr(sys, "argv", ["cachedattn", "keygen", str(path)])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code and str(path) in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 2
    assert capsys.readouterr().err == f"error: {path}: File exists\n"
