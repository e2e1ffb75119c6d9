"""The README's examples run, and its commands exist with the options it names."""

from __future__ import annotations

import io
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer.main
from chat_model import save_chat_model

from cachedattn import cli

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", README, re.DOTALL))
COMMANDS = [
    shlex.split(line, comments=True)
    for line in re.findall(r"^cachedattn .*$", README, re.MULTILINE)
]


def test_there_are_examples() -> None:
    assert set(EXAMPLES) == {"engine", "ops"}
    assert README.count("```python") == len(EXAMPLES)
    commands = {"demo", "chat", "inspect", "check", "keygen", "erase", "bench", "replay"}
    commands.add("simulate")
    assert {words[1] for words in COMMANDS} == commands


@pytest.mark.parametrize("name", EXAMPLES)
def test_python_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope = {"MODEL": save_chat_model(tmp_path / "tiny")}
    exec(compile(EXAMPLES[name], f"README.md, {name}", "exec"), scope)
    if name == "engine":
        reused = re.search(r"(\d+) of (\d+) prompt tokens reused", capsys.readouterr().out)
        assert reused and 0 < int(reused[1]) < int(reused[2])
    else:
        assert scope["out"].shape == scope["q"].shape


def test_commands_parse() -> None:
    group = typer.main.get_command(cli.app)
    for words in COMMANDS:
        command, arguments = group, words[1:]
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context(words[1], arguments)


def test_store_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ones that take no model of their own, on a store that the README's chat made."""
    monkeypatch.chdir(tmp_path)
    model = save_chat_model(tmp_path / "tiny")
    turns = (f'{{"t":0,"s":{i},"k":1,"p":-1,"in":2000,"out":2000}}\n' for i in range(30))
    (tmp_path / "TRACE.jsonl.gz").write_text("".join(turns))  # plain lines will do, too
    for words in COMMANDS:
        if words[1] in ("demo", "bench", "erase"):  # too long, or for an encrypted store
            continue
        small = ["--model", str(model), "--max-tokens", "4", "--ssd", "64MiB"]
        if words[1] == "simulate":
            words = [*words[:2], "1000", *words[3:]]
        monkeypatch.setattr(sys, "argv", words + (small if words[1] == "chat" else []))
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello there.\n"))
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        assert not exit_info.value.code, capsys.readouterr().err
