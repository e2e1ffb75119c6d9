"""The store's moves between SSD, DRAM and device beside the best that plain ways reach.

    python bench/bench_transfer.py                        about four minutes
    python bench/bench_transfer.py --directory /mnt/nvme --geometry 8b --case pieces
    python bench/bench_transfer.py --encrypt --nixl VENV/bin/python
    python bench/bench_transfer.py --json > transfer.jsonl

Cases, for the KV of a model like Llama-3-8B (32 layers, 8 KV heads of 128) and of SmolLM2-135M
(30 layers, 3 heads of 64), in blocks of 64 tokens of bfloat16:

    pieces   SSD -> DRAM for a turn: groups of layer slices, the first layers of all blocks first
    blocks   SSD -> DRAM for a waiting turn: whole blocks
    write    DRAM -> SSD: whole blocks, from publishing a history until the last has landed
    device   DRAM -> device: layer slices; the device is emulated, so this is a thread's memcpy

The other ways move the same bytes in requests of the same sizes at the same depth, past the page
cache, to and from huge pages, on the same file system, and look at nothing: a loop of io_uring, a
loop of pread or pwrite (one at a time), fio, NIXL's POSIX backend (at a depth of its own choice).
"unverified" is the store with checksums taken for right, "encrypted" (with --encrypt) one under a
master key, whose tags stand in for checksums. Ways take turns, round by round; figures
are medians over the rounds, and "ours" is the store's rate by the way's, the median of the ratios
within rounds. CPU seconds are those of the process, all threads; workers of the kernel are not in
them.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import host
from transfer.ways import Load, Sample, Server, fio

from cachedattn.keys import write_master_key

GEOMETRIES = {"8b": (32, 8, 128), "smollm2": (30, 3, 64)}
CASES = ("pieces", "blocks", "write", "device")
OURS, UNVERIFIED = "cachedattn", "cachedattn, unverified"
ENCRYPTED = "cachedattn, encrypted"
FIRST_SLOT = 2 << 20
Ways = dict[str, Callable[[], Sample]]


def servers(geometry: str, directory: Path, args: argparse.Namespace) -> dict[str, Server]:
    """The native programs, by what they are asked for."""
    found = {}
    targets = {OURS: "transfers", UNVERIFIED: "transfers_unverified", ENCRYPTED: "transfers"}
    for name, target in targets.items():
        if name == ENCRYPTED and not args.encrypt:
            continue
        folder = directory / geometry / name
        folder.mkdir(parents=True)
        command = [host.built(target), folder, *map(str, [*GEOMETRIES[geometry], args.megabytes])]
        if name == ENCRYPTED:
            write_master_key(folder / "key")
            command.append(folder / "key")
        found[name] = Server(command)
    return found


def nixl_server(python: str, folder: Path, loads: dict[str, Load]) -> Server:
    worker = Path(__file__).parent / "transfer" / "nixl_worker.py"
    return Server([python, worker, folder, json.dumps(loads, default=vars)])


def ways_of(case: str, programs: dict[str, Server], folder: Path) -> Ways:
    ours = programs[OURS]
    if case == "device":
        return {OURS: ours.way("device"), "memcpy": ours.way("memcpy")}
    write = case == "write"
    ways = {OURS: ours.way(case), UNVERIFIED: programs[UNVERIFIED].way(case)}
    if ENCRYPTED in programs:
        ways[ENCRYPTED] = programs[ENCRYPTED].way(case)
    ways["io_uring loop"] = ours.way(f"uring {case}")
    ways["pwrite loop" if write else "pread loop"] = ours.way(f"pread {case}")
    if shutil.which("fio"):
        file, first = (folder / "plain", 0) if write else (folder / "store" / "blocks", FIRST_SLOT)
        ways["fio"] = fio(file, first, ours.loads()[case], write)
    if "nixl" in programs:
        ways["NIXL POSIX"] = programs["nixl"].way(case)
    return ways


def measure(ways: Ways, rounds: int) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {name: [] for name in ways}
    for i in range(rounds):
        names = list(ways)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(ways[name]())
    return samples


def rows_of(case: str, geometry: str, load: Load | None, samples: dict) -> list[dict]:
    rows = []
    for name, runs in samples.items():
        ratios = [ours.gbps / run.gbps for ours, run in zip(samples[OURS], runs, strict=True)]
        row = {"case": case, "geometry": geometry, "way": name}
        row["gbps"] = round(statistics.median(run.gbps for run in runs), 3)
        cpu = statistics.median(run.cpu_s_per_gib for run in runs)
        row |= {"cpu_s_per_gib": round(cpu, 4), "ours": round(statistics.median(ratios), 3)}
        row["rounds"] = [round(run.gbps, 3) for run in runs]
        if load is not None:
            row |= {"depth": load.depth, "sizes": load.sizes, "bytes": load.bytes}
        rows.append(row)
    return rows


def limit_of(rows: list[dict]) -> dict:
    """The best of the ways that look at nothing: what disk or memory gave here."""
    return max((row for row in rows if not row["way"].startswith(OURS)), key=lambda r: r["gbps"])


def print_case(rows: list[dict]) -> None:
    first, limit = rows[0], limit_of(rows)
    head = f"\n{first['geometry']} {first['case']}"
    if "sizes" in first:
        sizes = ", ".join(f"{n} of {size >> 10} KiB" for size, n in first["sizes"].items())
        head += f": {sizes}, depth {first['depth']}"
    print(f"{head}\n  {'':24} {'GB/s':>7} {'CPU s/GiB':>10} {'ours':>6}")
    for row in rows:
        print(
            f"  {row['way']:24} {row['gbps']:7.2f} {row['cpu_s_per_gib']:10.4f} {row['ours']:6.2f}"
        )
    share = 100 * limit["ours"]
    print(f"  limit {limit['gbps']:.2f} GB/s ({limit['way']}), reached {share:.0f} %", flush=True)


def facts(args: argparse.Namespace) -> dict[str, object]:
    table = subprocess.check_output(
        ["findmnt", "-no", "FSTYPE", "--target", args.directory], text=True
    )
    known = {"machine": host.cpu(), "kernel": platform.release(), "file_system": table.strip()}
    known |= {"commit": host.commit(), "rounds": args.rounds, "megabytes": args.megabytes}
    if shutil.which("fio"):
        known["fio"] = subprocess.check_output(["fio", "--version"], text=True).strip()
    known["load_average"] = float(Path("/proc/loadavg").read_text().split()[0])
    return known | {"command": " ".join(["python", "bench/bench_transfer.py", *sys.argv[1:]])}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", action="append", choices=list(GEOMETRIES))
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument("--megabytes", type=int, default=512, help="of one history; eight on disk")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--encrypt", action="store_true", help="an encrypted store beside ours")
    parser.add_argument("--nixl", metavar="PYTHON", help="a Python with nixl, torch and numpy")
    parser.add_argument("--json", action="store_true", help="one object a line")
    return parser.parse_args()


def main() -> None:
    args = parse()
    known = facts(args)
    print(json.dumps(known) if args.json else ", ".join(f"{k} {v}" for k, v in known.items()))
    with tempfile.TemporaryDirectory(prefix="transfer-", dir=args.directory) as name:
        for geometry in args.geometry or GEOMETRIES:
            programs = servers(geometry, Path(name), args)
            loads = programs[OURS].loads()
            folder = Path(name) / geometry / OURS
            if args.nixl:
                programs["nixl"] = nixl_server(args.nixl, folder, loads)
            for case in args.case or CASES:
                ways = ways_of(case, programs, folder)
                rows = rows_of(case, geometry, loads.get(case), measure(ways, args.rounds))
                if args.json:
                    print(*map(json.dumps, rows), sep="\n", flush=True)
                else:
                    print_case(rows)
            for program in programs.values():
                program.close()


if __name__ == "__main__":
    main()
