#!/bin/sh
# Everything that needs a GPU: the tests, then the times, and with "tune" which tiles are fastest.
#   bench/gpu.sh [test] [bench] [tune]      default: test bench
# Results go to the folder $OUT (default: bench/results): gpu_kernels.json and gpu_tiles.json, and the logs gpu_tests.log,
# gpu_bench.log and gpu_tune.log. Without a GPU: exit 4. With failing tests: exit 1, after the times.
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-bench/results}
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1
"$PYTHON" -c 'import tilewright.kernels.jit' 2>/dev/null || export PYTHONPATH="$PWD/typings${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "no CUDA GPU here; what this runs needs one" >&2
    exit 4
}
mkdir -p "$OUT"

# An op a process, all at once: compiling takes most of the time, and a kernel that breaks the device breaks its own
# op's tests only.
tested() {
    logs=$OUT/gpu_tests
    mkdir -p "$logs"
    export logs PYTHON TORCHINDUCTOR_COMPILE_THREADS=4
    "$PYTHON" -c 'from tilewright.kernels.table import KERNELS; print(*KERNELS, sep="\n")' | xargs -P 8 -I OP sh -c \
        '"$PYTHON" -m pytest -q -p no:cacheprovider --tb=short tests/gpu -k OP --durations=3 >"$logs/OP" 2>&1'
    status=$?
    for log in "$logs"/*; do
        echo "== $(basename "$log")"
        cat "$log"
    done >"$OUT/gpu_tests.log"
    rm -r "$logs"
    grep -E '^== |^FAILED|^ERROR|^E  |[0-9]+ (passed|failed|skipped|error)' "$OUT/gpu_tests.log" | cut -c1-200
    return $status
}

# What compilers say goes to a log.
timed() {
    log=$OUT/gpu_$1.log
    shift
    "$PYTHON" bench/gpu_kernels.py --output "$OUT" "$@" 2>"$log" || {
        status=$?
        tail -n 20 "$log" >&2
        return $status
    }
}

failed=0
for part in ${*:-test bench}; do
    case $part in
    test) tested || failed=1 ;;
    bench) timed bench || failed=1 ;;
    tune) timed tune --tune --types bfloat16 || failed=1 ;;
    *)
        echo "bench/gpu.sh: '$part' is none of test, bench, tune" >&2
        exit 2
        ;;
    esac
done
exit $failed
