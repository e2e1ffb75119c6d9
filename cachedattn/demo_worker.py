"""Plays some turns of a conversation with the store and recomputing all, in its own process.

Reads one JSON task from stdin, writes one JSON record per turn to stdout:
    python -m cachedattn.demo_worker
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from cachedattn.cli import user_error_text
from cachedattn.cli_common import reply_fields, run, tie_of, with_store
from cachedattn.engine import Engine
from cachedattn.sampling import SamplingParams

WINDOW = 6144  # tokens of context; the recorded conversation stays below it


def compare(
    store: Engine, baseline: Engine, prompt: list[int], ours: list[int], theirs: list[int]
) -> dict[str, Any]:
    """Where two answers part, and the logits of both tokens there, both ways."""
    if ours == theirs:
        return {"equal": True, "near_tie": False, "tie": None}
    pairs = zip(ours, theirs, strict=False)
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if position is None:
        return {"equal": False, "near_tie": False, "tie": None}
    engines = {"recompute": baseline, "store": store}
    tokens = [ours[position], theirs[position]]
    tie = tie_of(engines, prompt + ours[:position], tokens)
    return {
        "equal": False,
        "near_tie": tie["near_tie"],
        "tie": {"position": position, **tie["logits"]},
    }


def play_turn(
    store: Engine, baseline: Engine, messages: list[dict[str, str]], max_tokens: int
) -> dict[str, Any]:
    """One turn both ways, on the same token ids; what the parent prints of it."""
    sampling = SamplingParams(max_tokens=max_tokens)
    request = store.add_request(messages, sampling, conversation="demo")
    reply = run(store, request)
    other = run(baseline, baseline.add_request(request.prompt_ids, sampling))
    fields = reply_fields(reply)
    return {
        "history_tokens": fields["reused_tokens"],
        "new_tokens": fields["new_tokens"],
        "prompt_tokens": fields["prompt_tokens"],
        "cached_from": reply.cached_from,
        "ttft_recompute_s": other.ttft_s,
        "ttft_store_s": reply.ttft_s,
        "ratio": reply.ttft_s / other.ttft_s,
        "answer": reply.text,
        **compare(store, baseline, request.prompt_ids, reply.token_ids, other.token_ids),
    }


def play(task: dict[str, Any]) -> None:
    """Plays the task's turns, answering after every message that is given."""
    if task["threads"] is not None:
        torch.set_num_threads(task["threads"])
    messages = list(task["messages"])
    options = {"dtype": task["dtype"], "max_model_len": WINDOW}
    with (
        Engine.from_pretrained(task["model"], **options) as baseline,
        with_store(baseline, Path(task["store"])) as store,
    ):
        for engine in (store, baseline):  # first calls pay for set-up that later ones do not
            run(engine, engine.add_request([0, 1, 2, 3], SamplingParams(max_tokens=2)))
        for text in task["user_turns"]:
            messages.append({"role": "user", "content": text})
            record = play_turn(store, baseline, messages, task["max_tokens"])
            messages.append({"role": "assistant", "content": record["answer"]})
            print(json.dumps(record), flush=True)


def main() -> None:
    """Entry point of the process."""
    try:
        play(json.load(sys.stdin))
    except KeyboardInterrupt:  # the parent got it too, and says so
        sys.exit(130)
    except Exception as error:
        message = user_error_text(error)
        if message is None:
            raise
        print(json.dumps({"error": message}), flush=True)


if __name__ == "__main__":
    main()
