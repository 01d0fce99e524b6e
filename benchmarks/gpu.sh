#!/usr/bin/env bash
# The training benchmark on one GPU (H100 or H200; ten minutes), also where no package can be downloaded.
#
#   benchmarks/gpu.sh wheels        on a machine with a package index: download what the GPU's machine lacks
#   benchmarks/gpu.sh [PART...]     on the GPU's machine: peers, kernels and quantized, or some of them
#
# The GPU's machine needs PyTorch with CUDA, transformers and peft. Everything else comes from build/gpu/wheels, if it
# exists there: copy the checkout with build/gpu. Each part ends within four minutes and writes its figures to
# $OUT/PART.json. A part that fails does not stop the others; the exit code is then 1.
#
#   PYTHON          the interpreter                                                   python3
#   TARGET_PYTHON   for `wheels`: Python version of the GPU's machine (Linux, x86-64)  3.12
#   ROWS            JSON Lines of instruction, context and response; `wheels` copies it     the packaged sample
#   SHAPE           shape of the model, see benchmarks/train_subject.py                llama-3-8b
#   OUT             folder of the results                                              build/gpu/results
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=build/gpu
mkdir -p "$folder"

if [ "${1:-}" = wheels ]; then
    locked=$(grep -E '^(omegaconf|datasets|dill|multiprocess|xxhash|bitsandbytes|setproctitle)==' constraints.txt)
    platforms=()
    for glibc in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
    # shellcheck disable=SC2086
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
        --python-version "${TARGET_PYTHON:-3.12}" "${platforms[@]}" --platform manylinux2014_x86_64 \
        --dest "$folder/wheels" $locked trl==1.16.0 liger-kernel==0.8.5
    [ -z "${ROWS:-}" ] || cp "$ROWS" "$folder/rows.jsonl"
    du -sh "$folder"
    exit
fi

if ls "$folder"/wheels/*.whl >/dev/null 2>&1; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$folder/site" "$folder"/wheels/*.whl
    export PYTHONPATH=$PWD/$folder/site${PYTHONPATH:+:$PYTHONPATH}
fi
rows=${ROWS:-}
[ -n "$rows" ] || [ ! -e "$folder/rows.jsonl" ] || rows=$folder/rows.jsonl
status=0
for part in "${@:-}"; do
    "$python" -m benchmarks.train --device cuda --json --out "${OUT:-$folder/results}" ${part:+--part "$part"} \
        ${rows:+--rows "$rows"} ${SHAPE:+--shape "$SHAPE"} || status=1
done
exit $status
