"""Audits the binaries of a package folder: who needs what, and the stable ABI of torch.

Usage: python scripts/audit_binaries.py FOLDER. Prints what is wrong and exits 1, or one line.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SYSTEM = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
CORE = "libcachedattn.so"
OPS = "libcachedattn_torch.so"
LOAD = """
import ctypes, os, sys, torch
for path in sys.argv[1:]:
    ctypes.CDLL(path, mode=os.RTLD_NOW)
"""


def dynamic_section(path: Path) -> tuple[set[str], str | None]:
    """The libraries that a binary needs, and its run path."""
    text = subprocess.check_output(["readelf", "-dW", path], text=True)
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", text))
    run_path = re.search(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", text)
    return needed, run_path and run_path.group(1)


def linking_errors(path: Path, allowed: set[str], required: set[str]) -> list[str]:
    """Violations of what a binary may and must need, and of its run path."""
    needed, run_path = dynamic_section(path)
    errors = [f"{path.name} needs {name}" for name in sorted(needed - allowed - SYSTEM)]
    errors += [f"{path.name} does not need {name}" for name in sorted(required - needed)]
    if run_path not in (None, "$ORIGIN"):
        errors.append(f"{path.name} has the run path {run_path}")
    return errors


def loading_errors(paths: list[Path]) -> list[str]:
    """Undefined symbols, found by binding every symbol at load with torch in the process."""
    command = [sys.executable, "-c", LOAD, *map(str, paths)]
    answer = subprocess.run(command, capture_output=True, text=True)
    return [] if answer.returncode == 0 else [answer.stderr.strip().splitlines()[-1]]


def abi_errors(folder: Path) -> list[str]:
    """What torch-abi-audit says against the folder."""
    tool = Path(sysconfig.get_path("scripts")) / "torch-abi-audit"
    command = [tool, "-v", "--check", "torch", folder.resolve()]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        return [answer.stdout + answer.stderr]
    floor = re.search(r"Min torch:\s+2\.(\d+)", answer.stdout)
    if floor is None or int(floor.group(1)) > 11:
        return ["needs a torch later than 2.11:\n" + answer.stdout]
    return []


def audit(folder: Path) -> list[str]:
    """Everything that is wrong with the binaries in `folder`; empty when all is well."""
    core, ops = folder / CORE, folder / OPS
    modules = sorted(folder.glob("_core.*.so"))
    missing = [path.name for path in (core, ops) if not path.exists()]
    missing += [] if modules else ["_core"]
    if missing:
        return [f"{name} is missing in {folder}" for name in missing]
    torch_libraries = {"libtorch.so", "libtorch_cpu.so"}
    errors = linking_errors(core, set(), set())
    errors += linking_errors(ops, {CORE, *torch_libraries}, {CORE, "libtorch.so"})
    for module in modules:
        errors += linking_errors(module, {CORE}, {CORE})
    ours = [path for path in modules if path.name.endswith(sysconfig.get_config_var("EXT_SUFFIX"))]
    return errors + loading_errors([core, ops, *ours]) + abi_errors(folder)


def main() -> None:
    """Audits the folder named on the command line."""
    if shutil.which("readelf") is None:
        sys.exit("readelf is missing (Debian: binutils)")
    folder = Path(sys.argv[1])
    errors = audit(folder)
    if errors:
        sys.exit("\n".join(errors))
    print(f"{folder.name}: binaries pass the audit")


if __name__ == "__main__":
    main()
