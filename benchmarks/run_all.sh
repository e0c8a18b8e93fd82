#!/usr/bin/env bash
# Every benchmark, at sizes that fit the device, with its figures as JSON and one plot a file:
#
#     bash benchmarks/run_all.sh [FOLDER]        # default: benchmarks/results/<device>
#
# On a machine with an FP8 GPU (torch 2.11 or later, Triton 3.6 or later) these are the figures of the README's tables.
# Without one the same code runs on toys, and what comes out says nothing of GPUs.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
device=$("$PYTHON" -c "
import re, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'
print(re.sub('[^a-z0-9]+', '-', name.lower()))")
folder=${1:-results/$device}
mkdir -p "$folder"
on_gpu=$([ "$device" = cpu ] || echo yes)

run() { # name of the file, benchmark, options
    echo "== $1"
    "$PYTHON" "$2.py" "${@:3}" --json "$folder/$1.json"
}

if [ "$on_gpu" ]; then
    run cast cast
    run linear linear --width 4096 --tokens 8192
    run linear-compiled linear --width 4096 --tokens 8192 --compile
    run overhead overhead
    run memory memory
    run block block
    run optimizer optimizer
    run step step
    run train-150m train --size 150m --compile
    run train-150m-eager train --size 150m
    run train-1b train --size 1b --compile --arms mixed bf16 tensorwise tensorwise+fused delayed delayed+fused rowwise torchao te
    run train-8b train --size 8b --layers 0 --compile --batch-size 1 --length 4096 --arms mixed tensorwise tensorwise+fused torchao te
else
    run cast cast --repeats 3
    run linear linear --width 128 --layers 2 --tokens 64 --repeats 3
    run overhead overhead --repeats 3 --calls 5
    run memory memory --hidden-size 64 --length 64
    run block block --repeats 3 --arms bf16 tensorwise tensorwise+fused blockwise torchao te # compiling takes its time
    run optimizer optimizer --elements 100000 --repeats 3
    run step step --repeats 3
    run train-toy train --size toy --rounds 1
fi
for file in "$folder"/*.json; do
    "$PYTHON" plot.py "$file"
done
if [ -z "$on_gpu" ]; then
    echo
    echo "There is no GPU here: these are toys on a CPU with FP8 emulated. Rows of GPUs are unmeasured."
fi
