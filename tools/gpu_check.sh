#!/usr/bin/env bash
# Everything about CUDA that needs a GPU: builds for this GPU, runs the kernels' tests marked gpu,
# the benchmark of prompts, compute-sanitizer on smaller tests, the benchmark of decoding, whole
# bundles through ONNX Runtime, and TensorRT-RTX where it is installed.
#
#     bash tools/gpu_check.sh [FOLDER]                 results go to FOLDER (default: build/gpu)
#     STAGES="tests prompts" bash tools/gpu_check.sh   these alone; wheels and install always run
#
# A stage is stopped at its limit, below. They add up to 1,560 seconds, of which 240 are TensorRT's
# two: on a machine that is lent for less, run some stages at a time. What was built is kept in
# build/gpu-check, so that only the first call waits for it.
#
# Needs nvcc 13, cmake, ninja, a C++ compiler, and a python3 with pip, pytest, a torch that knows the
# GPU, and what pyproject.toml builds with and depends on: scikit-build-core, nanobind,
# nanobind-backend, nlohmann-json; numpy, onnx, onnx-ir, tokenizers, safetensors, jinja2, pydantic
# (with pydantic-core and annotated-types), click, rich. Besides:
#
#     tests                     transformers
#     memcheck, racecheck       compute-sanitizer on the PATH
#     end_to_end, speed         transformers; onnxruntime-gpu and its libraries of CUDA (those of the
#                               packages nvidia-* are found), and what the engine is built with:
#                               ONNXRUNTIME_ROOT, or run `tools/fetch_debian.py libonnxruntime-dev`
#     tensorrt_probe, tensorrt  transformers, onnxruntime, tensorrt-rtx, cuda-bindings, and for the
#                               plugin what tools/fetch_tensorrt_headers.py gets, made beforehand
#
# Nothing is downloaded; wheels in .whl/ are installed first. MLA_CUDA_TARGETS (such as 90) overrides
# the device's own capability.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${1:-build/gpu}
mkdir -p "$out"
started=$SECONDS
failures=0

declare -A limits=([wheels]=60 [install]=240 [tests]=150 [prompts]=60 [memcheck]=120
    [racecheck]=120 [benchmark]=150 [end_to_end]=180 [speed]=240 [tensorrt_probe]=60 [tensorrt]=180)
chosen="tests prompts memcheck racecheck benchmark end_to_end speed tensorrt_probe tensorrt"
for name in ${STAGES:-}; do
    [[ " $chosen " == *" $name "* ]] && continue
    echo "STAGES names $name; allowed: some of $chosen, with spaces between" >&2
    exit 2
done
chosen="wheels install ${STAGES:-$chosen}"

wanted() {  # wanted NAME...: whether one of these stages is to run
    local name
    for name in "$@"; do [[ " $chosen " == *" $name "* ]] && return; done
    return 1
}

stage() {  # stage NAME COMMAND...: runs it if wanted, keeps its output, says how it went
    local name=$1
    shift
    wanted "$name" || return 0
    local begun=$SECONDS
    timeout "${limits[$name]}" "$@" >"$out/$name.log" 2>&1
    local status=$?
    [ $status -eq 0 ] || failures=$((failures + 1))
    echo "== $name: exit $status after $((SECONDS - begun)) s (at $((SECONDS - started)) s)"
    tail -n "${LINES_SHOWN:-15}" "$out/$name.log"
}

nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader
capability=${MLA_CUDA_TARGETS:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader |
    head -1 | tr -d .)}

venv=${TMPDIR:-/tmp}/mla-gpu-venv
# Some systems have ensurepip, which would bring pip, as a package of its own.
python3 -m venv --system-site-packages --without-pip "$venv" || exit 1
# A venv made from a venv sees the system's packages, not the first one's.
python3 -c 'import site; print("\n".join(site.getsitepackages()))' \
    >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
# -P, here and below: the package that is installed, not the checkout, which has no libraries.
pip=("$venv/bin/python" -P -m pip)
if ls .whl/*.whl >/dev/null 2>&1; then
    LINES_SHOWN=2 stage wheels "${pip[@]}" install -q --no-index --no-deps .whl/*.whl
fi
choices=(-C build-dir=build/gpu-check  # the developer's own keeps its choices
    -C cmake.define.MLA_CUDA=ON -C "cmake.define.MLA_CUDA_TARGETS=$capability"
    -C cmake.define.MLA_ENGINE=AUTO -C cmake.define.MLA_FETCH_DEPENDENCIES=OFF)
if [ -e build/tensorrt-headers/include/NvInferRuntime.h ]; then
    export TENSORRT_ROOT=$PWD/build/tensorrt-headers
    choices+=(-C cmake.define.MLA_TENSORRT=ON)
fi
LINES_SHOWN=4 stage install env CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" \
    "${pip[@]}" install -q --no-index --no-deps --no-build-isolation . "${choices[@]}"
pytest=("$venv/bin/python" -P -m pytest -q -p no:cacheprovider)
kernels=(tests/runtime/test_cuda_attention.py tests/runtime/test_cuda_expanded.py)

LINES_SHOWN=30 stage tests "${pytest[@]}" --durations=10 -m gpu "${kernels[@]}" \
    tests/runtime/test_torch_cuda.py
LINES_SHOWN=40 stage prompts "$venv/bin/python" benchmarks/cuda_prompts.py \
    --json "$out/cuda_prompts.json"
if command -v compute-sanitizer >/dev/null; then
    small="gpu and (page_edges or unequal or splits or arena"
    small+=" or cuda_expanded and (shapes or edges or rounds))"
    for tool in memcheck racecheck; do
        # Without torch's cache of memory each tensor is an allocation, whose end memcheck knows.
        LINES_SHOWN=6 stage "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
            "${pytest[@]}" "${kernels[@]}" -k "$small"
    done
elif wanted memcheck racecheck; then
    echo "== compute-sanitizer is not on the PATH: memory and races are unchecked"
    failures=$((failures + 1))
fi
LINES_SHOWN=40 stage benchmark "$venv/bin/python" benchmarks/cuda_attention.py --quick \
    --json "$out/cuda_attention.json"

# Where torch and onnxruntime-gpu have CUDA's libraries from; the loader does not look there.
LD_LIBRARY_PATH="$("$venv/bin/python" -c 'import glob, sys
print(":".join(path for folder in sys.path if folder
               for path in glob.glob(folder + "/nvidia/*/lib")))'):${LD_LIBRARY_PATH:-}"
export LD_LIBRARY_PATH
if wanted end_to_end speed; then
    if "$venv/bin/python" -P -c 'import sys, onnxruntime
from mla_deploy.runtime import _runtime
sys.exit("CUDAExecutionProvider" not in onnxruntime.get_available_providers()
         or not hasattr(_runtime, "Engine"))'; then
        stage end_to_end "${pytest[@]}" -s -m gpu tests/runtime/test_cuda_end_to_end.py
        run="$venv/bin/python -P -c 'from mla_deploy.cli import main; main()'"
        LINES_SHOWN=30 stage speed bash -ec "
            rm -rf '$out/model' '$out/small' '$out/bundle'
            '$venv/bin/python' benchmarks/make_synthetic.py '$out/model' --layers 4
            $run quantize '$out/model' -o '$out/small' --kv int4 --kv-first int4 --weights int4
            $run export '$out/small' -o '$out/bundle' --to onnx --target cuda
            $run bench '$out/bundle' --depth 0,8192,32768 --kernels native"
    else
        echo "== no onnxruntime-gpu, or built without the engine: bundles are unchecked"
        failures=$((failures + 1))
    fi
fi
if wanted tensorrt_probe tensorrt; then
    if "$venv/bin/python" -c 'import tensorrt_rtx' 2>/dev/null; then
        stage tensorrt_probe "$venv/bin/python" -P tools/tensorrt_probe.py
        stage tensorrt "${pytest[@]}" -s -m gpu tests/runtime/test_tensorrt.py \
            tests/exporters/test_tensorrt_plugin.py
    else
        echo "== no tensorrt-rtx: engines are unchecked"
    fi
fi
echo "== $failures stages failed, $((SECONDS - started)) s"
exit $((failures > 0))
