"""Perplexity after the context overflows, for five ways to go on.

    python bench/perplexity.py --model HF_DIR

    no overflow   the whole text in one context: the bound
    recompute     the oldest tokens leave, the rest is computed again (token truncation)
    ours, N       the store cuts un-rotated K and V; keep_first N tokens stay
    naive, N      the same cut on K that was cached after RoPE: old angles, new positions

All cut to the same lengths at the same tokens. Tokens before the first overflow, which all score
in the same context, are given beside those after it.
Texts are ones that lie on a Debian machine and in any Python. Prints one JSON line per text and
way, then a table. HF_DIR is made by smollm2_hf.py.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from cachedattn import Engine, Request, SamplingParams, StoreConfig, Truncation

BLOCK = 64
CHUNK = 256
Score = Callable[[int, torch.Tensor], None]


def gpl3() -> str:
    return Path("/usr/share/common-licenses/GPL-3").read_text()


def python_reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


TEXTS = {"GNU GPL version 3": gpl3, "Python language reference, pydoc topics": python_reference}


class Scorer:
    """The loss of each token but the first, which nothing predicts."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = torch.tensor(ids)
        self.loss = torch.full((len(ids),), math.nan)

    def __call__(self, index: int, logits: torch.Tensor) -> None:
        """logits [rows, vocab] of the tokens index, index + 1, ...: each predicts the next."""
        rows = min(len(logits), len(self.ids) - index - 1)
        target = self.ids[index + 1 : index + 1 + rows]
        loss = torch.nn.functional.cross_entropy(logits[:rows].float(), target, reduction="none")
        self.loss[index + 1 : index + 1 + rows] = loss

    def perplexity(self, first: int, end: int) -> float:
        part = self.loss[first:end]
        if part.isnan().any():
            raise RuntimeError(f"{int(part.isnan().sum())} tokens were not scored")
        return float(part.mean().exp())


def cuts(length: int, window: int, keep_first: int) -> Iterator[tuple[int, int, int]]:
    """(tokens so far, first token dropped, first token kept after it) of every overflow: half of
    the blocks that may go, as the store does with ratio 0.5."""
    keep = -(-keep_first // BLOCK) * BLOCK
    drop = (window - keep) // BLOCK // 2 * BLOCK
    for number, end in enumerate(range(window, length, drop)):
        yield end, keep, keep + drop * (number + 1)


def run_engine(engine: Engine, ids: list[int], score: Score) -> int:
    """Runs `ids` as one prompt; the number of tokens that the store dropped."""

    def hook(_request: Request, first: int, logits: torch.Tensor) -> None:
        nonlocal dropped
        score(first, logits)
        if _request.sequence is not None:
            dropped = _request.sequence.num_computed_tokens - _request.sequence.context_len

    dropped = 0
    request = engine.add_request(ids, SamplingParams(max_tokens=1), on_logits=hook)
    while not request.finished:
        engine.step()
    return dropped


def no_overflow(model: Path, ids: list[int], window: int, score: Score) -> None:
    with Engine.from_pretrained(model, truncation=None, max_step_tokens=CHUNK) as engine:
        run_engine(engine, ids, score)


def recompute(model: Path, ids: list[int], window: int, score: Score) -> None:
    with Engine.from_pretrained(model, truncation=None, max_step_tokens=CHUNK) as engine:
        run_engine(engine, ids[:window], score)
        for end, _, start in cuts(len(ids), window, 0):
            run_engine(engine, ids[start : start + window], score_from(end, start, score))


def score_from(end: int, start: int, score: Score) -> Score:
    """Scores tokens from `end` on, of a prompt that begins at token `start`: the earlier ones
    have been scored in their own context."""

    def part(index: int, logits: torch.Tensor) -> None:
        skip = max(0, end - 1 - (start + index))
        if skip < len(logits):
            score(start + index + skip, logits[skip:])

    return part


def ours(keep_first: int) -> Callable[[Path, list[int], int, Score], None]:
    def run(model: Path, ids: list[int], window: int, score: Score) -> None:
        truncation = Truncation(ratio=0.5, keep_first=keep_first)
        with Engine.from_pretrained(
            model,
            store=StoreConfig(dram="1GiB", block_size=BLOCK),
            max_model_len=window,
            max_step_tokens=CHUNK,
            truncation=truncation,
        ) as engine:
            dropped = run_engine(engine, ids, score)
        *_, (_, keep, start) = cuts(len(ids), window, keep_first)
        if dropped != start - keep:
            raise RuntimeError(f"the store dropped {dropped} tokens, {start - keep} expected")

    return run


def naive(keep_first: int) -> Callable[[Path, list[int], int, Score], None]:
    @torch.inference_mode()
    def run(model: Path, ids: list[int], window: int, score: Score) -> None:
        llama = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        cache = DynamicCache()
        schedule = {end: (keep, start) for end, keep, start in cuts(len(ids), window, keep_first)}
        previous = 0  # tokens dropped so far
        for index in range(0, len(ids), BLOCK):
            if index in schedule:
                keep, start = schedule[index]
                gone = start - keep - previous
                previous += gone
                for layer in cache.layers:
                    for name in ("keys", "values"):
                        old = getattr(layer, name)
                        new = torch.cat([old[:, :, :keep], old[:, :, keep + gone :]], dim=2)
                        setattr(layer, name, new)
            part = torch.tensor([ids[index : index + BLOCK]])
            base = cache.get_seq_length()
            positions = torch.arange(base, base + part.shape[1])[None]
            out = llama(part, past_key_values=cache, position_ids=positions)
            score(index, out.logits[0])

    return run


WAYS = {
    "no overflow": no_overflow,
    "recompute": recompute,
    "ours, keep_first 4": ours(4),
    "ours, keep_first 0": ours(0),
    "naive, keep_first 4": naive(4),
    "naive, keep_first 0": naive(0),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--tokens", type=int, default=7936, help="of each text, at most")
    parser.add_argument("--window", type=int, default=2048)
    args = parser.parse_args()
    from cachedattn.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_directory(args.model)
    if tokenizer is None:
        raise SystemExit(f"{args.model} has no tokenizer.json")
    table = []
    for title, read in TEXTS.items():
        ids = tokenizer.encode(read())[: args.tokens]
        for way, run in WAYS.items():
            scorer = Scorer(ids)
            begin = time.perf_counter()
            run(args.model, ids, args.window, scorer)
            row = {"text": title, "tokens": len(ids), "window": args.window, "way": way}
            # Before the first overflow all ways compute the same: a check on the comparison.
            row["perplexity_before"] = round(scorer.perplexity(1, args.window), 3)
            row["perplexity_after"] = round(scorer.perplexity(args.window, len(ids)), 3)
            print(json.dumps(row), flush=True)
            print(f"{way}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
            table.append(row)
    print("\n| text | way | before the first overflow | after it |\n| --- | --- | ---: | ---: |")
    for row in table:
        before, after = row["perplexity_before"], row["perplexity_after"]
        print(f"| {row['text']} | {row['way']} | {before:.2f} | {after:.2f} |")


if __name__ == "__main__":
    main()
