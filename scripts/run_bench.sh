#!/usr/bin/env bash
# Runs the native benchmarks that exist, then `cachedattn bench` with the arguments given.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -e bench/native/CMakeLists.txt ]; then
  cmake -S . -B build/bench -GNinja -DCACHEDATTN_PYTHON=OFF -DCACHEDATTN_BENCH=ON >/dev/null
  cmake --build build/bench
  for program in build/bench/bench/native/*_bench; do
    "$program"
  done
fi
cachedattn bench "$@"
