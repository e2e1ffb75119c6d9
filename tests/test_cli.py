"""The command line: what it prints, its exit codes, and that bad input never gives a traceback."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from chat_model import save_chat_model

import cachedattn
from cachedattn import cli

CHAT = ["chat", "--dtype", "float32", "--dram", "64MiB", "--ssd", "32MiB", "--max-tokens", "4"]
SMALL = ["--max-model-len", "1024"]


@dataclass
class Answer:
    code: int
    out: str
    err: str


Cli = Callable[..., Answer]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command in this process with `stdin` as its input."""

    def call(*args: object, stdin: str = "") -> Answer:
        monkeypatch.setattr(sys, "argv", ["cachedattn", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Answer(exit_info.value.code or 0, out, err)

    return call


@pytest.fixture
def store(run: Cli, model: Path, tmp_path: Path) -> Path:
    """A store that holds the KV of one turn."""
    path = tmp_path / "kv"
    answer = run(*CHAT, *SMALL, "--model", model, "--store", path, stdin="x" * 200 + "\n")
    assert answer.code == 0
    return path


def test_help_lists_the_commands(run: Cli) -> None:
    answer = run("--help")
    assert answer.code == 0
    for command in ("demo", "chat", "inspect", "check", "keygen", "bench"):
        assert command in answer.out


def test_chat_reuses_history(run: Cli, model: Path, tmp_path: Path) -> None:
    transcript = tmp_path / "chat.json"
    args = [*CHAT, *SMALL, "--model", model, "--store", tmp_path / "kv", "--json"]
    args += ["--transcript", transcript, "--system", "Be brief."]
    answer = run(*args, stdin="hello there, " * 8 + "\n\nand again\n")
    assert answer.code == 0, answer.err
    first, second = map(json.loads, answer.out.splitlines())
    assert first["reused_tokens"] == 0
    assert second["cached_from"]["dram"] == second["reused_tokens"] > 0
    assert second["reused_tokens"] + second["new_tokens"] == second["prompt_tokens"]
    roles = [message["role"] for message in json.loads(transcript.read_text())]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    # A store opened anew: the history comes from the SSD tier.
    (third,) = map(json.loads, run(*args, stdin="once more\n").out.splitlines())
    assert third["cached_from"]["ssd"] > 0


def test_chat_prints_each_turn(run: Cli, model: Path) -> None:
    answer = run(*CHAT, *SMALL, "--model", model, stdin="hello\n")
    assert answer.code == 0
    assert "0 tokens reused (-)" in answer.out and "first token after" in answer.out


def test_inspect_shows_the_store(run: Cli, store: Path) -> None:
    answer = run("inspect", store, "--json")
    info = json.loads(answer.out)
    assert info["model_name"] == "tiny" and info["counters"]["turns"] == 1
    assert len(info["blocks"]) == info["used_slots"] == 4  # 228 tokens in blocks of 64
    text = run("inspect", store).out
    assert "tiny" in text and "longest history" in text


def test_check_finds_damage(run: Cli, store: Path) -> None:
    for args in ([], ["--deep"]):
        answer = run("check", store, *args)
        assert answer.code == 0 and "4 blocks checked" in answer.out
    block = json.loads(run("inspect", store, "--json").out)["blocks"][0]
    damage_a_payload(store / "blocks", json.loads(run("inspect", store, "--json").out))
    assert run("check", store).code == 0  # headers only
    answer = run("check", store, "--deep", "--json")
    result = json.loads(answer.out)
    assert answer.code == 1 and not result["ok"] and result["indexed"]
    (found,) = result["damage"]
    assert (found["slot"], found["key"]) == (block["slot"], block["key"])
    assert "bytes of layer" in found["what"]
    out = run("check", store, "--deep").out
    assert f"slot {block['slot']}, block {block['key'][:16]}: the bytes of layer" in out


def test_check_finds_a_damaged_superblock_and_a_cut_file(run: Cli, store: Path) -> None:
    with (store / "blocks").open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
        file.truncate((store / "blocks").stat().st_size - 512)
    answer = run("check", store, "--json")
    assert answer.code == 1
    damage = json.loads(answer.out)["damage"]
    assert [found["slot"] for found in damage[:2]] == [None, None]
    out = run("check", store, "--deep").out
    assert "superblock copy 0" in out and "the file was cut" in out


def damage_a_payload(path: Path, info: dict) -> None:
    """Flips a bit in the last quarter of the first used slot."""
    place = (2 << 20) + info["blocks"][0]["slot"] * info["block_bytes"]
    place += info["block_bytes"] * 3 // 4
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


def test_bench_ttft_prints_a_line_per_source(
    run: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the store goes to the current folder
    args = ["bench", "ttft", "--model", model, "--dtype", "float32"]
    args += ["--history", "100,150", "--new", "48", "--repeats", "1"]
    answer = run(*args, "--json")
    assert answer.code == 0, answer.err
    rows = [json.loads(line) for line in answer.out.splitlines()]
    sources = ["recompute", "floor", "dram", "ssd"]
    assert [row["source"] for row in rows] == sources * 2
    assert [row["history"] for row in rows] == [100] * 4 + [150] * 4
    for row in rows:
        keys = ["history", "new", "source", "ttft_s", "ratio_to_recompute", "ratio_to_floor"]
        if row["source"] == "ssd":
            keys += ["first_layer_wait_s", "total_stall_s", "ssd_read_s", "compute_s"]
            keys += ["stall_bound_s"]
            assert 0 <= row["first_layer_wait_s"] <= row["total_stall_s"] < row["ttft_s"]
            hidden = min(row["ssd_read_s"], row["compute_s"])
            assert row["stall_bound_s"] == pytest.approx(1.15 * (row["ssd_read_s"] - hidden))
        assert list(row) == keys and row["new"] == 48
    assert rows[0]["ratio_to_recompute"] == rows[1]["ratio_to_floor"] == 1
    assert list(tmp_path.iterdir()) == []
    assert "recompute" in run(*args).out


def test_bench_load_prints_a_line_per_disk(
    run: Cli, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["bench", "load", "--model", model, "--dtype", "float32"]
    args += ["--history", "100", "--new", "20", "--repeats", "1", "--read-limit", "0,5MB"]
    answer = run(*args, "--json")
    assert answer.code == 0, answer.err
    rows = [json.loads(line) for line in answer.out.splitlines()]
    assert [row["read_limit"] for row in rows] == [0, 5_000_000]
    keys = ["read_limit", "history", "new", "load_s", "recompute_s", "auto_s", "recomputed"]
    for row in rows:
        assert list(row) == [*keys, "ratio"]
        assert 0 <= row["recomputed"] <= 100 and row["ratio"] > 0
    assert list(tmp_path.iterdir()) == []
    assert "auto" in run(*args).out
    assert run("bench", "load", "--read-limit", "fast").code == 2


BAD_OPTIONS = [
    (["--model", "no/such/model"], "no/such/model"),
    (["--dtype", "float16"], "float16"),
    (["--dtype", "int8"], "int8"),
    (["--temperature", "-1"], "temperature"),
    (["--top-p", "0"], "top_p"),
    (["--top-p", "1.5"], "top_p"),
    (["--top-k", "-2"], "top_k"),
    (["--max-tokens", "0"], "max_tokens"),
    (["--seed", "-1"], "seed"),
    (["--dram", "lots"], "lots"),
    (["--dram", "1MiB"], "dram"),
    (["--max-model-len", "9000"], "max_model_len"),
    (["--store", "file/kv"], "file"),
    (["--store", "/sys/cachedattn-kv"], "/sys/cachedattn-kv"),
    (["--store", "kv", "--ssd", "900000TiB"], "kv"),
    (["--transcript", "nowhere/chat.json"], "nowhere"),
    (["--transcript", "file"], "transcript"),
]


@pytest.mark.parametrize(("options", "named"), BAD_OPTIONS)
def test_bad_option_is_named(
    run: Cli,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    named: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a plain file")
    answer = run(*CHAT, *SMALL, "--model", model, *options, stdin="hello\n")
    assert answer.code == 2
    assert answer.err.startswith("error: ") and named in answer.err
    assert answer.out == ""


def test_unusable_models_are_refused(run: Cli, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"not a model" * 100)
    for path in (pickled, garbage, tmp_path):
        answer = run(*CHAT, "--model", path, stdin="hello\n")
        assert answer.code == 2 and answer.err.startswith("error: "), path


def test_store_of_another_model_is_refused(run: Cli, store: Path, tmp_path: Path) -> None:
    other = save_chat_model(tmp_path / "other", seed=1)
    before = (store / "blocks").read_bytes()
    answer = run(*CHAT, *SMALL, "--model", other, "--store", store, stdin="hello\n")
    assert answer.code == 2 and "model" in answer.err
    assert (store / "blocks").read_bytes() == before


def test_too_long_a_prompt_is_refused_and_the_turns_before_it_stay(
    run: Cli, model: Path, tmp_path: Path
) -> None:
    args = [*CHAT, "--max-model-len", "128", "--no-truncation", "--model", model]
    path = tmp_path / "kv"
    answer = run(*args, "--store", path, "--json", stdin="hi\n" + "x" * 200 + "\n")
    assert answer.code == 2 and "128" in answer.err
    assert len(answer.out.splitlines()) == 1
    assert json.loads(run("inspect", path, "--json").out)["counters"]["turns"] == 1


def test_no_store_to_look_at(run: Cli, tmp_path: Path) -> None:
    (tmp_path / "blocks").write_bytes(b"\0" * 8192)
    for command in ("inspect", "check"):
        assert run(command, tmp_path / "nothing").code == 2
        answer = run(command, tmp_path)
        assert answer.code == 2 and answer.err.startswith("error: ")


def test_usage_errors(run: Cli) -> None:
    for args in (["chat", "--nonsense"], ["bench", "ttft", "--history", "abc"], ["inspect"]):
        answer = run(*args)
        assert answer.code == 2 and "Usage" in answer.err


def test_missing_extra_is_named() -> None:
    code = "import sys; sys.modules['rich'] = None; import cachedattn.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "'rich'" in done.stderr and "cachedattn[demo]" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_in_a_turn_loses_no_finished_turn(run: Cli, model: Path, tmp_path: Path) -> None:
    transcript = tmp_path / "chat.json"
    args = ["chat", "--dtype", "float32", "--dram", "64MiB", "--ssd", "32MiB"]
    args += ["--model", model, "--store", tmp_path / "kv", "--transcript", transcript]
    # One thread: the child shares the machine with the other tests.
    args += ["--max-model-len", "4096", "--threads", "1", "--max-tokens", "1000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(cachedattn.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-m", "cachedattn.cli", *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        # Whoever runs the tests in the background may have had Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as child:
        # Long: an answer's bytes need not be text, and then its tokens are not found again.
        child.stdin.write(b"hello" * 40 + b"\n")
        child.stdin.flush()
        out = b""
        while b"first token after" not in out:
            byte = child.stdout.read(1)
            assert byte, child.stderr.read().decode()
            out += byte
        child.stdout.readline()
        child.stdin.write(b"go on\n")
        child.stdin.flush()
        assert child.stdout.read(1)  # the answer has begun
        child.send_signal(signal.SIGINT)
        _, err = child.communicate()
    assert child.returncode == 130
    assert b"Traceback" not in err and b"finished turns are kept" in err
    assert len(json.loads(transcript.read_text())) == 2
    info = json.loads(run("inspect", tmp_path / "kv", "--json").out)
    assert info["closed_clean"]
    assert run("check", tmp_path / "kv", "--deep").code == 0
    args[args.index("--max-tokens") + 1] = "2"
    (after,) = map(json.loads, run(*args, "--json", stdin="go on\n").out.splitlines())
    assert after["cached_from"]["ssd"] > 64
