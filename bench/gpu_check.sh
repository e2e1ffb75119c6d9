#!/usr/bin/env bash
# Checks a wheel on a machine with an NVIDIA GPU, without a network, in under nine minutes: tests,
# compute-sanitizer, benchmarks. A failed step does not stop the others. The limits of the steps
# leave half a minute of the nine for the rest. A benchmark that is out of time has printed
# what it had by then; the limits of tests and sanitizers only bound what a hang costs.
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

bench() {  # bench NAME SECONDS SCRIPT ARGUMENTS...: its rows are RESULTS/NAME.jsonl, too
  local name=$1
  step "$name" "$2" "$python" "$root/bench/$3" --device cuda --json "${@:4}"
  grep '^{' "$results/$name.log" >"$results/$name.jsonl"
}

sanitize() {  # sanitize TOOL: over this package's kernels only
  step "$1" 35 compute-sanitizer --tool "$1" --kernel-name kns=cachedattn --error-exitcode 9 \
    "$python" "$root/bench/gpu_smoke.py"
}

step install 15 "$python" -m pip install --disable-pip-version-check --no-index --no-deps \
  --target "$work/site" "$wheel"
step machine 15 "$python" - <<'PY'
import subprocess, cachedattn, torch
print(cachedattn.__version__, cachedattn.__file__)
print("torch", torch.__version__, "CUDA", torch.version.cuda, torch.cuda.get_device_name())
print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
for op in ("rope_apply_", "kv_append", "attn_paged", "merge_states"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cachedattn::{op}", "CUDA"), op
PY
step smoke 20 "$python" "$root/bench/gpu_smoke.py"
step tests 90 "$python" -m pytest -q -p no:cacheprovider -m gpu "$root"/tests/test_ops_*.py
step engine 65 "$python" -m pytest -q -p no:cacheprovider "$root"/tests/test_engine_cuda.py
for name in memcheck racecheck synccheck; do
  sanitize $name
done
bench bench 65 bench_attention.py
bench overlap 70 bench_overlap.py --shape llama-8b --batch 8
# Few and quick users: the longest chat takes some seven seconds, in each of the modes. The pool
# holds those that run, and not all that was said.
bench multiturn 65 bench_multiturn.py --shape llama-8b --modes recompute,wait,store --seed 3 \
  --conversations 12 --rate 6 --turns 4 --think 0.5 --user 400 --answer 32 --slots 8 \
  --pool 2GiB --dram 2GiB --ssd 4GiB

printf '\n'
cat "$results/summary.txt"
exit $failed
