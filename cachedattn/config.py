"""Configuration: what a store is, what a model is. Checked when made, before anything moves."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field

# Compute dtypes of a CPU and of CUDA; the KV is stored in the same one.
DTYPES = ("float32", "bfloat16")
CUDA_DTYPES = (*DTYPES, "float16")

_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(size: int | str) -> int:
    """Bytes of `size`: an int, or a number with a unit ("4GiB", "500 MB").

    ValueError: not a size, or negative. TypeError: neither int nor str.
    """
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise TypeError(f"a size is an int or a str such as '4GiB', not {size!r}")
    if isinstance(size, int):
        if size < 0:
            raise ValueError(f"a size cannot be negative: {size}")
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"not a size: {size!r} (a number, then B, KiB .. TiB or KB .. TB)")
    return int(float(match[1]) * _UNITS[match[2].upper()])


@dataclass(frozen=True)
class StoreConfig:
    """Where KV is kept, and how much of it. Sizes are bytes or text such as "4GiB"; hard caps.

    dram: running sequences included. ssd: 0 for no SSD tier, else `path` is its directory.
    device: on CUDA the pool in its memory, which the engine sizes if this is 0. On a CPU 0, whose
    block tables point at DRAM; else an emulated device pool.
    policy: what is kept longest. 'hazard': what waits, then what is likeliest to be used soon, as
    learnt; 'lookahead' (the paper's): what waits, then what was used last; 'lru'; 'fifo'.
    tenant_quota: what one tenant's KV takes at most of DRAM, and of SSD; 0 for no limit. Running
    requests count, but are not refused.
    encrypt: file with a master key (`cachedattn keygen`); the SSD tier is encrypted under it.
    io: 'inline' does I/O and copies in the calling thread, so that decisions do not hang on speed;
    for tests, slow.
    io_deadline: seconds after which the disk is not waited for any more.
    ssd_read_limit: bytes a second that the SSD tier reads at most, for a disk that others use, too;
    0 for no limit.
    load: 'auto' computes history again instead of loading it, all or a part, where that is measured
    to be sooner; 'always' loads.
    debug_poison: free slots hold NaN, so that a stray read shows; for tests, slow.
    """

    dram: int | str = "1GiB"
    ssd: int | str = 0
    path: str = ""
    encrypt: str = ""
    device: int | str = 0
    tenant_quota: int | str = 0
    block_size: int = 64  # tokens
    policy: str = "hazard"
    dram_reserve: float = 0.1  # share of the DRAM slots kept free
    io: str = "auto"
    io_depth: int = 256
    io_deadline: float = 2.0
    ssd_read_limit: int | str = 0
    load: str = "auto"
    debug_poison: bool = False

    def __post_init__(self) -> None:
        for name in ("dram", "ssd", "device", "tenant_quota", "ssd_read_limit"):
            try:
                parse_size(getattr(self, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if parse_size(self.dram) == 0:
            raise ValueError("dram must not be 0: it holds the running sequences")
        if parse_size(self.ssd) and not self.path:
            raise ValueError("ssd needs path, the directory of the SSD tier")
        if self.path and not parse_size(self.ssd):
            raise ValueError("path needs ssd, the size of the SSD tier")
        if self.encrypt and not parse_size(self.ssd):
            raise ValueError("encrypt needs ssd: DRAM is not encrypted")
        check_choice("block_size", self.block_size, (16, 32, 64, 128))
        check_choice("policy", self.policy, ("lookahead", "hazard", "lru", "fifo"))
        check_choice("io", self.io, ("auto", "uring", "threads", "inline"))
        check_choice("load", self.load, ("auto", "always"))
        if not 0 <= self.dram_reserve < 1:
            raise ValueError(f"dram_reserve must be in [0, 1), not {self.dram_reserve}")
        if not 1 <= self.io_depth <= 4096:
            raise ValueError(f"io_depth must be in [1, 4096], not {self.io_depth}")
        if not 0.001 <= self.io_deadline <= 3600:
            raise ValueError(f"io_deadline must be in [0.001, 3600], not {self.io_deadline}")


@dataclass(frozen=True)
class KvLayout:
    """What a store must know of a model: the shape of its KV, and whose KV it is."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    identity: bytes  # 32 bytes over everything the KV depends on but the tokens
    model_name: str = ""  # for messages

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))
        if len(self.identity) != 32:
            raise ValueError(f"identity must be 32 bytes, not {len(self.identity)}")

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of all layers of one token."""
        size = 4 if self.dtype == "float32" else 2
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * size


@dataclass(frozen=True)
class Truncation:
    """What leaves the context when it is full (the oldest blocks after the first tokens)."""

    ratio: float = 0.5  # share of the droppable blocks
    keep_first: int = 4  # tokens, rounded up to whole blocks; 0: keep none
    keep_system: bool = False  # chat(): keep the system prompt too

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], not {self.ratio}")
        if self.keep_first < 0:
            raise ValueError(f"keep_first must not be negative, not {self.keep_first}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: how fast each pair of a head turns. See `rope.inverse_frequencies`."""

    theta: float = 10000.0
    rotary_dim: int = 0  # even, at most head_dim
    interleaved: bool = False  # pairs (2i, 2i + 1) instead of (i, i + rotary_dim / 2)
    scaling: str = "default"  # 'default', 'linear', 'llama3', 'yarn'
    factor: float = 1.0
    original_max_positions: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole pairs
    attention_factor: float = 1.0  # yarn: scales both q and k
    freq_factors: tuple[float, ...] = ()  # divisors of the frequencies, one a pair (GGUF llama3)


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    max_positions: int
    rope: RopeConfig = field(default_factory=RopeConfig)
    sliding_window: int = 0  # attend to the last so many tokens; 0: to all
    tied_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.rope.rotary_dim % 2 or not 0 < self.rope.rotary_dim <= self.head_dim:
            raise ValueError(
                f"rotary_dim {self.rope.rotary_dim} must be even and at most head_dim "
                f"{self.head_dim}"
            )

    def kv_fields(self) -> dict[str, object]:
        """The fields that K and V depend on beside the weights, for the identity."""
        fields = dataclasses.asdict(self)
        for name in ("max_positions", "eos_token_ids", "tied_embeddings", "vocab_size"):
            del fields[name]
        return fields


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """ValueError naming `name` unless `value` is one of `choices`."""
    if value not in choices:
        listed = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {listed}, not {value!r}")
