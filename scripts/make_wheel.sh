#!/usr/bin/env bash
# Builds one wheel for every CPython >= 3.10 found here, audits it, installs it into a clean
# environment with torch and numpy only, and runs the op tests there from another folder.
set -euo pipefail
cd "$(dirname "$0")/.."
platform=manylinux_2_35_x86_64  # what gcc 12 on Debian 12 gives: Debian 12+, Ubuntu 22.04+

# Other interpreters with headers: on PATH, or installed by pyenv.
find_others() {
  local candidate own_minor
  own_minor=$(python -c 'import sys; print(sys.version_info[1])')
  for candidate in python3.{10..20} "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python; do
    "$candidate" - "$own_minor" 2>/dev/null <<'PY' || true
import os, sys, sysconfig
minor = sys.version_info[1]
if (sys.implementation.name == "cpython" and minor >= 10 and minor != int(sys.argv[1])
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
        and os.path.exists(sysconfig.get_path("include") + "/Python.h")):
    print(minor, sys.executable)
PY
  done | sort -un -k1,1 | cut -d' ' -f2
}

rm -rf build/wheel/raw build/wheel_env build/wheel_test build/lib* build/bdist.* dist
others=$(find_others | paste -sd:)
echo "Building for $(command -v python)${others:+ and $others}"
CACHEDATTN_INTERPRETERS=$others python -m pip wheel -q . --no-build-isolation --no-deps \
  -w build/wheel/raw
auditwheel repair --plat $platform --exclude 'libtorch*.so' --exclude 'libc10*.so' \
  -w dist build/wheel/raw/*.whl
wheel=$(ls dist/*.whl)

mkdir -p build/wheel_test
python -m zipfile -e "$wheel" build/wheel_test/unpacked
python scripts/audit_binaries.py build/wheel_test/unpacked/cachedattn

python -m venv build/wheel_env
clean=$PWD/build/wheel_env/bin/python
"$clean" -m pip install -q --disable-pip-version-check 'pip>=23.1'
"$clean" scripts/install_torch.py
"$clean" -m pip install -q --disable-pip-version-check numpy pytest hypothesis
"$clean" -m pip install -q --disable-pip-version-check --no-deps "$wheel"
cp tests/conftest.py tests/*ops*.py build/wheel_test/
(cd build/wheel_test && "$clean" -m pytest -q -p no:cacheprovider .)
echo "Tested: $wheel"
