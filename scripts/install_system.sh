#!/usr/bin/env bash
# Makes sure that the compiler and the libraries of third_party/README.md are there. What is
# missing is installed by apt-get as root or through sudo without a password; where that is not
# possible the list is printed and the exit status is 1. PYTHON names the interpreter. With the
# argument `tests` what only the tests need is asked for, too.
set -euo pipefail
python=${PYTHON:-python3}
group=${1:-}

has_program() { command -v "$1" >/dev/null; }
has_header() { echo "#include <$1>" | g++ -E -x c++ - >/dev/null 2>&1; }
has_static() { [ "$(g++ -print-file-name="$1" 2>/dev/null)" != "$1" ]; }
has_library() { has_header "$1" && has_static "$2"; }
has_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }
has_fuzzer() { "${BASH_SOURCE%/*}/fuzz_compiler.sh" >/dev/null; }
has_python_header() {
  "$python" -c 'import os, sysconfig as s, sys
sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' 2>/dev/null
}
need() {
  local package=$1
  shift
  "$@" || missing+=("$package")
}

# Fills `missing` with Debian package names.
find_missing() {
  missing=()
  need g++ has_program g++
  need libc6-dev has_header linux/io_uring.h
  need liburing-dev has_library liburing.h liburing.a
  need libxxhash-dev has_header xxhash.h
  need libssl-dev has_library openssl/sha.h libcrypto.a
  need libgtest-dev has_library gtest/gtest.h libgtest.a
  need libbenchmark-dev has_header benchmark/benchmark.h
  need python3 has_program "$python"
  need python3-venv has_venv
  need python3-dev has_python_header
  [ "$group" = tests ] || return 0
  need pkg-config has_program pkg-config
  need libfuse3-dev pkg-config --exists fuse3
  need e2fsprogs has_program mkfs.ext4
  has_fuzzer || missing+=(clang-19 libclang-rt-19-dev)
}

find_missing
if [ ${#missing[@]} -gt 0 ]; then
  sudo=()
  [ "$(id -u)" -eq 0 ] || sudo=(sudo -n)
  if ! has_program apt-get || ! "${sudo[@]}" true 2>/dev/null; then
    echo "Missing, and not installed because that needs apt-get and root or sudo:" >&2
    echo "  ${missing[*]}" >&2
    echo "On Debian or Ubuntu: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  echo "Installing: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  "${sudo[@]}" apt-get update -q
  "${sudo[@]}" apt-get install -q -y --no-install-recommends "${missing[@]}"
  find_missing
  if [ ${#missing[@]} -gt 0 ]; then
    echo "Still missing after apt-get: ${missing[*]}" >&2
    exit 1
  fi
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "$python is $("$python" -V 2>&1); Python 3.10 or later is needed (make PYTHON=...)" >&2
  exit 1
}
