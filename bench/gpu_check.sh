#!/usr/bin/env bash
# Checks a wheel on a machine with an NVIDIA GPU, without a network, in under nine minutes: tests,
# compute-sanitizer, benchmark. A failed step does not stop the others.
#   bench/gpu_check.sh WHEEL [RESULTS]     results go to bench/results/gpu unless named
# PYTHON (default python3) has torch with CUDA, numpy, pytest and hypothesis. Each step's output is
# RESULTS/STEP.log; exit status 1 when a step failed.
set -uo pipefail
[ $# -ge 1 ] || { echo "usage: bench/gpu_check.sh WHEEL [RESULTS]" >&2; exit 2; }
root=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath -e -- "$1") || exit 2
results=${2:-$root/bench/results/gpu}
python=${PYTHON:-python3}

"$python" - <<'PY' || exit 2
import sys
try:
    import torch
except ImportError:
    sys.exit(f"{sys.executable} has no torch (PYTHON=... names another)")
if not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU here: nothing was checked")
PY

mkdir -p "$results" && results=$(cd "$results" && pwd) || exit 2
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
cd "$work" || exit 2  # not the checkout: its cachedattn/ would hide the wheel's
export PYTHONPATH=$work/site:$root/tests PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
: >"$results/summary.txt"
failed=0

step() {  # step NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS result=ok status
  shift 2
  printf '\n=== %s (at most %d s)\n' "$name" "$limit"
  timeout -k 10 "$limit" "$@" 2>&1 | tee "$results/$name.log" | tail -n 25
  status=${PIPESTATUS[0]}
  if [ "$status" -ne 0 ]; then
    failed=1
    result="FAILED ($status)"
    [ "$status" -ne 124 ] || result="OUT OF TIME"
  fi
  printf '%-12s %-14s %4d s\n' "$name" "$result" $((SECONDS - start)) >>"$results/summary.txt"
}

sanitize() {  # sanitize TOOL: over this package's kernels only
  step "$1" 50 compute-sanitizer --tool "$1" --kernel-name kns=cachedattn --error-exitcode 9 \
    "$python" "$root/bench/gpu_smoke.py"
}

step install 30 "$python" -m pip install --disable-pip-version-check --no-index --no-deps \
  --target "$work/site" "$wheel"
step machine 20 "$python" - <<'PY'
import subprocess, cachedattn, torch
print(cachedattn.__version__, cachedattn.__file__)
print("torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.get_device_name())
print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
for op in ("rope_apply_", "kv_append", "attn_paged", "merge_states"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cachedattn::{op}", "CUDA"), op
PY
step smoke 30 "$python" "$root/bench/gpu_smoke.py"
step tests 130 "$python" -m pytest -q -p no:cacheprovider -m gpu "$root"/tests/test_ops_*.py
step engine 90 "$python" -m pytest -q -p no:cacheprovider "$root"/tests/test_engine_cuda.py
for name in memcheck racecheck synccheck; do
  sanitize $name
done
step bench 85 "$python" "$root/bench/bench_attention.py" --device cuda --json
grep '^{' "$results/bench.log" >"$results/bench.jsonl"

printf '\n'
cat "$results/summary.txt"
exit $failed
