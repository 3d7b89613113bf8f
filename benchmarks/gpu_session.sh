#!/usr/bin/env bash
# One session on a GPU, inside 8 minutes: build for this GPU, CUDA tests, compute-sanitizer, the table of targets.
#
#   benchmarks/gpu_session.sh OUT       writes OUT/build.log, tests.log, sanitizer-*.log, gpu.json, table.md,
#                                       stream.json, stream.md, summary.txt
#
# PYTHON names an interpreter that has torch with CUDA, pybind11, scikit-build-core, cmake, ninja, pytest and hypothesis.
# A part that fails is noted in summary.txt and the rest still runs; the exit status is 1 then.
set -uo pipefail
OUT=${1:?usage: benchmarks/gpu_session.sh OUT}
PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")/.."
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
: >"$OUT/summary.txt"
failures=0
started=$SECONDS

note() { echo "[$((SECONDS - started)) s] $*" | tee -a "$OUT/summary.txt"; }
part() { # NAME SECONDS LOG COMMAND...
  local name=$1 limit=$2 log=$3
  shift 3
  if timeout "$limit" "$@" >"$log" 2>&1; then
    note "$name: ok"
  else
    note "$name: FAILED with status $? (see $(basename "$log"))"
    failures=$((failures + 1))
    return 1
  fi
}

capability=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
  note "no usable GPU: torch sees none"
  exit 1
}
note "$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'), sm_$capability"

CUDAARCHS=$capability part build 120 "$OUT/build.log" "$PYTHON" -m pip install --no-build-isolation --no-deps \
  --config-settings=cmake.define.SAGE_EXT_CUDA=ON . || exit 1
# Tests must meet the installed package and its compiled module, not the source tree beside them.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r tests pyproject.toml benchmarks "$work/"
cd "$work" || exit 1
export SAGE_TEST_SIMT=0 SAGE_EXT_STRICT=1
"$PYTHON" -c 'from sage_ext import _C; assert hasattr(_C, "cuda"), "built without CUDA"' || { note "built without CUDA"; exit 1; }

part "CUDA tests" 120 "$OUT/tests.log" "$PYTHON" -m pytest -q -p no:cacheprovider tests/ops tests/stream/test_cuda_session.py -k cuda
tail -n 1 "$OUT/tests.log" | tee -a "$OUT/summary.txt"
grep -Eq '[1-9][0-9]* passed' "$OUT/tests.log" || { note "no CUDA test ran"; failures=$((failures + 1)); }

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
if [ -z "$sanitizer" ]; then
  note "compute-sanitizer: not found"
  failures=$((failures + 1))
else
  for tool in memcheck racecheck initcheck synccheck; do
    log="$OUT/sanitizer-$tool.log"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 45 "$log" "$sanitizer" --tool "$tool" --error-exitcode 9 \
      --kernel-regex kns=sage --target-processes all "$PYTHON" benchmarks/gpu_kernels.py
    # It really ran: the tool printed its summary, and the script counted its launches.
    if ! grep -Eq '(ERROR SUMMARY|RACECHECK SUMMARY): 0' "$log" || ! grep -q 'all kernels ran' "$log"; then
      note "$tool: no clean summary in $(basename "$log")"
      failures=$((failures + 1))
    fi
  done
fi

part benchmarks 150 "$OUT/table.md" "$PYTHON" benchmarks/gpu.py --json "$OUT/gpu.json"
tail -n 1 "$OUT/table.md" | tee -a "$OUT/summary.txt"
part "streaming benchmark" 90 "$OUT/stream.md" "$PYTHON" benchmarks/stream.py --device cuda --rounds 20 --json "$OUT/stream.json"
note "done, $failures parts failed"
[ "$failures" -eq 0 ]
