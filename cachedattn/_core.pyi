"""Bindings of the C++ store (csrc/store/attention_store.h). Use `cachedattn.AttentionStore`."""

from collections.abc import Callable, Sequence as Seq

from typing import Any

import numpy as np

class StoreError(RuntimeError):
    """An operating error of a store. `code` is one of 'mismatch', 'corrupt', 'exhausted', 'io',
    'busy', 'closed'."""

    code: str

class CachedTokens:
    total: int  # longest reusable history, dropped tokens included, less `recomputed`
    by_tier: dict[str, int]  # {'device': n, 'dram': n, 'ssd': n}, tokens of the context
    recomputed: int  # history that `begin` leaves to compute again: that is sooner

class ComputeCost:
    """What computing takes: steps of at most `step_tokens` tokens (0: not known), each of `step_s`
    seconds, `token_s` for each token and `pair_s` for each of the tokens before that one."""

    step_tokens: int
    step_s: float
    token_s: float
    pair_s: float
    def __init__(
        self,
        *,
        step_tokens: int = 0,
        step_s: float = 0,
        token_s: float = 0,
        pair_s: float = 0,
    ) -> None: ...

class Chain:
    """A request's tokens as block keys; append-only."""

    num_tokens: int
    def append(self, tokens: np.ndarray | Seq[int]) -> None: ...
    def tokens(self) -> np.ndarray: ...  # int32 copy
    def context_tokens(self, num_tokens: int) -> np.ndarray:
        """Token ids of the context when `num_tokens` tokens are in it (cut blocks left out)."""

class Sequence:
    """A running turn. While history is computed again, `context_len` and `num_computed_tokens` end
    before what is loaded, and `room` is what is left to compute."""

    id: int
    cached: CachedTokens
    stall_s: dict[str, float]  # seconds that computing waited for its history: 'ssd', 'copy'
    num_computed_tokens: int
    context_len: int
    room: int
    loading: bool
    load_left_s: float  # by the rates measured so far; inf: not known
    def block_table(self) -> np.ndarray: ...  # int32 copy, slots in order
    def reserve(self, num_tokens: int) -> bool: ...  # False: the pool is full
    def wait_layer(self, layer: int) -> bool: ...  # False: drop this step and the sequence
    def layer_done(self, layer: int, num_tokens: int) -> None: ...
    def append(self, tokens: np.ndarray | Seq[int]) -> None: ...
    def truncate(self) -> None: ...
    def commit(self, finish_reason: str = "") -> None: ...
    def close(self) -> None: ...  # without commit: what was not saved is dropped

class TraceEvent:
    time_ns: int
    kind: str  # 'read_start', 'read_end', 'load_start', ..., as TraceKind
    sequence: int
    first_layer: int
    num_layers: int
    slot: int
    tier: str  # of 'evict': that of the copy
    block: int  # the first bytes of its key; 0: none, or not known yet
    num_tokens: int  # of the block

class AttentionStore:
    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: str,  # 'float32', 'bfloat16', 'float16'
        identity: bytes,  # 32 bytes
        model_name: str,
        cuda_device: int,  # the GPU that has the device pool; -1: emulated
        device_bytes: int,
        dram_bytes: int,
        ssd_bytes: int,
        tenant_quota_bytes: int,  # 0: none
        path: str,
        master_key_file: str,  # '': not encrypted
        policy: str,  # 'lookahead', 'hazard', 'lru', 'fifo'
        dram_reserve: float,
        io: str,  # 'auto', 'uring', 'threads', 'inline'
        io_depth: int,
        io_deadline_us: int,
        ssd_read_limit: int,  # bytes a second; 0: none
        poison: bool,
        progress: Callable[[int, int], None] | None,
    ) -> None: ...
    handle: int
    io_report: str
    def close(self) -> None: ...
    def new_chain(
        self,
        tokens: np.ndarray | Seq[int],
        tenant: str,
        window: int,
        ratio: float,
        keep_first: int,
        conversation: str = "",
    ) -> Chain: ...
    def advise(
        self,
        tenant: str,
        conversation: str,
        advice: str,  # 'over', 'ttl', 'lease', 'return'
        seconds: float,
    ) -> None: ...
    def set_queue(self, waiting: Seq[Chain]) -> None: ...
    def lookup(self, chain: Chain) -> CachedTokens: ...
    def begin(
        self, chain: Chain, max_history: int = ..., cost: ComputeCost = ...
    ) -> Sequence | None:
        """Takes the chain over. None: no room now, the chain stays usable."""
    def use_stream(self, stream: int) -> None: ...  # cudaStream_t; nothing without a GPU
    def poll(self) -> None: ...
    def drain(self) -> bool: ...  # False: no save and no write was under way
    def flush(self) -> None: ...
    def drop_tier(self, tier: str) -> None: ...
    def erase_tenant(self, tenant: str) -> bool: ...
    def stats(self) -> dict[str, object]: ...
    def tenant_usage(self, tenant: str) -> dict[str, int]: ...  # slots by tier
    def enable_trace(self, on: bool) -> None: ...
    def take_trace(self) -> list[TraceEvent]: ...
    def check_invariants(self) -> None: ...

def inspect_store(path: str) -> dict[str, object]:
    """What the store in directory `path` holds: model, format, layout, slots, counters and
    `blocks` (dicts of slot, key, parent, num_tokens, depth, generation). Takes no lock, writes
    nothing."""

def check_store(
    path: str,
    deep: bool,
    master_key_file: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, object]:
    """`checked` (blocks looked at), `damage` (dicts of slot, key, what; slot None: no slot, key
    None: not known), `indexed` (the index of a clean close said what each slot holds) and
    `erased` (blocks of tenants whose key is gone). Takes no lock, writes nothing. StoreError:
    `deep` without the master key of an encrypted store. An exception of `progress`, and Ctrl-C,
    end it."""

def erase_tenant(path: str, master_key_file: str, tenant: str) -> bool:
    """Drops a tenant's key from a store that nobody has open; False: there is none."""

def check_policy(name: str) -> None: ...  # ValueError: there is no such policy of a replay

def play_generated(
    *,
    conversations: int,
    seed: int,
    turns: float,  # means, as those that follow: turns of a conversation, tokens that a turn adds
    prompt: float,
    answer: float,
    think_s: float,
    context: int,  # tokens, at which a conversation ends
    slots: int,
    load: float,
    granularity: int,
    policy: str,
    dram_bytes: int,
    ssd_bytes: int,
    token_bytes: int,
    dram_reserve: float,
    ssd_read_bytes_s: float,
    ssd_write_bytes_s: float,
    ssd_latency_s: float,
    copy_bytes_s: float,
    progress: Callable[[dict[str, int]], None] | None = None,  # what it raises ends the replay
) -> dict[str, Any]:
    """Plays generated conversations; what they found in sums, as by `cachedattn.simulate`."""

class Replay:
    """A trace's requests and their schedule on a server; the columns are of one length.

    Token counts of the answers are in units of `granularity` tokens of the model.
    """

    block_size: int
    def __init__(
        self,
        *,
        parent: np.ndarray,  # earlier request that the prompt shares `shared` tokens with, or -1
        shared: np.ndarray,
        prompt: np.ndarray,
        answer: np.ndarray,
        session: np.ndarray,
        previous: np.ndarray,  # the session's turn before, or -1
        finish: np.ndarray,  # csrc/policy/policy.h, Finish
        arrival_s: np.ndarray,  # of first turns
        think_s: np.ndarray,  # of later turns
        service_s: np.ndarray,  # negative: not recorded
        granularity: int,
        window: int,  # 0: none
        slots: int,
        load: float,  # 0: unscaled
        span_s: float,
        turns_per_second: float,  # 0: by load
    ) -> None: ...
    arrival: np.ndarray  # seconds, by request
    start: np.ndarray
    completion: np.ndarray
    factor: float  # of service times
    mean_queue: float
    def ideal(self) -> np.ndarray: ...  # tokens by request that an unlimited store finds
    def optimum(self, capacity: int) -> np.ndarray: ...  # and the best store of so many tokens
    def play(
        self,
        *,
        policy: str,
        device_bytes: int,  # 0: room for the running turns, which leave it as they end
        dram_bytes: int,
        ssd_bytes: int,
        token_bytes: int,  # of one token of the model
        dram_reserve: float,
        ssd_read_bytes_s: float,
        ssd_write_bytes_s: float,
        ssd_latency_s: float,
        ssd_depth: int,  # operations that it is given at a time
        copy_bytes_s: float,  # 0: takes no time
        events: bool = False,  # 'events' of the result is then the store's trace
        progress: Callable[[int], None] | None = None,  # what it raises ends the replay
    ) -> dict[str, Any]: ...
