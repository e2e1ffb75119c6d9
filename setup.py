"""Builds the package's three kinds of binaries with CMake (CMakeLists.txt).

CACHEDATTN_INTERPRETERS, a list of Python executables separated by ':', makes one wheel that
serves all of them; without it the build is for the running Python. CMAKE_ARGS is passed on.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def other_interpreters() -> list[str]:
    """Executables to build `_core` for besides the running one."""
    return [path for path in os.environ.get("CACHEDATTN_INTERPRETERS", "").split(":") if path]


def python_tag(interpreter: str) -> str:
    """'cp311' for a CPython 3.11."""
    code = "import sys; print('cp%d%d' % sys.version_info[:2])"
    return subprocess.check_output([interpreter, "-c", code], text=True).strip()


def find_tool(name: str) -> str:
    """A tool of this environment, else the one on PATH."""
    local = Path(sysconfig.get_path("scripts")) / name
    return str(local) if local.exists() else name


class CMakeBuild(build_ext):
    """Runs CMake once for all binaries instead of compiling extensions one by one."""

    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        build = ROOT / "build" / ("python" if in_place else "wheel")
        prefix = ROOT if in_place else Path(self.build_lib).resolve()
        interpreters = [sys.executable, *other_interpreters()]
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        subprocess.check_call(
            [
                cmake,
                f"-S{ROOT}",
                f"-B{build}",
                "-GNinja",
                # A kept build folder may remember the ninja of an environment that is gone.
                f"-DCMAKE_MAKE_PROGRAM={ninja}",
                f"-DCACHEDATTN_INTERPRETERS={';'.join(interpreters)}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ]
        )
        subprocess.check_call([cmake, "--build", build])
        subprocess.check_call([cmake, "--install", build, "--prefix", prefix, "--strip"])

    def get_outputs(self) -> list[str]:
        return []  # an in-place build leaves its files where they are imported from

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class OneWheel(bdist_wheel):
    """Tags the wheel with every CPython that it holds a `_core` for."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        tags = {python_tag(path) for path in [sys.executable, *other_interpreters()]}
        return (".".join(sorted(tags)), "none", tag[2])


setup(
    ext_modules=[Extension("cachedattn._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": OneWheel},
)
