"""Installs torch into the running environment, and never CUDA where there is no GPU.

A torch that is already there is kept. CACHEDATTN_TORCH, pip arguments such as a wheel's path or
'torch --index-url URL', says what to install and is not second-guessed. Otherwise pip is asked
first what it would install: on a machine without an NVIDIA GPU a build that brings CUDA packages
is refused, with what to do instead.
"""

import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import sys

REQUIREMENT = "torch==2.13.0"
MINIMUM = (2, 11)
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
REFUSAL = """\
No NVIDIA GPU was found here, and pip would install {torch} with {count} CUDA packages: several
gigabytes that nothing would use. Nothing was installed. Say which build to take:

  the CPU build    make ... CACHEDATTN_TORCH='torch --index-url URL'
                   URL: the CPU index from "Get Started" on PyTorch's site
  a wheel on disk  make ... CACHEDATTN_TORCH=path/to/torch.whl
  CUDA after all   make ... CACHEDATTN_TORCH={requirement}
"""


def installed() -> str | None:
    """Version of the torch of this environment."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def has_gpu() -> bool:
    """True when the NVIDIA driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return answer.returncode == 0 and "GPU " in answer.stdout


def cuda_packages(report: dict) -> list[str]:
    """Names of the CUDA packages in a report of `pip install --report`."""
    names = [item["metadata"]["name"].lower() for item in report["install"]]
    return [name for name in names if name.startswith(("nvidia-", "cuda-"))]


def planned() -> dict:
    """What pip would install for REQUIREMENT, as its report."""
    command = [*PIP, "install", "--dry-run", "--quiet", "--report", "-", REQUIREMENT]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        sys.exit(f"pip cannot find {REQUIREMENT}:\n{answer.stderr}")
    return json.loads(answer.stdout)


def main() -> None:
    """Installs torch, or exits with a message."""
    version = installed()
    if version is not None:
        if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM:
            sys.exit(f"torch {version} is installed; 2.11 or later is needed")
        print(f"torch {version} is installed")
        return
    arguments = shlex.split(os.environ.get("CACHEDATTN_TORCH", ""))
    if not arguments:
        arguments = [REQUIREMENT]
        if not has_gpu():
            cuda = cuda_packages(planned())
            if cuda:
                sys.exit(
                    REFUSAL.format(torch=REQUIREMENT, count=len(cuda), requirement=REQUIREMENT)
                )
    subprocess.check_call([*PIP, "install", *arguments])


if __name__ == "__main__":
    main()
