"""attn_paged beside the best that others offer, on identical inputs, and beside the limit.

    python bench/bench_attention.py                          about three minutes on two threads
    python bench/bench_attention.py --list --full            all cases of this device
    python bench/bench_attention.py --case decode/b1/8192 --seconds 5
    python bench/bench_attention.py --case extend/b2/5000+30/qwen --peer torch
    python bench/bench_attention.py --vllm SITE_PACKAGES/vllm --llama-cpp SITE_PACKAGES/llama_cpp
    python bench/bench_attention.py --json > attention.jsonl
    python bench/bench_attention.py --markdown attention.jsonl

Peers on CPU, all in this process: torch SDPA after a RoPE pass over K ("torch": the fastest of
several formulations, written without temporaries; "torch-compiled": its RoPE by torch.compile;
"torch-naive"), and the attention alone, on K rotated before, of vLLM (its extension's ops) and of
llama.cpp (flash attention of libggml). On a GPU: torch SDPA (flash, cuDNN), FlashInfer, flash-attn.
A peer that reads rotated K is compared with our kernel on rotated K, and once more, with a RoPE
pass over K (torch's, compiled) added to its time, with our kernel that rotates.

Every output is compared with ours before anything is timed. Times are medians of runs taken in
turn. KV comes in several sets taken in turn, larger together than the last cache. The limit is the
larger of KV bytes by the read rate and operations by the arithmetic peak, both measured beside each
case. ratio_to_peer is the peer's time by ours: above 1 we are faster.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import host
import torch
from attention.cases import PHASES, SHAPES, Case, Inputs, all_cases, is_default, named
from attention.ceilings import CpuCeilings, GpuCeilings, cache_bytes
from attention.ggml import llama_cpp
from attention.gpu_peers import on_gpu
from attention.peers import (
    TOLERANCE,
    Way,
    best_rotate_into,
    ours,
    rotating,
    torch_on_cpu,
)
from attention.report import make_row, markdown, print_case
from attention.timing import medians_on_cpu, medians_on_gpu
from attention.vllm_cpu import vllm

from cachedattn import ops

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PEERS = ("torch", "torch-compiled", "torch-naive", "vllm", "llama.cpp", "flashinfer", "flash-attn")
# The KV sets of a case take so many times the last cache. A CPU's last cache may be shared with
# tenants of other machines, who leave us less than all of it.
CACHES = {"cpu": 1.5, "cuda": 3.0}
MAX_SETS = 256  # only KV of under 2 MB would need more
# Layouts of the KV that live at once: blocks before and after RoPE, torch's, and two peers'.
LAYOUTS = 5
ROPE_PASS = "RoPE pass"


def chosen_cases(args: argparse.Namespace) -> Iterator[Case]:
    if args.case and (case := named(args.case)):
        yield case
        return
    for case in all_cases(args.device):
        wanted = args.full or args.case or is_default(case, args.device)
        wanted = wanted and (args.case or "") in case.name
        if wanted and args.shape in (None, case.shape.name) and args.phase in (None, case.phase):
            yield case


def peer_builders(inputs: Inputs, args: argparse.Namespace) -> dict[str, Callable[[], Way]]:
    """What makes each way of the peers asked for; the first word of its name is the peer."""
    if args.device == "cuda":
        found = on_gpu(inputs)
    else:
        found = torch_on_cpu(inputs)
        found["vllm"] = partial(vllm, inputs, args.vllm)
        found["llama.cpp"] = partial(llama_cpp, inputs, args.llama_cpp)
    return {name: build for name, build in found.items() if name.split()[0] in args.peer}


def check(way: Way, reference: torch.Tensor) -> None:
    out = way.rows(way.call(0)).float()
    distance = float((out - reference.float()).norm() / reference.float().norm())
    limit = way.tolerance or TOLERANCE[reference.dtype]
    if not distance <= limit:  # NaN fails too
        raise SystemExit(f"{way.name}: its output is {distance:.2g} from ours, at most {limit}")


def checked_ways(inputs: Inputs, args: argparse.Namespace) -> tuple[list[Way], dict[str, str]]:
    """Ours, fused and not, then the peers', with equal outputs; and why others were left out."""
    own = [ours(inputs, True), ours(inputs, False)]
    reference = own[0].rows(own[0].call(0))
    check(own[1], reference)
    found, left_out = [], {}
    for name, build in peer_builders(inputs, args).items():
        try:
            way = build()
            check(way, reference)
            found.append(way)
        except Exception as error:  # whatever a peer raises, the others go on
            left_out[name] = (str(error) or repr(error)).splitlines()[0]
    return own + found, left_out


def measure(case: Case, args: argparse.Namespace, meter: CpuCeilings | GpuCeilings) -> list[dict]:
    """Rows of one case, printed unless they are wanted as JSON."""
    dtype = DTYPES[args.dtype]
    wanted = CACHES[args.device] * cache_bytes(args.device)
    sets = min(max(2, int(wanted / case.kv_bytes(dtype)) + 1), MAX_SETS)
    inputs = Inputs(case, dtype, args.device, sets)
    ways, left_out = checked_ways(inputs, args)
    calls = {way.name: way.call for way in ways}
    if any(way.add_rope_pass for way in ways):
        calls[ROPE_PASS] = rotating(inputs, best_rotate_into(args.device))
    medians = medians_on_gpu if args.device == "cuda" else medians_on_cpu
    before = meter.measure()
    seconds = medians(calls, sets, args.seconds)
    ceilings = before.better(meter.measure())

    fused, plain = ways[:2]
    pairs = [(fused, plain.name, seconds[plain.name], "")]
    for way in ways[2:]:
        own = fused if way.rotates_k else plain
        pairs.append((own, way.name, seconds[way.name], way.how))
        if way.add_rope_pass:
            total = seconds[way.name] + seconds[ROPE_PASS]
            pairs.append((fused, f"{way.name} + {ROPE_PASS}", total, way.how))
    pairs.sort(key=lambda pair: pair[0] is plain)
    rows = []
    for own, peer, peer_s, how in pairs:
        figures = make_row(case, dtype, ceilings, 1e6 * seconds[own.name], 1e6 * peer_s)
        row = {"case": case.name, "phase": case.phase, "impl": own.name} | figures
        row |= {"peer": peer, "how": how} | vars(ceilings) | vars(case)
        row |= {"shape": case.shape.name, "device": args.device, "dtype": args.dtype}
        rows.append(row | {"isa": args.isa, "threads": args.threads, "commit": args.commit})
    if not args.json:
        print_case(rows, sets, case.kv_bytes(dtype) / 1e6, left_out)
    for name, why in left_out.items():
        if args.json:
            print(f"{case.name}: {name} left out: {why}", file=sys.stderr)
    return rows


def available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    return int(found[1]) << 10 if found else sys.maxsize


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    return host.cpu()


def package(name: str) -> Path:
    """The folder of an installed package, else a path that leads nowhere."""
    spec = find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else Path(name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES))
    parser.add_argument("--phase", choices=PHASES)
    parser.add_argument("--case", help="part of the names, among all cases; or any whole name")
    parser.add_argument("--full", action="store_true", help="all cases")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--peer", action="append", choices=PEERS, help="default: all")
    parser.add_argument("--seconds", type=float, help="timed, per case; default: 3, on a GPU 1")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=list(CACHES), default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--vllm", type=Path, default=package("vllm"), metavar="FOLDER")
    parser.add_argument("--llama-cpp", type=Path, default=package("llama_cpp"), metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--markdown", type=Path, metavar="JSONL", help="print a table of a file")
    args = parser.parse_args()
    args.peer = args.peer or list(PEERS)
    args.seconds = args.seconds or {"cpu": 3.0, "cuda": 1.0}[args.device]
    args.commit = host.commit()
    args.isa = ops.cpu_isa() if args.device == "cpu" else "cuda"
    return args


def main() -> None:
    args = parse()
    cases = list(chosen_cases(args))
    if args.markdown is not None:
        return markdown(args.markdown)
    if args.list:
        return print("\n".join(case.name for case in cases))
    if not cases:
        raise SystemExit("no case has such a name; --list --full shows all of them")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU")
    # The product's slabs lie in huge pages. Torch reads this at its first allocation.
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    torch.set_num_threads(args.threads)
    header = {name: getattr(args, name) for name in ("device", "threads", "dtype", "isa", "commit")}
    header |= {"machine": machine(args.device), "torch": torch.__version__}
    header["cache_mb"] = round(cache_bytes(args.device) / 1e6)
    text = json.dumps(header) if args.json else ", ".join(f"{k} {v}" for k, v in header.items())
    print(text, flush=True)
    if args.device == "cuda":
        meter: CpuCeilings | GpuCeilings = GpuCeilings(DTYPES[args.dtype])
    else:
        meter = CpuCeilings(args.threads, int(CACHES["cpu"] * cache_bytes("cpu")))
    for case in cases:
        # Two sets at least, and the tensors that they are copied from.
        needed = (2 * LAYOUTS + 2) * case.kv_bytes(DTYPES[args.dtype])
        if needed > available_bytes(args.device):
            print(f"{case.name}: needs {needed / 1e9:.0f} GB, left out", file=sys.stderr)
            continue
        for row in measure(case, args, meter):
            if args.json:
                print(json.dumps(row), flush=True)
    meter.close()


if __name__ == "__main__":
    main()
