#!/usr/bin/env bash
# Runs groups of tests (native, python, sanitize), all of them even after a failure, and prints
# a summary. Exit status 1 when a step failed.
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
    *) echo "unknown group: $group" >&2; exit 2 ;;
  esac
done

printf '\n'
printf '%s\n' "${summary[@]}"
exit $failed
