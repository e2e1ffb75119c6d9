"""What turns cost: GPU time, and the memory and disk that hold the KV meanwhile."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prices:
    """Dollars an hour; the defaults are those of the CachedAttention paper."""

    gpu: float = 5.0  # each (A100)
    dram: float = 0.0088  # a GB
    ssd: float = 0.000082  # a GB
    gpus: int = 1


PAPER_PRICES = Prices()


def cost(
    prices: Prices, gpu_s: float, held_s: float, dram: int, ssd: int, turns: int
) -> dict[str, float]:
    """Dollars for a million turns, of which `turns` kept all GPUs busy for `gpu_s` seconds.

    dram, ssd: bytes, paid for `held_s` seconds whether they are full or not.
    """
    millions = turns / 1e6
    found = {
        "gpu": prices.gpus * prices.gpu * gpu_s / 3600 / millions,
        "dram": prices.dram * dram / 1e9 * held_s / 3600 / millions,
        "ssd": prices.ssd * ssd / 1e9 * held_s / 3600 / millions,
    }
    return {**found, "total": sum(found.values())}
