"""The demo: two processes, equal answers, history from the SSD tier after the restart."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from chat_model import save_chat_model

from cachedattn import demo, demo_worker
from cachedattn.cli_common import with_store
from cachedattn.engine import Engine

TURNS = {
    "title": "A short chat",
    "system": "Be brief.",
    "user_turns": ["First words, " * 8, "second words", "third words", "last words"],
}


@pytest.fixture
def played(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, dict, Path]:
    """The demo's exit code and JSON on a tiny model and a short conversation."""
    model = save_chat_model(tmp_path / "tiny")
    monkeypatch.setattr(demo, "conversation", lambda: TURNS)
    package_root = Path(demo.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", str(package_root))
    code = demo.run_demo(model, tmp_path / "out", "float32", 1, as_json=True)
    return code, json.loads(capsys.readouterr().out), tmp_path / "out"


def test_demo_on_a_tiny_model(played: tuple[int, dict, Path]) -> None:
    code, result, output = played
    turns = result["turns"]
    assert code == 0 and result["all_equal"]
    assert [turn["turn"] for turn in turns] == [1, 2, 3, 4]
    assert [turn["process"] for turn in turns] == [1, 1, 2, 2]
    assert turns[0]["history_tokens"] == 0
    assert turns[1]["cached_from"]["dram"] == turns[1]["history_tokens"] > 0
    assert turns[2]["cached_from"]["ssd"] == turns[2]["history_tokens"] > 0
    for turn in turns:
        assert turn["history_tokens"] + turn["new_tokens"] == turn["prompt_tokens"]
        assert turn["equal"] and turn["ttft_store_s"] > 0 and turn["ttft_recompute_s"] > 0
    assert result["totals"]["prompt_tokens"] == sum(turn["prompt_tokens"] for turn in turns)
    assert (output / "ttft.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in output.iterdir()] == ["ttft.png"]  # the store is gone


def test_table_has_a_row_per_turn(
    played: tuple[int, dict, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    demo.print_table(Console(width=140), played[1])
    text = capsys.readouterr().out
    assert text.count("yes") == 4 and "ratio" in text and "ttft.png" in text


def test_a_difference_is_told_from_a_near_tie(tmp_path: Path) -> None:
    model = save_chat_model(tmp_path / "tiny")
    options = {"dtype": "float32", "max_model_len": 512}
    with (
        Engine.from_pretrained(model, **options) as baseline,
        with_store(baseline, tmp_path / "kv") as store,
    ):
        prompt = list(range(40))
        assert demo_worker.compare(store, baseline, prompt, [1, 2], [1, 2])["equal"]
        logits = demo_worker.tie_of({"a": baseline}, prompt, list(range(256)))["logits"]["a"]
        order = sorted(range(256), key=lambda token: logits[str(token)])
        answer = demo_worker.compare(store, baseline, prompt, [order[-1]], [order[0]])
        assert not answer["equal"] and not answer["near_tie"]
        tie = answer["tie"]
        assert tie["position"] == 0
        assert tie["store"] == pytest.approx(tie["recompute"], abs=1e-3)
        close = min(itertools.pairwise(order), key=lambda p: gap(logits, p))
        answer = demo_worker.compare(store, baseline, prompt, [close[0]], [close[1]])
        assert not answer["equal"] and answer["near_tie"]
        answer = demo_worker.compare(store, baseline, prompt, [1, 2], [1])
        assert not answer["equal"] and not answer["near_tie"]


def gap(logits: dict[str, float], pair: tuple[int, int]) -> float:
    return abs(logits[str(pair[0])] - logits[str(pair[1])])


def test_a_failing_process_ends_the_demo_with_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(demo.__file__).parents[1]))
    with pytest.raises(ValueError, match="nowhere"):
        demo.run_demo(tmp_path / "nowhere", tmp_path / "out", "float32", 1, as_json=True)


def test_recorded_conversation_is_long_enough() -> None:
    recorded = demo.conversation()
    assert len(recorded["user_turns"]) >= 8
    text = " ".join(recorded["user_turns"][:-1])
    assert len(text.split()) > 2200  # over 3,000 tokens of SmolLM2's tokenizer
