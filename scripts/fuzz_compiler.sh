#!/usr/bin/env bash
# Prints the newest clang++ from 14 on that can link a libFuzzer program; exit status 1 without one.
set -euo pipefail
for version in 2{9..0} 1{9..4} ''; do
  compiler=clang++${version:+-$version}
  if echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, long) { return 0; }' |
    "$compiler" -x c++ -fsanitize=fuzzer,address,undefined -o /dev/null - 2>/dev/null; then
    echo "$compiler"
    exit 0
  fi
done
exit 1
