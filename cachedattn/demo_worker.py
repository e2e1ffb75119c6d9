"""Plays some turns of a conversation with the store and recomputing all, in its own process.

Reads one JSON task from stdin, writes one JSON record per turn to stdout:
    python -m cachedattn.demo_worker
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from cachedattn.cli import user_error_text
from cachedattn.cli_common import reply_fields
from cachedattn.config import StoreConfig
from cachedattn.engine import Engine
from cachedattn.request import Reply, Request
from cachedattn.sampling import SamplingParams

# Two logits closer than this are a tie in bf16: two steps of its grid at 16 and above, where
# the largest logits lie.
NEAR_TIE = 0.25


def run(engine: Engine, request: Request) -> Reply:
    """Steps until `request` is done."""
    while not request.finished:
        engine.step()
    return request.reply()


def next_logits(engine: Engine, token_ids: list[int]) -> torch.Tensor:
    """Logits [vocab] of the token after `token_ids`."""
    rows: list[torch.Tensor] = []
    request = engine.add_request(
        token_ids,
        SamplingParams(max_tokens=1),
        on_logits=lambda _request, _index, logits: rows.append(logits[-1].float().clone()),
    )
    run(engine, request)
    return rows[-1]


def compare(
    store: Engine, baseline: Engine, prompt: list[int], ours: list[int], theirs: list[int]
) -> dict[str, Any]:
    """Where two answers part, and the logits of both tokens there, both ways."""
    if ours == theirs:
        return {"equal": True, "near_tie": False, "tie": None}
    position = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    if position == min(len(ours), len(theirs)):
        return {"equal": False, "near_tie": False, "tie": {"position": position}}
    tokens = (ours[position], theirs[position])
    tie: dict[str, Any] = {"position": position}
    gaps = []
    for name, engine in (("recompute", baseline), ("store", store)):
        logits = next_logits(engine, prompt + ours[:position])
        tie[name] = {str(token): round(float(logits[token]), 4) for token in tokens}
        gaps.append(abs(float(logits[tokens[0]] - logits[tokens[1]])))
    return {"equal": False, "near_tie": max(gaps) <= NEAR_TIE, "tie": tie}


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
    config = StoreConfig(dram="512MiB", ssd="512MiB", path=task["store"])
    messages = list(task["messages"])
    with (
        Engine.from_pretrained(task["model"], store=config, dtype=task["dtype"]) as store,
        Engine.from_pretrained(task["model"], dtype=task["dtype"]) as baseline,
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
