#!/usr/bin/env bash
# All that is to be measured on a GPU, in about half an hour on one card:
#
#   bash benchmarks/gpu.sh                 # needs a CUDA device; PYTHON=... for another interpreter than python
#   bash benchmarks/gpu.sh --dry-run       # the same steps on a CPU, at toy sizes; kernels in Triton's interpreter
#
# The kernels' tests, the attention alone (from how many tokens on a kernel pays: the thresholds of ops/dispatch.py),
# the models against their LayerNorm baselines, a training step, a language model. Each step writes its table and plot
# below benchmarks/results/gpu (or --output DIR), with device, versions and command; its output is in a .log beside them.
# A step that fails does not stop the others; what was measured is not measured again by comparisons of models.
set -uo pipefail

python=${PYTHON:-python}
device=cuda dry=
output=
while [ $# -gt 0 ]; do
    case $1 in
        --dry-run) dry=1 device=cpu ;;
        --output) [ $# -gt 1 ] || { echo "gpu.sh: --output needs a folder" >&2; exit 2; }; output=$2; shift ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit ;;
        *) echo "gpu.sh: no option $1; bash benchmarks/gpu.sh --help shows all" >&2; exit 2 ;;
    esac
    shift
done
output=$(mkdir -p "${output:-$(dirname "$0")/results/gpu}" && cd "${output:-$(dirname "$0")/results/gpu}" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2

if [ -z "$dry" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: torch finds no CUDA device here; --dry-run tries the steps without one" >&2
    exit 2
fi

passed=() failed=()
step() { # name, then what to run
    local name=$1 begun=$SECONDS
    shift
    printf '%s ... ' "$name"
    if "$@" > "$output/$name.log" 2>&1; then
        passed+=("$name") && printf 'done in %d s\n' $((SECONDS - begun))
    else
        failed+=("$name") && printf 'FAILED after %d s; see %s\n' $((SECONDS - begun)) "$output/$name.log"
    fi
}
# what a step takes: "real sizes | toy sizes"
sizes() { if [ -n "$dry" ]; then echo "${1#*|}"; else echo "${1%|*}"; fi; }

export SLABFORMER_KERNELS=1
kernels=(tests/ops/test_triton_kernels.py tests/ops/test_triton_operator.py)
if [ -n "$dry" ]; then
    step kernels env TRITON_INTERPRET=1 "$python" -m pytest -q -m 'not slow and not gpu' -k 'strides or packed or nan' "${kernels[@]}"
else
    step kernels "$python" -m pytest -q "${kernels[@]}"
fi
for dtype in $(sizes 'bfloat16 float16 float32|float32'); do
    for backward in '' --backward; do
        # shellcheck disable=SC2046,SC2086 # words on purpose
        step "attention_$dtype${backward/--/_}" "$python" benchmarks/attention.py --device "$device" --dtype "$dtype" \
            $(sizes '--batch-size 16 --seconds 5|--lengths 49 --seconds 0') $backward --output "$output/attention"
    done
done
for dtype in $(sizes 'bfloat16 float32|float32'); do
    # shellcheck disable=SC2046
    step "models_$dtype" "$python" benchmarks/compare.py --device "$device" --dtype "$dtype" --output "$output/models_$dtype" \
        $(sizes '--batch-sizes 1 128 --seconds 10|--models slab_deit_tiny --sizes 32 --batch-sizes 1 --seconds 0')
done
# shellcheck disable=SC2046
step training_step "$python" benchmarks/training_step.py --device "$device" --output "$output/training_step.json" \
    $(sizes '--batch-size 128 --seconds 30|--model vit_of_width_64 --batch-size 2 --seconds 0 --modes eager')
# shellcheck disable=SC2046
step language "$python" -m slabformer lm bench --output "$output/language" --device "$device" \
    $(sizes 'recipes/llama_350m_prepbn.yaml --bf16 --seconds 20|recipes/llama_micro_prepbn.yaml --prompt-tokens 4 --seconds 0 --no-compile --batch-sizes 1')

echo
echo "${#passed[@]} steps done, ${#failed[@]} failed${failed[*]:+: ${failed[*]}}; results in $output"
[ ${#failed[@]} -eq 0 ]
