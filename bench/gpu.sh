#!/usr/bin/env bash
# Everything that only a GPU can show, in under nine minutes: build, tests, timings. Needs no
# network, but nvcc, and a python3 that has what pyproject.toml asks for to build and to test.
# Results go to $OUT (default: bench/results). With OMNIGLOT=DIR, the folder that holds omniglot-py,
# the rest of the time goes to the 60,000 meta-updates of the MAML paper.
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

tests=$(mktemp -d)
trap 'rm -rf "$tests"' EXIT
cp tests/*.py "$tests"

# In place: the benchmarks run from the source tree, which needs the native core beside it.
part 150 build 'FASTMAML_CUDA=1 python3 -m pip install --no-build-isolation --no-deps --quiet -e .'
part 20 info 'cd / && python3 -m fastmaml info'
part 120 tests "cd '$tests' && python3 -m pytest -q -p no:cacheprovider test_doors_on_gpu.py test_gpu.py \
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
  for tool in memcheck racecheck; do
    part 25 "sanitizer-$tool" "cd '$tests' && compute-sanitizer --tool $tool --error-exitcode 9 \
      python3 -m pytest -q -x -p no:cacheprovider -m gpu test_gradient_step.py test_mlp_kernel.py \
      test_device_drawing.py -k 'sine or each or bytes'"
  done
else
  echo "NOT CHECKED: there is no compute-sanitizer"
fi

if [ -n "${OMNIGLOT:-}" ]; then
  part $((530 - SECONDS)) training "python3 -m fastmaml train omniglot --data '$OMNIGLOT' --device cuda \
    --iterations 60000 --validate-every 0 --checkpoint '$tests/omniglot.pt'"
else
  echo "NOT CHECKED: training on Omniglot, whose folder OMNIGLOT=DIR would name"
fi

printf '\n=== [%4d s] failed: %s\n' "$SECONDS" "${failed[*]:-nothing}"
[ "${#failed[@]}" -eq 0 ]
