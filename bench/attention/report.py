"""Rows of results: made from times, printed for people, and as a Markdown table."""

import json
from pathlib import Path

import torch

from attention.cases import Case
from attention.ceilings import Ceilings


def make_row(
    case: Case, dtype: torch.dtype, ceilings: Ceilings, us: float, peer_us: float
) -> dict[str, object]:
    """The figures of one implementation on one case beside one peer."""
    us, peer_us, limit_us = round(us, 2), round(peer_us, 2), ceilings.limit_us(case, dtype)
    return {
        "us": us,
        "gbps": round(case.kv_bytes(dtype) / us / 1e3, 2),
        "tflops": round(case.flops / us / 1e6, 4),
        "limit_us": round(limit_us, 1),
        "limit_pct": round(100 * limit_us / us, 1),
        "peer_us": peer_us,
        "ratio_to_peer": round(peer_us / us, 3),
    }


def print_case(rows: list[dict], sets: int, megabytes: float, left_out: dict[str, str]) -> None:
    first = rows[0]
    ceilings = {
        name: value for name, value in first.items() if name.endswith(("_gbps", "_gflops")) if value
    }
    known = ", ".join(f"{name} {value:.1f}" for name, value in ceilings.items())
    print(f"\n{first['case']}: {sets} sets of {megabytes:.1f} MB of KV")
    print(f"  limit {first['limit_us']:.1f} us from {known}")
    seen = set()
    for row in rows:
        if row["impl"] not in seen:
            seen.add(row["impl"])
            print(
                f"  {row['impl']:28} {row['us']:11.1f} us {row['gbps']:8.2f} GB/s "
                f"{row['tflops']:8.4f} TFLOP/s {row['limit_pct']:6.1f} % of the limit"
            )
        name = f"{row['peer']} ({row['how']})" if row["how"] else row["peer"]
        if row["peer"].startswith("cachedattn"):
            extra = 100 * (row["us"] / row["peer_us"] - 1)
            print(f"    fused rotation: {extra:+.1f} % over K rotated before")
        else:
            print(f"    {row['ratio_to_peer']:8.3f} x {name}, {row['peer_us']:.1f} us")
    for name, why in left_out.items():
        print(f"    left out: {name}: {why}")


def markdown(path: Path) -> None:
    """A table of the fused kernel, a row a case, a column a peer, from --json output."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row.get("impl") == "cachedattn"]
    cases = dict.fromkeys(row["case"] for row in rows)
    own = "cachedattn, K rotated before"
    peers = [name for name in dict.fromkeys(row["peer"] for row in rows) if name != own]
    heads = ["case", "time, us", "GB/s", "TFLOP/s", "% of limit", "fused rotation"]
    heads += [f"x {name}" for name in peers]
    print(f"| {' | '.join(heads)} |\n|---|{'---:|' * (len(heads) - 1)}")
    for case in cases:
        found = {row["peer"]: row for row in rows if row["case"] == case}
        row = found[own]
        cells = [case, f"{row['us']:,.0f}", f"{row['gbps']:.1f}", f"{row['tflops']:.3f}"]
        cells += [f"{row['limit_pct']:.0f}", f"{100 * (row['us'] / row['peer_us'] - 1):+.0f} %"]
        cells += [f"{found[p]['ratio_to_peer']:.2f}" if p in found else "-" for p in peers]
        print(f"| {' | '.join(cells)} |")
