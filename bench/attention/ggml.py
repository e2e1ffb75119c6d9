"""llama.cpp's attention alone: ggml's flash attention, driven through the C API of libggml.

K and V lie token by token in float16, llama.cpp's default, which its fast paths need; bfloat16
values near 1 are exact in it. In decode it sums V in float16, hence the wider tolerance.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from attention.cases import Inputs, in_huge_pages
from attention.peers import UnavailableError, Way

POINTER, FLOAT32, FLOAT16 = ctypes.c_void_p, 0, 1
CONTEXT_BYTES = 1 << 20  # descriptions of tensors and of the graph, not their data


class InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", POINTER),
        ("no_alloc", ctypes.c_bool),
    )


class Library:
    """The functions that are called here, by their names without `ggml_`."""

    def __init__(self, folder: Path) -> None:
        paths = [folder / "lib" / f"libggml-{part}.so" for part in ("base", "cpu")]
        if not all(path.exists() for path in paths):
            raise UnavailableError(f"no libggml-base.so and libggml-cpu.so in {folder / 'lib'}")
        base, cpu = (ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in paths)
        integer, real = ctypes.c_int, ctypes.c_float

        def bind(library: ctypes.CDLL, name: str, result: object, *arguments: object):
            function = getattr(library, f"ggml_{name}")
            function.restype, function.argtypes = result, arguments
            return function

        self.init = bind(base, "init", POINTER, InitParams)
        self.free = bind(base, "free", None, POINTER)
        self.new_tensor = bind(
            base, "new_tensor_4d", POINTER, POINTER, integer, *[ctypes.c_int64] * 4
        )
        self.permute = bind(base, "permute", POINTER, POINTER, POINTER, *[integer] * 4)
        self.attention = bind(base, "flash_attn_ext", POINTER, *[POINTER] * 5, *[real] * 3)
        self.new_graph = bind(base, "new_graph", POINTER, POINTER)
        self.expand = bind(base, "build_forward_expand", None, POINTER, POINTER)
        self.wrap = bind(base, "backend_cpu_buffer_from_ptr", POINTER, POINTER, ctypes.c_size_t)
        self.place = bind(base, "backend_tensor_alloc", integer, POINTER, POINTER, POINTER)
        self.compute = bind(base, "backend_graph_compute", integer, POINTER, POINTER)
        self.backend = bind(cpu, "backend_cpu_init", POINTER)()
        bind(cpu, "backend_cpu_set_n_threads", None, POINTER, integer)(
            self.backend, torch.get_num_threads()
        )


@cache
def load(folder: Path) -> Library:
    return Library(folder)


class Graph:
    """Flash attention over one KV set; the tensors stay where torch has them."""

    def __init__(
        self, library: Library, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        self.library = library
        self.context = library.init(InitParams(CONTEXT_BYTES, None, True))
        self.kept = (q, k, v, mask)
        q_, mask_ = self.tensor(q), None if mask is None else self.tensor(mask)
        k_, v_ = (library.permute(self.context, self.tensor(x), 0, 2, 1, 3) for x in (k, v))
        result = library.attention(self.context, q_, k_, v_, mask_, scale, 0.0, 0.0)
        batch, heads, new, dim = q.shape
        self.out = torch.empty(batch, new, heads, dim)
        self.put(result, self.out)
        self.graph = library.new_graph(self.context)
        library.expand(self.graph, result)

    def __del__(self) -> None:
        self.library.free(self.context)

    def tensor(self, x: Tensor) -> int:
        kind = {torch.float32: FLOAT32, torch.float16: FLOAT16}[x.dtype]
        tensor = self.library.new_tensor(self.context, kind, *reversed(x.shape))
        self.put(tensor, x)
        return tensor

    def put(self, tensor: int, x: Tensor) -> None:
        assert x.is_contiguous()
        buffer = self.library.wrap(x.data_ptr(), x.numel() * x.element_size())
        if self.library.place(buffer, tensor, x.data_ptr()) != 0:
            raise RuntimeError("ggml refused a tensor")

    def run(self) -> Tensor:
        if self.library.compute(self.library.backend, self.graph) != 0:
            raise RuntimeError("ggml could not compute the graph")
        return self.out


def llama_cpp(inputs: Inputs, folder: Path) -> Way:
    library, case = load(folder), inputs.case
    dtype = torch.float32 if inputs.dtype == torch.float32 else torch.float16
    q = inputs.q_rotated.float()
    mask = None
    if case.phase != "decode":
        hidden = torch.arange(case.length) > torch.arange(case.history, case.length)[:, None]
        mask = torch.zeros(1, 1, case.new, case.length, dtype=torch.float16)
        mask.masked_fill_(hidden, float("-inf"))

    k, v = (  # [B, L, H, D]
        x.transpose(1, 2).contiguous().to(dtype) for x in (inputs.one_k_rotated, inputs.one_v)
    )
    graphs = [
        Graph(library, q, in_huge_pages(k), in_huge_pages(v), mask, inputs.scale)
        for _ in range(inputs.sets)
    ]

    def rows(out: Tensor) -> Tensor:
        return out.reshape(-1, case.shape.q_heads, case.shape.dim)

    how = "ggml flash attention, " + str(dtype).removeprefix("torch.")
    tolerance = 0.05 if dtype == torch.float16 else None
    return Way("llama.cpp", lambda i: graphs[i].run(), rows, False, how, tolerance, True)
