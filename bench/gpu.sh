#!/usr/bin/env bash
# Everything that only a GPU can show, in under nine minutes: build, tests, timings. Needs no
# network, but nvcc, and a python3 that has what pyproject.toml asks for to build and to test.
# Results go to $OUT (default: bench/results).
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${OUT:-bench/results}")
mkdir -p "$out"
failed=()

# part LIMIT_S NAME COMMAND: a part that fails or takes too long does not keep the next from being
# tried, but the script fails in the end.
part() {
  printf '\n=== [%4d s] %s\n' "$SECONDS" "$2"
  timeout "$1" bash -c "$3" 2>&1 | tee "$out/$2.log" | tail -n 40
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$2")
}

# Elsewhere than in the source tree, so that the installed package is what is tested.
tests=$(mktemp -d)
trap 'rm -rf "$tests"' EXIT
cp tests/*.py "$tests"

part 150 build 'FASTMAML_CUDA=1 python3 -m pip install --no-build-isolation --no-deps --quiet .'
part 20 info 'cd / && python3 -m fastmaml info'
part 120 tests "cd '$tests' && python3 -m pytest -q -p no:cacheprovider test_gpu.py \
  test_triton_rules.py test_device_drawing.py test_gradient_step.py test_mlp_kernel.py test_graphs.py"

bench='python3 -m bench run --device cuda'
part 60 bench-small "$bench --cases sine,sine5 --rounds 4 --budget 0.3 \
  --against door3,door2,door1,eager,vmap-norm,compile-graphs --output '$out/cuda-small.jsonl'"
part 60 bench-omniglot "$bench --cases omni51 --rounds 3 --budget 0.5 \
  --against door3,door2,door1,eager,vmap-norm --output '$out/cuda-omniglot.jsonl'"
part 30 bench-tf32 "$bench --cases omni51 --tf32 --rounds 3 --budget 0.5 \
  --against door3,vmap-norm --output '$out/cuda-omniglot-tf32.jsonl'"
part 40 bench-mini "$bench --cases mini51 --rounds 2 --budget 0.5 \
  --against door3,eager --output '$out/cuda-mini.jsonl'"
if command -v compute-sanitizer >/dev/null; then
  part 40 sanitizer "cd '$tests' && compute-sanitizer --error-exitcode 9 \
    python3 -m pytest -q -p no:cacheprovider -m gpu test_gradient_step.py test_device_drawing.py"
fi

printf '\n=== [%4d s] failed: %s\n' "$SECONDS" "${failed[*]:-nothing}"
[ "${#failed[@]}" -eq 0 ]
