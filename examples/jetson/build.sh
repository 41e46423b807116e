#!/usr/bin/env bash
# build.sh GRAPH BUNDLE TARGET: build the engine of a graph on this board; sm87 is Orin, sm110 Thor.
set -euo pipefail
[ $# -eq 3 ] || { echo "usage: build.sh GRAPH BUNDLE sm87|sm110" >&2; exit 2; }
mla-deploy export "$1" -o "$2" --to tensorrt --compat trt10.3 --target "$3"
