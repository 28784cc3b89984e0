#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under ten minutes: builds in place, tests, sanitizes
# and measures. Needs python3 with torch, pytest and ninja, and nvcc; no network.
#
#   benchmarks/gpu.sh                 all parts
#   benchmarks/gpu.sh build kernels   some of: build test sanitize kernels steps frozen memory
#
# A part that fails is reported and the others still run; the exit status is the number of failed
# parts. The report, RESULTS/<device>.md (default: benchmarks/results), is put together from the
# latest run of each part. DEVICE=cpu tries the same parts without a GPU. DEADLINE: seconds in all.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

PARTS=(build test sanitize kernels steps frozen memory)
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
RESULTS=${RESULTS:-benchmarks/results}
DEADLINE=${DEADLINE:-570}
LOGS=build/gpu
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PATH=$PATH:/usr/local/cuda/bin
mkdir -p "$LOGS" "$RESULTS"

# limit SECONDS COMMAND...: within the part's own limit and what is left of the whole.
limit() {
  local left=$((DEADLINE - SECONDS)) seconds=$1
  shift
  if ((left < 5)); then
    echo "not run: no time left"
    return 124
  fi
  timeout --kill-after=5 $((seconds < left ? seconds : left)) "$@"
}

# A toolkit without the headers that torch includes is completed from the packages beside torch.
complete_toolkit() {
  local home packages toolkit
  [ -n "${CUDA_HOME:-}" ] && return
  home=$(dirname "$(dirname "$(readlink -f "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")")")
  [ -e "$home/include/cuda_runtime.h" ] || home=$(readlink -f /usr/local/cuda)
  [ -x "$home/bin/nvcc" ] && [ ! -e "$home/include/cusparse.h" ] || return 0
  packages=$("$PYTHON" -c 'import torch; print(torch.__path__[0])')/../nvidia
  toolkit=$PWD/$LOGS/toolkit
  rm -rf "$toolkit"
  mkdir -p "$toolkit/include"
  find "$home" -mindepth 1 -maxdepth 1 ! -name include -exec ln -s -t "$toolkit" {} +
  ln -s "$home"/include/* "$toolkit/include"
  # The toolkit's own headers come first: a name that is there already is left as it is.
  find "$packages"/*/include -mindepth 1 -maxdepth 1 -exec ln -s -t "$toolkit/include" {} + 2>&1 |
    grep -v 'File exists'
  export CUDA_HOME=$toolkit
  echo "$home lacks headers that torch needs: completed in $toolkit"
}

part_build() {
  if [ "$DEVICE" = cuda ]; then
    complete_toolkit
    export FORCE_CUDA=1
    export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
  fi
  limit 300 "$PYTHON" setup.py --quiet build_ext --inplace >"$LOGS/build.log" 2>&1
  local status=$?
  ((status == 0)) || tail -n 40 "$LOGS/build.log"
  "$PYTHON" -c 'import wus_ext; print(wus_ext.build_info())' || status=1
  return "$status"
}

# all NAME=COMMAND...: at the same time, each with a log; says how each ended.
all() {
  local status=0 run names=() pids=()
  for run in "$@"; do
    names+=("${run%%=*}")
    eval "limit ${run#*=}" >"$LOGS/${run%%=*}.log" 2>&1 &
    pids+=($!)
  done
  for run in "${!pids[@]}"; do
    wait "${pids[run]}" || status=1
    grep -E '^(FAILED|ERROR)' "$LOGS/${names[run]}.log"
    echo "${names[run]}: $(tail -n 1 "$LOGS/${names[run]}.log")"
  done
  return "$status"
}

# A file's fault may leave the GPU unusable for its process: each has its own.
part_test() {
  local file runs=() which=()
  [ "$DEVICE" = cuda ] && which=(-k "'not emulated'")
  for file in tests/cuda/test_*.py tests/training/test_graphs.py; do
    runs+=("$(basename "$file" .py)=240 $PYTHON -m pytest -q -p no:cacheprovider ${which[*]} $file")
  done
  all "${runs[@]}"
}

# Without torch's cache every tensor is an allocation of its own, whose ends are then checked.
part_sanitize() {
  if [ "$DEVICE" != cuda ]; then
    echo "needs a GPU"
    return 0
  fi
  local tests="$PYTHON -m pytest -q -x -p no:cacheprovider tests/cuda/test_elementwise.py"
  tests+=" tests/cuda/test_batch_norm.py tests/cuda/test_dropout.py -k"
  local races="mask_bias_grad or pool_is_stock or norm_and_relu"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 all \
    "memcheck=150 compute-sanitizer --tool memcheck --error-exitcode 9 $tests 'cuda- and not many_rows and not bfloat16'" \
    "racecheck=150 compute-sanitizer --tool racecheck --error-exitcode 9 $tests 'cuda- and float32 and ($races) and not True'"
}

part_kernels() {
  local options=(--dtypes bfloat16 float32 --batch-size 512 --rounds 15 --calls 10)
  [ "$DEVICE" = cuda ] || options=(--batch-size 2 --rounds 3 --calls 1)
  limit 90 "$PYTHON" benchmarks/kernels.py --device "$DEVICE" "${options[@]}"
}

part_steps() {
  if [ "$DEVICE" != cuda ]; then
    limit 60 "$PYTHON" benchmarks/gpu_steps.py --device cpu --dtype float32 --models vgg11 \
      --batch-sizes 2 --rounds 3 --calls 1
    return
  fi
  limit 250 "$PYTHON" benchmarks/gpu_steps.py --models resnet18 vgg16_bn vgg11_bn alexnet \
    --batch-sizes 512 --rounds 7
}

# Statistics that stand still in skip steps; stock as before.
part_frozen() {
  local options=(--models vgg16_bn resnet18 --no-compile)
  [ "$DEVICE" = cuda ] ||
    options=(--models vgg11 --batch-sizes 2 --rounds 3 --calls 1 --dtype float32)
  limit 60 "$PYTHON" benchmarks/gpu_steps.py --device "$DEVICE" --norm frozen "${options[@]}"
}

part_memory() {
  local options=(--batch-size 512 --amp bfloat16)
  [ "$DEVICE" = cuda ] || options=(--batch-size 2 --models vgg11)
  limit 60 "$PYTHON" benchmarks/memory.py --device "$DEVICE" "${options[@]}"
}

# The part's section of the report; a table stands as it is, anything else in a code block.
run_part() {
  local part=$1 start=$SECONDS status verdict=passed
  echo "== $part"
  # Warnings name the places of this machine, which are none of the report's business.
  "part_$part" >"$LOGS/$part.out" 2>"$LOGS/$part.err"
  status=$?
  ((status == 0)) || verdict="FAILED (status $status)"
  tail -n 60 "$LOGS/$part.out"
  tail -n 40 "$LOGS/$part.err" >&2
  echo "== $part: $verdict, $((SECONDS - start)) s"
  {
    printf '\n## %s: %s\n\n' "$part" "$verdict"
    if grep -q '^| ' "$LOGS/$part.out"; then
      cat "$LOGS/$part.out"
    else
      printf '```\n'
      tail -n 15 "$LOGS/$part.out"
      printf '```\n'
    fi
  } >"$LOGS/$part.md"
  return "$status"
}

device_name() {
  "$PYTHON" - "$DEVICE" <<'EOF'
import sys, torch, platform
cuda = sys.argv[1] == "cuda" and torch.cuda.is_available()
print(torch.cuda.get_device_name() if cuda else sys.argv[1] + " " + platform.machine())
EOF
}

wanted=("$@")
((${#wanted[@]})) || wanted=("${PARTS[@]}")
for part in "${wanted[@]}"; do
  if [[ " ${PARTS[*]} " != *" $part "* ]]; then
    echo "no such part: $part; there are: ${PARTS[*]}" >&2
    exit 64
  fi
done

failed=()
for part in "${wanted[@]}"; do
  run_part "$part" || failed+=("$part")
done

name=$(device_name) || name=$DEVICE
report=$RESULTS/$(echo "$name" | tr 'A-Z ' 'a-z-').md
{
  printf '# %s\n\nMade by `benchmarks/gpu.sh`.\n' "$name"
  for part in "${PARTS[@]}"; do
    [ -e "$LOGS/$part.md" ] && cat "$LOGS/$part.md"
  done
} >"$report"
echo "report: $report"
((${#failed[@]})) && echo "failed: ${failed[*]}"
exit "${#failed[@]}"
