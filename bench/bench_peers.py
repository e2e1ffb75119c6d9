"""Time to first token and decode speed of cachedattn and of other engines, side by side.

    python bench/bench_peers.py --gguf SmolLM2.gguf --model HF_DIR \\
        --python vllm=VENV/bin/python --python llama.cpp=VENV/bin/python

Every engine gets the same token ids and the same number of threads, and runs in its own process.
All of them stay up while trials go round in turn, so that a slow minute of the machine hits all
alike. A peer whose interpreter is not named runs in this one, if it is installed; others are left
out. Prints one JSON line per engine and source, then a table. HF_DIR is made by smollm2_hf.py.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer

WORKERS = Path(__file__).parent / "peers"
# engine -> (the name its interpreter goes by, what it imports, script and arguments)
ENGINES = {
    "cachedattn": ("cachedattn", "cachedattn", ["cachedattn_worker.py"]),
    "transformers": ("transformers", "transformers", ["transformers_worker.py"]),
    "vllm compiled": ("vllm", "vllm", ["vllm_worker.py"]),
    "vllm eager": ("vllm", "vllm", ["vllm_worker.py", "--eager"]),
    "llama.cpp": ("llama.cpp", "llama_cpp", ["llama_cpp_worker.py"]),
}
DECODE_CONTEXT, DECODE_TOKENS = 512, 64


@dataclass
class Peer:
    name: str
    process: subprocess.Popen[str]
    log: Path
    sources: list[str] = field(default_factory=list)
    ttft_s: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, set[int]] = field(default_factory=dict)  # first tokens seen
    decode_s: list[float] = field(default_factory=list)

    def ask(self, request: dict[str, object]) -> dict:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            tail = self.log.read_text()[-2000:]
            raise SystemExit(f"{tail}\n{self.name} ended with exit code {self.process.wait()}")
        return json.loads(answer)


def token_ids(model: Path, count: int) -> list[int]:
    """Ids of the recorded conversation's text, from its start and over again."""
    data = json.loads((files("cachedattn") / "data" / "garden.json").read_text())
    text = "\n\n".join(data["user_turns"])
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    return (ids * (count // len(ids) + 1))[:count]


def start(name: str, pythons: dict[str, str], log: Path) -> Peer | None:
    key, module, command = ENGINES[name]
    if key not in pythons and find_spec(module) is None:
        print(f"{name}: not installed, left out", file=sys.stderr)
        return None
    python = pythons.get(key, sys.executable)
    script = [python, str(WORKERS / command[0]), *command[1:]]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    return Peer(name, process, log)


def measure(peers: list[Peer], repeats: int) -> None:
    for trial in range(-1, repeats):  # the first round warms up and does not count
        for peer in peers:
            for source in peer.sources:
                answer = peer.ask({"source": source})
                peer.tokens.setdefault(source, set()).add(answer["token"])
                if trial >= 0:
                    peer.ttft_s.setdefault(source, []).append(answer["ttft_s"])
            seconds = peer.ask({"decode": True})["seconds"]
            if trial >= 0:
                peer.decode_s.append(seconds)
        print(f"round {trial + 1} of {repeats} done", file=sys.stderr)


def report(peers: list[Peer], history: int, new: int) -> None:
    for peer in peers:
        for source, times in peer.ttft_s.items():
            row = {"engine": peer.name, "history": history, "new": new, "source": source}
            row |= {"ttft_s": round(statistics.median(times), 4), "min_s": round(min(times), 4)}
            row |= {"max_s": round(max(times), 4), "first_tokens": sorted(peer.tokens[source])}
            print(json.dumps(row))
        rate = DECODE_TOKENS / statistics.median(peer.decode_s)
        row = {"engine": peer.name, "context": DECODE_CONTEXT, "decode_tokens_s": round(rate, 1)}
        print(json.dumps(row))
    print("\n| engine | recompute, s | memory, s | disk, s | decode, tokens/s |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for peer in peers:
        cells = [
            f"{statistics.median(peer.ttft_s[s]):.3f}" if s in peer.ttft_s else "-"
            for s in ("recompute", "memory", "disk")
        ]
        rate = DECODE_TOKENS / statistics.median(peer.decode_s)
        print(f"| {peer.name} | {' | '.join(cells)} | {rate:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory, bf16")
    parser.add_argument("--gguf", type=Path, required=True, help="the file it came from")
    parser.add_argument("--python", action="append", default=[], metavar="PEER=INTERPRETER")
    parser.add_argument("--engine", action="append", choices=list(ENGINES), help="default: all")
    parser.add_argument("--history", type=int, default=1500)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    pythons = dict(item.split("=", 1) for item in args.python)
    ids = token_ids(args.model, args.history + args.new)
    task = {
        "model": str(args.model.resolve()),
        "gguf": str(args.gguf.resolve()),
        "history": ids[: args.history],
        "new": ids[args.history :],
        "decode_context": token_ids(args.model, DECODE_CONTEXT),
        "decode_tokens": DECODE_TOKENS,
        "threads": args.threads,
    }
    with tempfile.TemporaryDirectory(prefix="cachedattn-peers-") as scratch:
        peers: list[Peer] = []
        for name in args.engine or ENGINES:
            folder = Path(scratch) / name.replace(" ", "-")
            folder.mkdir()
            peer = start(name, pythons, folder / "stderr.log")
            if peer is None:
                continue
            answer = peer.ask(task | {"scratch": str(folder)})
            peer.sources = answer["sources"]
            print(f"{name}: ready after {answer['start_s']:.1f} s", file=sys.stderr)
            peers.append(peer)
        measure(peers, args.repeats)
        report(peers, args.history, args.new)
        for peer in peers:
            peer.process.communicate()


if __name__ == "__main__":
    main()
