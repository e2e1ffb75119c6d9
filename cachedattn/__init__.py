"""A conversation's attention state is computed once and kept in the cheapest place that is fast
enough: device memory, DRAM or SSD."""

from cachedattn import ops
from cachedattn._core import StoreError
from cachedattn.config import KvLayout, StoreConfig, Truncation
from cachedattn.engine import Engine
from cachedattn.request import Delta, Reply, Request
from cachedattn.sampling import SamplingParams
from cachedattn.store import AttentionStore

__all__ = [
    "AttentionStore",
    "Delta",
    "Engine",
    "KvLayout",
    "Reply",
    "Request",
    "SamplingParams",
    "StoreConfig",
    "StoreError",
    "Truncation",
    "ops",
]
