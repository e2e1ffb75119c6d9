#!/usr/bin/env bash
# Runs groups of tests (native, python, sanitize, fuzz), all of them even after a failure, and
# prints a summary. Exit status 1 when a step failed. FUZZ_SECONDS: for each fuzz target (60).
set -uo pipefail
cd "$(dirname "$0")/.."
summary=()
failed=0

step() {  # step TITLE COMMAND...
  local title=$1 start=$SECONDS result=ok
  shift
  printf '\n=== %s\n' "$title"
  "$@" || { result=FAILED; failed=1; }
  summary+=("$(printf '%-34s %-6s %5d s' "$title" "$result" $((SECONDS - start)))")
}

# native_tests FOLDER CMAKE_ARGS...: builds them there and runs them.
native_tests() {
  local build=build/$1
  shift
  cmake -S . -B "$build" -GNinja -DCACHEDATTN_PYTHON=OFF -DCACHEDATTN_TESTS=ON "$@" >/dev/null &&
    cmake --build "$build" &&
    $run ctest --test-dir "$build" --output-on-failure --no-tests=error --timeout 300 -j "$(nproc)"
}

# Builds the fuzz targets and runs as many at a time as there are cores, each on the inputs that
# lie in tests/fuzz/corpus and on those that earlier runs have found.
fuzz_tests() {
  local compiler
  compiler=$(scripts/fuzz_compiler.sh) || { echo "no clang with libFuzzer here"; return 1; }
  cmake -S . -B build/fuzz -GNinja -DCACHEDATTN_PYTHON=OFF -DCACHEDATTN_FUZZ=ON \
    -DCMAKE_CXX_COMPILER="$compiler" >/dev/null && cmake --build build/fuzz || return 1
  export -f fuzz_target
  printf '%s\n' build/fuzz/tests/fuzz/fuzz_* | xargs -P "$(nproc)" -I{} \
    bash -c 'fuzz_target "$@"' - {} "${FUZZ_SECONDS:-60}"
}

# fuzz_target PROGRAM SECONDS: one line on success, else the log, and how to repeat it.
fuzz_target() {
  local name=${1##*/fuzz_}
  local log=build/fuzz/$name.log found=build/fuzz/corpus/$name
  local inputs=tests/fuzz/corpus/${name%_trusting}
  mkdir -p "$found"
  if "$1" "$found" "$inputs" -max_total_time="$2" -timeout=5 -malloc_limit_mb=8 -rss_limit_mb=1024 \
    -print_final_stats=1 -artifact_prefix=build/fuzz/ >"$log" 2>&1; then
    awk -v name="$name" '/number_of_executed_units/ { runs = $2 } /DONE/ { cov = $4 }
      END { printf "%-22s executions=%d coverage=%d\n", name, runs, cov; exit runs == 0 }' "$log"
  else
    tail -n 60 "$log"
    echo "$name failed; to repeat it: $1 $(sed -n 's/.*Test unit written to //p' "$log")"
    return 1
  fi
}

# TSan of older compilers needs a fixed address space layout.
fixed_layout() { setarch "$(uname -m)" -R true 2>/dev/null && echo setarch "$(uname -m)" -R; }

run=
for group in "$@"; do
  case $group in
    native) step "native tests" native_tests native ;;
    python)
      step "tidy test, binary audit" python -m pytest -q tests/test_tidy.py tests/test_binaries.py
      step "python tests" python -m pytest -q \
        --ignore tests/test_tidy.py --ignore tests/test_binaries.py tests
      ;;
    sanitize)
      export UBSAN_OPTIONS=print_stacktrace=1
      step "native tests, ASan + UBSan" \
        native_tests asan -DCACHEDATTN_SANITIZE=address,undefined
      run=$(fixed_layout)
      step "native tests, TSan" native_tests tsan -DCACHEDATTN_SANITIZE=thread
      run=
      ;;
    fuzz) step "fuzz targets" fuzz_tests ;;
    *) echo "unknown group: $group" >&2; exit 2 ;;
  esac
done

printf '\n'
printf '%s\n' "${summary[@]}"
exit $failed
