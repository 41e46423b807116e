#!/usr/bin/env bash
# prepare.sh MODEL GRAPH: quantise a checkpoint and write the graph for a Jetson's TensorRT.
set -euo pipefail
[ $# -eq 2 ] || { echo "usage: prepare.sh MODEL GRAPH" >&2; exit 2; }
model=$1 graph=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mla-deploy quantize "$model" -o "$work/small" --kv int4 --weights int4
mla-deploy export "$work/small" -o "$graph" --to tensorrt --onnx-only --compat trt10.3 --max-tokens 4096
mla-deploy inspect "$graph" --verify
