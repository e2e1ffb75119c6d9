"""The machine code of the CUDA kernels, read without a GPU: what is there, and what must not be.

Every kernel has code for its architectures; those where time is spent use tensor cores and
asynchronous copies, and keep everything in registers.
"""

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BOTH = {"sm_80", "sm_90a"}


@dataclass(frozen=True)
class Kernel:
    archs: set[str]
    opcodes: set[str] = field(default_factory=set)  # that each of its functions uses
    hot: bool = False  # no local memory


KERNELS = {
    "DecodeKernel": Kernel(BOTH, {"HMMA", "LDGSTS", "LDSM"}, hot=True),
    "AttnExtend": Kernel(BOTH, {"HMMA", "LDGSTS", "LDSM"}, hot=True),
    "HopperKernel": Kernel({"sm_90a"}, {"HGMMA", "UTMALDG"}, hot=True),
    "PlainKernel": Kernel(BOTH),
    "KvAppendKernel": Kernel(BOTH, hot=True),
    "RopeApplyKernel": Kernel(BOTH, hot=True),
    "MergeStatesKernel": Kernel(BOTH, hot=True),
    "LeafSumsKernel": Kernel(BOTH, {"LDG", "SHFL"}, hot=True),
}
LOCAL_MEMORY = {"LDL", "STL"}


@dataclass
class Function:
    """A kernel's instantiation in the code of one architecture."""

    arch: str
    name: str  # mangled
    opcodes: Counter[str] = field(default_factory=Counter)
    stack: int = 0  # bytes of local memory a thread


def tool(name: str) -> Path:
    """A program of the PyPI package nvidia-cuda-NAME."""
    files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    return Path(next(file for file in files if file.name == name).locate())


def parse_code(arch: str, text: str) -> Iterator[Function]:
    """The functions of one listing of nvdisasm."""
    function = None
    for line in text.splitlines():
        if section := re.match(r'\s*\.section\s+"?\.text\.([^",]+)', line):
            if function:
                yield function
            function = Function(arch, section[1])
        elif function and (found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+)", line)):
            function.opcodes[found[1]] += 1
    if function:
        yield function


def parse_stack(text: str) -> dict[str, int]:
    """Bytes of stack and local memory of each function in the answer to cuobjdump -res-usage."""
    pattern = r"Function (\S+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    return {name: int(stack) + int(local) for name, stack, local in re.findall(pattern, text)}


def read_cubin(cubin: Path) -> list[Function]:
    listing = subprocess.check_output([tool("nvdisasm"), "-c", "-ndf", cubin], text=True)
    usage = subprocess.check_output([tool("cuobjdump"), "-res-usage", cubin], text=True)
    stacks = parse_stack(usage)
    functions = list(parse_code(cubin.suffixes[-2].removeprefix("."), listing))
    for function in functions:
        function.stack = stacks[function.name]
    return functions


def read_library(library: Path, folder: Path) -> list[Function]:
    """All functions of a library; its code objects are unpacked into `folder`."""
    subprocess.check_output([tool("cuobjdump"), "-xelf", "all", library.resolve()], cwd=folder)
    with ThreadPoolExecutor() as pool:
        return [f for functions in pool.map(read_cubin, folder.iterdir()) for f in functions]


def complaints(functions: list[Function]) -> Iterator[str]:
    """What is missing, or there and should not be."""
    found = set()
    for function in functions:
        name = next((name for name in KERNELS if f"{len(name)}{name}" in function.name), None)
        what = f"{function.arch} {function.name}"
        if name is None:
            yield f"{what} is no kernel of KERNELS"
            continue
        found.add((name, function.arch))
        for opcode in sorted(KERNELS[name].opcodes - function.opcodes.keys()):
            yield f"{what} has no {opcode}"
        if KERNELS[name].hot and function.stack > 0:
            yield f"{what} takes {function.stack} bytes of local memory"
        for opcode in sorted(LOCAL_MEMORY & function.opcodes.keys() if KERNELS[name].hot else ()):
            yield f"{what} has {function.opcodes[opcode]} {opcode}"
    for name, kernel in KERNELS.items():
        for arch in sorted(kernel.archs):
            if (name, arch) not in found:
                yield f"{name} has no code for {arch}"


def library() -> Path:
    spec = importlib.util.find_spec("cachedattn")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "libcachedattn.so"


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> list[Function]:
    if "CudaAttnPaged" not in subprocess.check_output(["nm", "-D", library()], text=True):
        assert shutil.which("nvcc") is None, "nvcc is here, and the library has no CUDA kernels"
        pytest.skip("built without CUDA kernels: no nvcc")
    return read_library(library(), tmp_path_factory.mktemp("cubins"))


def test_machine_code(functions: list[Function]) -> None:
    found = list(complaints(functions))
    assert not found, "\n".join(found)


def test_later_gpus_get_ptx(functions: list[Function]) -> None:
    listed = subprocess.check_output([tool("cuobjdump"), "-lptx", library()], text=True)
    assert "sm_80.ptx" in listed


def good_functions() -> list[Function]:
    """As test_machine_code wants them."""
    return [
        Function(arch, f"_ZN4cuda{len(name)}{name}E", Counter({"MOV": 1, **dict.fromkeys(ops, 1)}))
        for name, ops in ((name, kernel.opcodes) for name, kernel in KERNELS.items())
        for arch in KERNELS[name].archs
    ]


def test_nothing_is_said_against_good_code() -> None:
    assert not list(complaints(good_functions()))


@pytest.mark.parametrize(
    ("name", "damage", "complaint"),
    [
        ("DecodeKernel", lambda f: f.opcodes.update(LDL=3), "has 3 LDL"),
        ("HopperKernel", lambda f: f.opcodes.update(STL=1), "has 1 STL"),
        ("AttnExtend", lambda f: setattr(f, "stack", 8), "takes 8 bytes of local memory"),
        ("DecodeKernel", lambda f: f.opcodes.pop("LDSM"), "has no LDSM"),
        ("AttnExtend", lambda f: f.opcodes.pop("HMMA"), "has no HMMA"),
        ("HopperKernel", lambda f: f.opcodes.pop("UTMALDG"), "has no UTMALDG"),
        ("RopeApplyKernel", lambda f: setattr(f, "arch", "sm_75"), "has no code for sm_80"),
        ("PlainKernel", lambda f: setattr(f, "name", "_Z5Otherv"), "Otherv is no kernel of"),
    ],
)
def test_damage_is_found(name, damage, complaint) -> None:
    functions = good_functions()
    damage(next(f for f in functions if name in f.name and f.arch == min(KERNELS[name].archs)))
    assert any(complaint in found for found in complaints(functions))


SPILLING = """
__global__ void __launch_bounds__(1024) DecodeKernel(float* x, int n) {
  float values[96];
  for (int i = 0; i < 96; ++i) values[i] = x[i * n];
  for (int i = 0; i < 96; ++i) x[i * n + 1] = values[(i * n) % 96];
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_real_code_that_spills_is_found(tmp_path: Path) -> None:
    source, cubin = tmp_path / "spilling.cu", tmp_path / "spilling.sm_80.cubin"
    source.write_text(SPILLING)
    subprocess.check_call(["nvcc", "-arch=sm_80", "-cubin", "-o", cubin, source])
    found = list(complaints(read_cubin(cubin)))
    for complaint in ("LDL", "STL", "bytes of local memory", "has no HMMA", "has no LDGSTS"):
        assert any(complaint in text for text in found), complaint
