"""House rules, checked: sizes, layers, banned words, formatting, and nothing left unlisted.

Every rule is a function from a `Tree` to a list of complaints. Each runs over the repository,
where it must find nothing, and over a planted violation, which it must find.
"""

import ast
import re
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_COLUMNS = 100
MAX_FUNCTION_LINES = 70
MAX_FILE_LINES = {"csrc/kernels/": 500, "": 400}  # the first prefix that fits
CPP = (".h", ".cc", ".cu", ".cuh")
CODE = (*CPP, ".py", ".pyi", ".cmake", ".txt", ".sh", ".toml")

# What each layer may include, by prefix. Includes go downward only.
LAYERS = {
    "csrc/base/": ("csrc/base/",),
    "csrc/io/": ("csrc/io/", "csrc/base/"),
    "csrc/tier/": ("csrc/tier/", "csrc/io/", "csrc/base/"),
    "csrc/copy/": ("csrc/copy/", "csrc/kernels/params.h", "csrc/base/"),
    "csrc/policy/": ("csrc/policy/", "csrc/base/"),
    "csrc/store/": (
        "csrc/store/",
        "csrc/policy/",
        "csrc/tier/",
        "csrc/copy/",
        "csrc/io/",
        "csrc/base/",
    ),
    "csrc/replay/": (
        "csrc/replay/",
        "csrc/store/",
        "csrc/policy/",
        "csrc/tier/",
        "csrc/copy/",
        "csrc/base/",
    ),
    "csrc/kernels/cuda/": ("csrc/kernels/", "csrc/emu/", "csrc/base/types.h"),
    "csrc/kernels/": ("csrc/kernels/", "csrc/base/types.h"),
    "csrc/emu/": ("csrc/emu/", "csrc/kernels/cuda/", "csrc/base/types.h"),
    "csrc/torch/": ("csrc/torch/", "csrc/kernels/params.h", "csrc/store/", "csrc/base/"),
    "csrc/python/": (
        "csrc/python/",
        "csrc/replay/",
        "csrc/store/",
        "csrc/tier/",
        "csrc/io/",
        "csrc/base/",
    ),
}
# Headers from outside that only some places may include.
OUTSIDE = {
    r"torch/csrc/stable/|torch/headeronly/": ("csrc/torch/",),
    r"torch/|ATen/|c10/": (),
    r"pybind11/|Python\.h": ("csrc/python/",),
    r"cuda|cu\w+\.h": ("csrc/copy/cuda_", "csrc/kernels/cuda/"),
}
# What turns data into code, by module or by function. Models come as safetensors or GGUF.
UNSAFE_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load"}
UNSAFE_CALLS |= {"yaml.load", "yaml.unsafe_load", "yaml.full_load"}
# Each with what to write instead. No pattern matches itself, so that this file passes its rule.
BANNED = {
    r"\bTOD[O]\b|\bFIXM[E]\b|\bXX[X]\b": "finish it, or open an issue",
    r"/wor[k]/|/roo[t]/|/hom[e]/\w|/opt/(whee[l]s|pyp[i])": "a path that holds on every machine",
    r"pypi\.or[g]|pythonhoste[d]|download\.pytorc[h]": "the user's pip settings",
}


@dataclass(frozen=True)
class Tree:
    """The tracked files under a folder, as paths relative to it."""

    root: Path
    files: tuple[str, ...]

    def text(self, file: str) -> str:
        # A few files are no text: the golden stores.
        return (self.root / file).read_text(encoding="utf-8", errors="replace")

    def having(self, *suffixes: str) -> list[str]:
        return [file for file in self.files if file.endswith(suffixes)]


def check_columns(tree: Tree) -> Iterator[str]:
    for file in tree.having(*CODE, "Makefile"):
        for number, line in enumerate(tree.text(file).splitlines(), 1):
            if len(line) > MAX_COLUMNS:
                yield f"{file}:{number}: {len(line)} columns, at most {MAX_COLUMNS}"


def check_file_lines(tree: Tree) -> Iterator[str]:
    for file in tree.having(*CODE):
        limit = next(n for prefix, n in MAX_FILE_LINES.items() if file.startswith(prefix))
        lines = tree.text(file).count("\n")
        if lines > limit:
            yield f"{file}: {lines} lines, at most {limit}"


def blank_out(source: str) -> str:
    """C++ source with comments, literals and directives blanked; lines stay where they are."""
    pattern = re.compile(
        r'R"(?P<mark>\w*)\(.*?\)(?P=mark)"|//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
        r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'|^[ \t]*#(?:\\\n|[^\n])*",
        re.DOTALL | re.MULTILINE,
    )
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), source)


def is_function(header: str) -> bool:
    """True when the text before a '{' is that of a function, not of a scope or a list."""
    header = re.sub(r"\btemplate\s*<[^{};]*?>\s*(?=\w)", "", header)
    if re.search(r"\b(namespace|class|struct|union|enum)\b", header.split("(")[0]):
        return False
    return "(" in header and "=" not in header.split("(")[0]


def cpp_functions(source: str) -> Iterator[tuple[int, int]]:
    """First and last line of every function, lambdas and blocks inside it included."""
    text = blank_out(source)
    depth = function_depth = 0
    header_start = first_line = 0
    for position in (match.start() for match in re.finditer(r"[{};]", text)):
        mark = text[position]
        if mark == "{":
            header = text[header_start:position]
            if not function_depth and is_function(header):
                function_depth = depth + 1
                indent = len(header) - len(header.lstrip())
                first_line = text.count("\n", 0, header_start + indent) + 1
            depth += 1
        elif mark == "}":
            if function_depth == depth:
                function_depth = 0
                yield first_line, text.count("\n", 0, position) + 1
            depth -= 1
        if not function_depth:
            header_start = position + 1


def python_functions(source: str) -> Iterator[tuple[int, int]]:
    """First and last line of every function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.end_lineno or node.lineno


def check_function_lines(tree: Tree) -> Iterator[str]:
    for suffixes, functions in ((CPP, cpp_functions), ((".py",), python_functions)):
        for file in tree.having(*suffixes):
            for first, last in functions(tree.text(file)):
                if last - first + 1 > MAX_FUNCTION_LINES:
                    lines = last - first + 1
                    yield f"{file}:{first}: function of {lines} lines, at most {MAX_FUNCTION_LINES}"


def includes(tree: Tree) -> Iterator[tuple[str, str, str]]:
    """(file, included path, what a complaint begins with) of every include under csrc/."""
    for file in tree.having(*CPP):
        if file.startswith("csrc/"):
            for path in re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', tree.text(file), re.M):
                yield file, path, f"{file} includes {path}"


def check_layers(tree: Tree) -> Iterator[str]:
    for file, path, complaint in includes(tree):
        layer = next((layer for layer in LAYERS if file.startswith(layer)), None)
        if layer is None:
            yield f"{file} is in no layer"
        elif path.startswith("csrc/") and not path.startswith(LAYERS[layer]):
            yield f"{complaint}, which is not below it"


def check_outside_headers(tree: Tree) -> Iterator[str]:
    for file, path, complaint in includes(tree):
        if path.startswith("csrc/"):
            continue
        allowed = next((where for what, where in OUTSIDE.items() if re.match(what, path)), None)
        if allowed is not None and not file.startswith(allowed):
            yield f"{complaint}, allowed only in {' '.join(allowed) or 'no place'}"


def check_words(tree: Tree) -> Iterator[str]:
    for file in tree.files:
        for number, line in enumerate(tree.text(file).splitlines(), 1):
            for pattern, instead in BANNED.items():
                if found := re.search(pattern, line):
                    yield f"{file}:{number}: '{found.group()}'; instead: {instead}"


def check_listed(tree: Tree) -> Iterator[str]:
    """Every source is named in the CMakeLists.txt of its folder or of one above it."""
    for file in tree.having(".cc", ".cu"):
        folders = [parent.as_posix() for parent in Path(file).parents]
        lists = [f"{folder}/CMakeLists.txt".removeprefix("./") for folder in folders]
        names = [(name, Path(file).relative_to(Path(name).parent).as_posix()) for name in lists]
        pattern = r"(?<![\w/.]){}(?![\w/.])"
        if not any(
            name in tree.files and re.search(pattern.format(re.escape(path)), tree.text(name))
            for name, path in names
        ):
            yield f"{file} is in no CMakeLists.txt"
    for file in tree.having(".py"):
        collected = Path(file).name.startswith("test_") or not file.startswith("tests/")
        if not collected and re.search(r"^def test_", tree.text(file), re.M):
            yield f"{file} has tests but pytest does not collect it"


def check_unsafe_loading(tree: Tree) -> Iterator[str]:
    """Nothing in the package can run code that a file holds."""
    for file in tree.having(".py"):
        for node in ast.walk(ast.parse(tree.text(file))) if file.startswith("cachedattn/") else ():
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}", *(f"{node.module}.{name.name}" for name in node.names)]
            elif isinstance(node, ast.Call):
                names = [f"{ast.unparse(node.func)}()"]
            for name in names:
                unsafe = name.removesuffix("()") in UNSAFE_CALLS
                if unsafe or name.split(".")[0] in UNSAFE_MODULES:
                    yield f"{file}:{node.lineno}: {name} can run code from a file"
                    break


def check_guards(tree: Tree) -> Iterator[str]:
    for file in tree.having(".h", ".cuh"):
        if "#pragma once" not in tree.text(file):
            yield f"{file} has no #pragma once"


def run_tool(tree: Tree, suffixes: tuple[str, ...], *command: str) -> Iterator[str]:
    files = tree.having(*suffixes)
    if files:
        tool = Path(sysconfig.get_path("scripts")) / command[0]
        answer = subprocess.run(
            [tool, *command[1:], *files], cwd=tree.root, capture_output=True, text=True
        )
        if answer.returncode != 0:
            yield answer.stdout + answer.stderr


def check_cpp_format(tree: Tree) -> Iterator[str]:
    style = f"--style=file:{ROOT / '.clang-format'}"
    yield from run_tool(tree, CPP, "clang-format", "--dry-run", "-Werror", style)


def check_python_format(tree: Tree) -> Iterator[str]:
    config = f"--config={ROOT / 'pyproject.toml'}"
    yield from run_tool(tree, (".py",), "ruff", "format", "--check", config)


def check_python_lint(tree: Tree) -> Iterator[str]:
    config = f"--config={ROOT / 'pyproject.toml'}"
    yield from run_tool(tree, (".py",), "ruff", "check", "--no-cache", config)


# Each rule with violations: (file, content, part of the complaint).
LONG_CPP = "namespace n {\nint F(int x) {\n" + "  ++x;\n" * 70 + "  return x;\n}\n}\n"
LONG_PYTHON = "def f():\n" + "    print()\n" * 70
RULES: dict[Callable[[Tree], Iterator[str]], list[tuple[str, str, str]]] = {
    check_columns: [("a.py", "#" * 101 + "\n", "a.py:1: 101 columns")],
    check_file_lines: [
        ("a.py", "\n" * 401, "401 lines"),
        ("csrc/kernels/a.cc", "\n" * 501, "501 lines"),
    ],
    check_function_lines: [
        ("csrc/base/a.cc", LONG_CPP, "a.cc:2: function of 73 lines"),
        ("a.py", LONG_PYTHON, "a.py:1: function of 71 lines"),
    ],
    check_layers: [
        ("csrc/base/a.h", '#include "csrc/store/chain.h"\n', "which is not below it"),
        ("csrc/kernels/a.h", '#include "csrc/base/status.h"\n', "which is not below it"),
        ("csrc/extra/a.h", "#include <vector>\n", "is in no layer"),
    ],
    check_outside_headers: [
        ("csrc/store/a.cc", "#include <torch/csrc/stable/tensor.h>\n", "only in csrc/torch/"),
        ("csrc/torch/a.cc", "#include <torch/extension.h>\n", "only in no place"),
        ("csrc/torch/a.cc", "#include <pybind11/stl.h>\n", "only in csrc/python/"),
        ("csrc/copy/a.cc", "#include <cuda_runtime_api.h>\n", "only in csrc/copy/cuda_"),
    ],
    check_words: [
        ("a.md", "{}: more\n".format("TO" + "DO"), "a.md:1"),
        ("a.py", "p = '/{}/x'\n".format("root"), "a.py:1"),
        ("Makefile", "URL = https://{}.org/simple\n".format("pypi"), "Makefile:1"),
    ],
    check_listed: [
        ("csrc/base/a.cc", "", "csrc/base/a.cc is in no CMakeLists.txt"),
        ("tests/extra.py", "def test_x(): ...\n", "pytest does not collect"),
    ],
    check_unsafe_loading: [
        ("cachedattn/a.py", "import pickle\n", "a.py:1: pickle"),
        ("cachedattn/a.py", "import os, joblib.memory\n", "a.py:1: joblib.memory"),
        ("cachedattn/a.py", "from pickle import loads\n", "a.py:1: pickle"),
        ("cachedattn/a.py", "from torch import load\n", "a.py:1: torch.load"),
        ("cachedattn/a.py", "\nx = torch.load('x', weights_only=True)\n", "a.py:2: torch.load()"),
        ("cachedattn/a.py", "def f(x):\n    return eval(x)\n", "a.py:2: eval()"),
        ("cachedattn/a.py", "x = yaml.load(open('x'))\n", "a.py:1: yaml.load()"),
    ],
    check_guards: [("csrc/base/a.h", "int F();\n", "no #pragma once")],
    check_cpp_format: [("csrc/base/a.cc", "int  F( ) ;\n", "clang-format")],
    check_python_format: [("a.py", "x = ( 1 )\n", "reformat")],
    check_python_lint: [("a.py", '"""Doc."""\nimport os\n', "F401")],
}


@pytest.fixture(scope="module")
def repository() -> Tree:
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    return Tree(ROOT, tuple(name for name in names if name and (ROOT / name).is_file()))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_repository_follows(rule: Callable[[Tree], Iterator[str]], repository: Tree) -> None:
    complaints = list(rule(repository))
    assert not complaints, "\n".join(complaints)


VIOLATIONS = [(rule, *violation) for rule, violations in RULES.items() for violation in violations]


@pytest.mark.parametrize("rule,file,content,complaint", VIOLATIONS)
def test_violation_is_found(
    rule: Callable[[Tree], Iterator[str]], file: str, content: str, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    complaints = list(rule(Tree(tmp_path, (file,))))
    assert len(complaints) == 1 and complaint in complaints[0], complaints


def test_functions_are_counted() -> None:
    source = """
struct S { int a; };
S::S(int x) : a(x) {}
template <typename T>
int F(T x) {
  const char* s = "{";  // {
  auto f = [&](int y) { return y; };
  return x ? '{' : f(1'000);
}
static const int kTable[] = {1, 2};
TEST(A, B) {
  if (true) {
  }
}
"""
    assert list(cpp_functions(source)) == [(3, 3), (4, 9), (11, 14)]


def test_version_is_in_changelog() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version is not None
    assert f"## {version.group(1)}" in (ROOT / "CHANGELOG.md").read_text()
