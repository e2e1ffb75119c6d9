"""AttentionStore: keeps conversations' KV in device memory, DRAM and SSD, and brings it back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cachedattn import _core, ops
from cachedattn.config import KvLayout, StoreConfig, Truncation, parse_size

if TYPE_CHECKING:
    from cachedattn._core import CachedTokens, Chain, ComputeCost, Sequence, TraceEvent

NO_LIMIT = 2**32 - 1
UNKNOWN_COST = _core.ComputeCost()


class AttentionStore:
    """The store of one model's KV. Belongs to the thread that opened it.

    `kv[layer]` is the pool that block tables index: [slots, 2, num_kv_heads, block_size,
    head_dim], K before RoPE. StoreError (with `.code`) from opening and closing; misses are
    results. `progress(done, total)` follows the scan of an existing SSD file.

    device: where the KV is computed, see `compute_device`. On CUDA `config.device` is the size of
    the pool in its memory, and `kv` lies there.
    """

    def __init__(
        self,
        config: StoreConfig,
        layout: KvLayout,
        progress: Callable[[int, int], None] | None = None,
        *,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = config
        self.layout = layout
        self.device = compute_device(device)
        on_cuda = self.device.type == "cuda"
        if on_cuda and parse_size(config.device) == 0:
            raise ValueError("device must not be 0 on CUDA: it holds the running sequences")
        self._core = _core.AttentionStore(
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            block_size=config.block_size,
            dtype=layout.dtype,
            identity=layout.identity,
            model_name=layout.model_name,
            cuda_device=self.device.index if on_cuda else -1,
            device_bytes=parse_size(config.device),
            dram_bytes=parse_size(config.dram),
            ssd_bytes=parse_size(config.ssd),
            tenant_quota_bytes=parse_size(config.tenant_quota),
            path=config.path,
            master_key_file=config.encrypt,
            policy=config.policy,
            dram_reserve=config.dram_reserve,
            io=config.io,
            io_depth=config.io_depth,
            io_deadline_us=round(config.io_deadline * 1e6),
            ssd_read_limit=parse_size(config.ssd_read_limit),
            poison=config.debug_poison,
            progress=progress,
        )
        self._closed = False
        # Tells the model whether anything listens to `layer_done`: saves leave a device pool
        # layer by layer, a DRAM pool has nothing to copy.
        self.needs_layer_done = parse_size(config.device) > 0
        handle = self._core.handle
        self.kv = [
            torch.ops.cachedattn.kv_pool_layer(handle, layer) for layer in range(layout.num_layers)
        ]

    @property
    def io_report(self) -> str:
        """The I/O engine chosen at open, and why."""
        return self._core.io_report

    def __enter__(self) -> AttentionStore:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lands every save and closes the file. Sequences must be gone. Twice is fine."""
        if not self._closed:
            self._closed = True
            self.kv = []  # views of memory that goes away
            self._core.close()

    def new_chain(
        self,
        tokens: Iterable[int],
        *,
        tenant: str = "",
        conversation: str = "",
        window: int = 0,
        truncation: Truncation | None = None,
    ) -> Chain:
        """The block keys of `tokens`, which differ for every tenant: none finds another's KV.
        conversation: a name that all its turns share, for the placement and the hints below.
        window 0: the context never overflows."""
        truncation = truncation or Truncation()
        return self._core.new_chain(
            np.asarray(list(tokens), np.int32),
            tenant,
            window,
            truncation.ratio,
            truncation.keep_first,
            conversation,
        )

    def set_queue(self, waiting: list[Chain]) -> None:
        """Publishes the waiting queue, next to run first: what to prefetch, what to keep."""
        self._core.set_queue(waiting)

    def lookup(self, chain: Chain) -> CachedTokens:
        """The longest reusable history of `chain`, and where it is."""
        return self._core.lookup(chain)

    def begin(
        self, chain: Chain, max_history: int = NO_LIMIT, cost: ComputeCost = UNKNOWN_COST
    ) -> Sequence | None:
        """Starts a turn over `chain` and the loads of its history; None: no room now. With a `cost`
        it loads only what is sooner loaded than computed again, by the rates measured so far."""
        return self._core.begin(chain, max_history, cost)

    def use_current_stream(self) -> None:
        """On CUDA: what is computed from now on runs on torch's current stream of the device, and
        loads and saves wait for it, and it for them. Call it before each step."""
        if self.device.type == "cuda":
            self._core.use_stream(torch.cuda.current_stream(self.device).cuda_stream)

    def poll(self) -> None:
        """Lets finished I/O take effect and starts what is due. Never blocks."""
        self._core.poll()

    def end(self, conversation: str, *, tenant: str = "") -> None:
        """Hint: no turn of this conversation will come. It makes room first."""
        self._core.advise(tenant, conversation, "over", 0)

    def expire_after(self, conversation: str, seconds: float, *, tenant: str = "") -> None:
        """Hint: the conversation is over when it has been idle for so long; 0: not."""
        self._core.advise(tenant, conversation, "ttl", _checked(seconds))

    def pin(self, conversation: str, seconds: float, *, tenant: str = "") -> None:
        """Hint: keep the conversation for so long from now on, before all others; 0: no longer."""
        self._core.advise(tenant, conversation, "lease", _checked(seconds))

    def will_return_in(self, conversation: str, seconds: float, *, tenant: str = "") -> None:
        """Hint: the conversation's next turn comes after so long."""
        self._core.advise(tenant, conversation, "return", _checked(seconds))

    def poll_until_computed(self) -> None:
        """On CUDA: polls until what was started on torch's current stream is done, so that reads
        and writes go on under a long step."""
        if self.device.type == "cuda":
            done = torch.cuda.current_stream(self.device).record_event()
            while not done.query():
                self.poll()

    def drain(self) -> bool:
        """Waits until every save and write under way has ended; False: none was."""
        return self._core.drain()

    def flush(self) -> None:
        """Waits until all that the SSD tier has a place for is written, or has failed to be."""
        self._core.flush()

    def drop_tier(self, tier: str) -> None:
        """Drops every copy in `tier` that nothing uses; 'dram' lands on the SSD first."""
        self._core.drop_tier(tier)

    def erase_tenant(self, tenant: str) -> bool:
        """Drops the tenant's key, and what it has in every tier: nothing of it can be read again.

        False: it had no key. ValueError: the store is not encrypted. StoreError: the tenant has
        sequences running, or the key could not be dropped.
        """
        return self._core.erase_tenant(tenant)

    def stats(self) -> dict[str, Any]:
        """Counters, and per tier its slots; as `_core.AttentionStore.stats`."""
        return self._core.stats()

    def tenant_usage(self, tenant: str) -> dict[str, int]:
        """Slots that count for `tenant`, by tier."""
        return self._core.tenant_usage(tenant)

    def enable_trace(self, on: bool = True) -> None:
        """Records timed events (clears those recorded)."""
        self.needs_layer_done = on or parse_size(self.config.device) > 0
        self._core.enable_trace(on)

    def take_trace(self) -> list[TraceEvent]:
        """The events since the last call, times in nanoseconds (CLOCK_MONOTONIC)."""
        return self._core.take_trace()

    def check_invariants(self) -> None:
        """Aborts the process on a broken invariant; for tests."""
        self._core.check_invariants()


def compute_device(device: str | torch.device) -> torch.device:
    """'cpu', 'cuda' (torch's current one) or 'cuda:N', with its index.

    ValueError: another one, one that is not here, or a build without CUDA kernels.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", str(device))
    if match is None:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', not {str(device)!r}")
    if match[0] == "cpu":
        return torch.device("cpu")
    if not ops.has_cuda():
        raise ValueError(f"device {match[0]!r}: this build of cachedattn has no CUDA kernels")
    if not torch.cuda.is_available():
        raise ValueError(f"device {match[0]!r}: torch {torch.__version__} sees no NVIDIA GPU here")
    index = int(match[1]) if match[1] else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise ValueError(f"device {match[0]!r}: there are only {torch.cuda.device_count()} GPUs")
    if torch.cuda.get_device_capability(index) < (8, 0):
        raise ValueError(f"device {match[0]!r}: its compute capability is below 8.0")
    return torch.device("cuda", index)


def _checked(seconds: float) -> float:
    if not 0 <= seconds <= 1e9:
        raise ValueError(f"seconds must be in [0, 1e9], not {seconds}")
    return seconds
