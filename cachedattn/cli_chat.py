"""`cachedattn chat`: a conversation at the terminal, or line by line from a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from cachedattn.cli_common import find_model, load_engine, reply_fields, stalls_text, tiers_text
from cachedattn.config import StoreConfig, Truncation
from cachedattn.engine import Engine, Message
from cachedattn.request import Reply
from cachedattn.sampling import SamplingParams


@dataclass(frozen=True)
class ChatOptions:
    """The command's options; see `cachedattn chat --help`."""

    model: Path | None
    store: Path | None
    dram: str
    ssd: str
    transcript: Path | None
    system: str
    dtype: str
    threads: int | None
    max_model_len: int | None
    truncation: Truncation | None
    as_json: bool


def read_transcript(path: Path | None, system: str) -> list[Message]:
    """The chat so far. ValueError: `path` is there but holds no chat."""
    start = [{"role": "system", "content": system}] if system else []
    if path is None:
        return start
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} for the transcript")
    if not path.exists():
        return start
    try:
        messages = json.loads(path.read_text("utf-8"))
        chat = [{"role": str(m["role"]), "content": str(m["content"])} for m in messages]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} is not a transcript: a JSON list of messages") from None
    return chat or start


def write_transcript(path: Path, messages: list[Message]) -> None:
    """Replaces the file in one step, so that an interrupted write loses no turn."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(messages, ensure_ascii=False, indent=1) + "\n", "utf-8")
    part.replace(path)


def user_messages() -> Iterator[str]:
    """What the user types, a message a line, until end of file."""
    while True:
        try:
            text = input("you> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if text.strip():
            yield text


def play_turn(
    engine: Engine, messages: list[Message], sampling: SamplingParams, as_json: bool
) -> Reply:
    """One answer, streamed to stdout unless `as_json`. Ctrl-C aborts the turn and goes on up."""
    for item in engine.stream(messages, sampling, conversation="chat"):
        if isinstance(item, Reply):
            return item
        if not as_json:
            print(item.text, end="", flush=True)
    raise AssertionError("a stream ends with its reply")


def print_cost(reply: Reply, as_json: bool) -> None:
    """The line after an answer: what it reused, from where, and how long it took to begin."""
    fields = reply_fields(reply)
    if as_json:
        print(json.dumps({"text": reply.text, **fields}), flush=True)
        return
    Console().print(
        f"\n[dim]{fields['reused_tokens']:,} tokens reused ({tiers_text(reply.cached_from)}), "
        f"{fields['new_tokens']:,} new, first token after {reply.ttft_s:.3f} s, of which "
        f"{sum(reply.stall_s.values()):.3f} waiting{stalls_text(reply.stall_s)}[/dim]"
    )


def run_chat(options: ChatOptions, sampling: SamplingParams) -> None:
    """Chats until the input ends. Ctrl-C ends it too; finished turns stay in the store."""
    messages = read_transcript(options.transcript, options.system)
    if options.store is None:
        config = StoreConfig(dram=options.dram)
    else:
        config = StoreConfig(dram=options.dram, ssd=options.ssd, path=str(options.store))
    engine = load_engine(
        find_model(options.model),
        options.threads,
        store=config,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        truncation=options.truncation,
    )
    try:
        with engine:
            for text in user_messages():
                messages.append({"role": "user", "content": text})
                reply = play_turn(engine, messages, sampling, options.as_json)
                messages.append({"role": "assistant", "content": reply.text})
                if options.transcript is not None:
                    write_transcript(options.transcript, messages)
                print_cost(reply, options.as_json)
    except KeyboardInterrupt:
        print("\nInterrupted; the finished turns are kept.", file=sys.stderr)
        raise
