#!/usr/bin/env bash
# One session on a GPU, inside 8 minutes: build for this GPU, the table of targets, CUDA tests, compute-sanitizer.
#
#   benchmarks/gpu_session.sh OUT [--dry-run]     writes OUT/info.txt, build.log, table.md, gpu.json, stream.md, stream.json,
#                                                 tests.log, sanitizer-*.log, summary.txt
#
# PYTHON names an interpreter that has torch with CUDA, pybind11, scikit-build-core, cmake, ninja, pytest and hypothesis.
# All parts share one deadline, SECONDS_IN_ALL after the start; each result is on disk as soon as it is there. A part that fails
# or for which no time is left is named in summary.txt, the rest still runs, and the exit status is 1. With --dry-run every part
# runs on the CPU, with the package that is installed: a check of this script, not a measurement.
set -uo pipefail
OUT=${1:?usage: benchmarks/gpu_session.sh OUT [--dry-run]}
DRY=${2:-}
PYTHON=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3}" >&2 && exit 2; }
PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
SECONDS_IN_ALL=${SECONDS_IN_ALL:-470}
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
: >"$OUT/summary.txt"
failures=0
started=$SECONDS

note() { echo "[$((SECONDS - started)) s] $*" | tee -a "$OUT/summary.txt"; }
fail() {
  note "$@"
  failures=$((failures + 1))
}
part() { # NAME MOST_SECONDS LOG COMMAND...
  local name=$1 limit=$2 log=$3 left=$((SECONDS_IN_ALL - (SECONDS - started)))
  shift 3
  if [ "$left" -lt 2 ]; then
    fail "$name: not run, out of time"
    return 1
  fi
  [ "$limit" -gt "$left" ] && limit=$left
  if timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1; then
    note "$name: ok"
  else
    fail "$name: FAILED with status $? after at most $limit s (see $(basename "$log"))"
    return 1
  fi
}

if [ -n "$DRY" ]; then
  [ "$DRY" = --dry-run ] || { echo "unknown option $DRY" >&2 && exit 2; }
  gpu=(--dry-run) kernels=(--device cpu) stream=(--dry-run --steps 2 --rounds 1)
  select=(-k "one_hot and not simt") tests=(tests/ops/test_reliability_fusion.py)
  note "dry run: no GPU is used"
else
  gpu=() kernels=() stream=(--device cuda --rounds 20) select=(-k cuda) tests=(tests/ops tests/stream/test_cuda_session.py)
  capability=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
    note "no usable GPU: torch sees none"
    exit 1
  }
  note "$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'), sm_$capability"
  CUDAARCHS=$capability part build 240 "$OUT/build.log" "$PYTHON" -m pip install --no-build-isolation --no-deps \
    --config-settings=cmake.define.SAGE_EXT_CUDA=ON . || exit 1
fi

# Tests and benchmarks must meet the installed package and its compiled module, not the source tree beside them.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r tests pyproject.toml benchmarks "$work/"
cd "$work" || exit 1
export SAGE_TEST_SIMT=0 SAGE_EXT_STRICT=1
[ -n "$DRY" ] || "$PYTHON" -c 'from sage_ext import _C; assert hasattr(_C, "cuda")' || {
  note "built without CUDA"
  exit 1
}

part info 20 "$OUT/info.txt" "$PYTHON" -m sage_ext info
part benchmarks 170 "$OUT/table.md" "$PYTHON" benchmarks/gpu.py --json "$OUT/gpu.json" "${gpu[@]}"
part "streaming benchmark" 60 "$OUT/stream.md" "$PYTHON" benchmarks/stream.py --json "$OUT/stream.json" "${stream[@]}"

parallel=()
"$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n 4)
part "CUDA tests" 120 "$OUT/tests.log" "$PYTHON" -m pytest -q -p no:cacheprovider -m "not slow" "${parallel[@]}" "${select[@]}" "${tests[@]}"
if [ -f "$OUT/tests.log" ]; then
  tail -n 1 "$OUT/tests.log" | tee -a "$OUT/summary.txt"
  grep -Eq '[1-9][0-9]* passed' "$OUT/tests.log" || fail "no CUDA test ran"
fi

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
if [ -n "$DRY" ]; then # takes the tool's options and runs what follows them
  sanitizer=$work/compute-sanitizer
  printf '%s\n' '#!/usr/bin/env bash' 'while [ "${1#--}" != "$1" ]; do shift 2; done' '"$@" && echo "ERROR SUMMARY: 0 errors"' >"$sanitizer"
  chmod +x "$sanitizer"
fi
if [ -z "$sanitizer" ]; then
  fail "compute-sanitizer: not found"
else
  # initcheck watches all kernels: it must see who wrote what ours read.
  for tool in memcheck racecheck synccheck initcheck; do
    log="$OUT/sanitizer-$tool.log"
    only=(--kernel-regex kns=sage)
    [ "$tool" = initcheck ] && only=()
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 60 "$log" "$sanitizer" --tool "$tool" --error-exitcode 9 "${only[@]}" \
      --target-processes all "$PYTHON" benchmarks/gpu_kernels.py "${kernels[@]}" || continue
    # It really ran: the tool printed its summary, and the script counted its launches.
    if ! grep -Eq '(ERROR SUMMARY|RACECHECK SUMMARY): 0' "$log" || ! grep -q 'all kernels ran' "$log"; then
      fail "$tool: no clean summary in $(basename "$log")"
    fi
  done
fi

note "done, $failures failures"
cat "$OUT"/{table,stream}.md 2>/dev/null
cat "$OUT/summary.txt"
[ "$failures" -eq 0 ]
