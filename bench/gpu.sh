#!/usr/bin/env bash
# What only a GPU can show: build, tests, timings, the most telling first. Needs no network, but
# nvcc, and a python3 that has what pyproject.toml asks for to build and to test.
# Stops before nine minutes are over. What there was no time for can be named the next time: with
# arguments, parts of these names alone are run, in the tree that `build` has left.
# Results go to $OUT (default: bench/results): timings as JSONL, all that was printed to gpu.log; in
# few files, for who lends a machine may give back few.
# With OMNIGLOT=DIR, the folder that holds omniglot-py, up to five of the minutes go to the 60,000
# meta-updates of the MAML paper.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:/usr/local/cuda/bin" PYTHONPATH="$PWD" PYTHONUNBUFFERED=1
out=$(realpath -m "${OUT:-bench/results}")
mkdir -p "$out"
: >"$out/gpu.log"
deadline=525
wanted=("$@")
failed=()

say() {
  printf '\n=== [%4d s] %s\n' "$SECONDS" "$1" | tee -a "$out/gpu.log"
}

# part LIMIT_S NAME COMMAND: a part that fails or takes too long does not keep the next from being
# tried, but the script fails in the end. Time is up with an interrupt, at which pytest still tells
# what has failed by then, and training stops as it should.
part() {
  local limit=$((deadline - SECONDS))
  [ "${#wanted[@]}" -eq 0 ] || [[ " ${wanted[*]} " == *" $2 "* ]] || return
  say "$2"
  [ "$limit" -le "$1" ] || limit=$1
  if [ "$limit" -lt 5 ]; then
    echo "no time is left" | tee -a "$out/gpu.log"
    failed+=("$2")
    return
  fi
  timeout --signal=INT --kill-after=10 "$limit" bash -c "$3" 2>&1 | tee -a "$out/gpu.log" | tail -n 40
  [ "${PIPESTATUS[0]}" -eq 0 ] || failed+=("$2")
  [ ! -e "$timings" ] || cat "$timings" >>"$out/cuda.jsonl"
  rm -f "$timings"
}

tests=$(mktemp -d)
timings=$tests/timings.jsonl
trap 'rm -rf "$tests"' EXIT
cp tests/*.py "$tests"
pytest="cd '$tests' && python3 -m pytest -q --tb=short -p no:cacheprovider"
workers=$(python3 -c 'import os, xdist; print("-n", min(12, os.cpu_count()))' 2>/dev/null)
bench='python3 -m bench run --device cuda'

# In place: the benchmarks run from the source tree, which needs the native core beside it.
part 200 build 'export FASTMAML_CUDA=1
  python3 -m pip install --no-build-isolation --no-deps --quiet -e . ||
  python3 setup.py --quiet build_ext --inplace'
part 60 info "python3 -c 'import torch, triton; print(torch.__version__, triton.__version__,
  torch.cuda.get_device_name())' && cd / && python3 -m fastmaml info"
part 60 tests-kernels "$pytest test_gradient_step.py test_mlp_kernel.py test_device_drawing.py \
  test_episodes.py::test_a_gpu_draws_the_same_batches"
# Triton compiles some 50 kernels for each network, one after the other, and keeps them on disk:
# side by side beforehand, and every gradient is checked before anything is timed.
part 120 compile "printf '%s\n' 'omni51 --against door3' 'omni51 --against door2,door1' \
  'omni51 --against door3-tf32x3' 'omni51 --tf32 --against door3' 'mini51 --against door3' \
  'mini51 --against door3-tf32x3' 'sine --against door2,door1' |
  xargs -P 7 -I% sh -c '$bench --rounds 1 --budget 0 --output $tests/\$\$.jsonl --cases %'"
if [ -n "${OMNIGLOT:-}" ]; then
  part 300 training "python3 -m fastmaml train omniglot --data '$OMNIGLOT' --device cuda \
    --iterations 60000 --anneal 60000 --validate-every 0 --checkpoint '$tests/omniglot.pt'"
  [[ " ${failed[*]:-} " != *" training "* ]] ||
    part 40 evaluation "python3 -m fastmaml evaluate '$tests/omniglot.pt' --data '$OMNIGLOT'"
else
  say "NOT CHECKED: training on Omniglot, whose folder OMNIGLOT=DIR would name"
fi
part 120 bench-omniglot "$bench --cases omni51 --rounds 3 --budget 0.5 \
  --against door3,door2,door1,eager,vmap-norm --output '$timings'"
part 120 bench-small "$bench --cases sine,sine5 --rounds 4 --budget 0.3 \
  --against door3,door2,door1,eager,vmap-norm --output '$timings'"
part 90 bench-variants "$bench --cases sine,omni51 --rounds 3 --budget 0.3 \
  --against door3,door3-in-graph,door3-tf32x3 --output '$timings'"
part 60 bench-mini "$bench --cases mini51 --rounds 2 --budget 0.5 \
  --against door3,door3-tf32x3,eager --output '$timings'"
part 40 launches "python3 -m bench launches --device cuda --cases omni51,mini51 \
  --output '$out/cuda-launches.jsonl'"
part 60 bench-tf32 "$bench --cases omni51 --tf32 --rounds 3 --budget 0.5 \
  --against door3,vmap-norm --output '$timings'"
part 120 tests-doors "$pytest $workers test_graphs.py test_sampler_in_graph.py \
  test_doors_on_gpu.py test_algorithms_on_gpu.py test_training_on_gpu.py test_draws.py \
  test_losses.py test_attention.py test_detach.py test_embedding.py test_take.py test_of_input.py \
  test_spellings.py"
part 120 tests-rules "$pytest $workers test_triton_rules.py test_kernel_order.py \
  test_captured_operations.py"
if command -v compute-sanitizer >/dev/null; then
  # Tensors in allocations of their own, beyond whose ends something is noticed; no graphs, which
  # allocate while they are captured.
  for tool in memcheck racecheck; do
    part 90 "sanitizer-$tool" "export PYTORCH_NO_CUDA_MEMORY_CACHING=1
      cd '$tests' && compute-sanitizer --tool $tool --kernel-name kns=fastmaml \
      --report-api-errors no --error-exitcode 9 \
      python3 -m pytest -q -x -p no:cacheprovider -m gpu test_gradient_step.py test_mlp_kernel.py \
      test_device_drawing.py -k '(sine or each or bytes) and not graph'"
  done
else
  say "NOT CHECKED: there is no compute-sanitizer"
fi
part 150 tests-networks "$pytest $workers test_gpu.py"
part 90 bench-compiled "$bench --cases sine --rounds 3 --budget 0.3 \
  --against door3,compile-graphs,jax --output '$timings'"

part 60 bench-encoder "$bench --cases encoder --rounds 2 --budget 0.5 \
  --against door3,door2,eager,vmap-norm --output '$timings'"

say "failed: ${failed[*]:-nothing}"
[ "${#failed[@]}" -eq 0 ]
