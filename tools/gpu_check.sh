#!/usr/bin/env bash
# Everything about CUDA that needs a GPU, in less than ten minutes: builds for this GPU, runs the
# kernels' tests marked gpu, compute-sanitizer on the smaller ones, whole bundles through ONNX
# Runtime, the benchmarks, and TensorRT-RTX where it is installed.
#
#     bash tools/gpu_check.sh [FOLDER]        results go to FOLDER (default: build/gpu)
#
# Bundles need onnxruntime-gpu and its libraries of CUDA (those in the packages nvidia-* are found),
# and what the engine is built with: run `tools/fetch_debian.py libonnxruntime-dev` beforehand where
# there is a network, or set ONNXRUNTIME_ROOT; and have the package nlohmann-json.
#
# Needs nvcc 13, cmake, ninja, a C++ compiler, and a python3 with torch for CUDA, numpy, pytest and
# the packages of pyproject.toml. Nothing is downloaded; wheels in .whl/ are installed first: where
# there is only torch, put pydantic, pydantic-core, annotated-types, nanobind and nanobind-backend
# there. MLA_CUDA_TARGETS (such as 90) overrides the device's own capability.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
mkdir -p "$out"
started=$SECONDS
failures=0

stage() {  # stage NAME SECONDS COMMAND...: runs it, keeps its output, says how it went
    local name=$1 limit=$2
    shift 2
    local begun=$SECONDS
    timeout "$limit" "$@" >"$out/$name.log" 2>&1
    local status=$?
    [ $status -eq 0 ] || failures=$((failures + 1))
    echo "== $name: exit $status after $((SECONDS - begun)) s (at $((SECONDS - started)) s)"
    tail -n "${LINES_SHOWN:-15}" "$out/$name.log"
}

nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader
capability=${MLA_CUDA_TARGETS:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader |
    head -1 | tr -d .)}

venv=/tmp/mla-gpu-venv
python3 -m venv --system-site-packages "$venv" || exit 1
# A venv made from a venv sees the system's packages, not the first one's.
python3 -c 'import site; print("\n".join(site.getsitepackages()))' \
    >"$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
if ls .whl/*.whl >/dev/null 2>&1; then
    LINES_SHOWN=2 stage wheels 60 "$venv/bin/pip" install -q --no-index --no-deps .whl/*.whl
fi
LINES_SHOWN=4 stage install 240 env CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" \
    "$venv/bin/pip" install -q --no-index --no-deps --no-build-isolation . \
    -C cmake.define.MLA_CUDA=ON -C "cmake.define.MLA_CUDA_TARGETS=$capability" \
    -C cmake.define.MLA_ENGINE=AUTO -C cmake.define.MLA_FETCH_DEPENDENCIES=OFF
# -P: the package that was installed, not the checkout, which has no libraries.
pytest=("$venv/bin/python" -P -m pytest -q -p no:cacheprovider)
kernels=("${pytest[@]}" tests/runtime/test_cuda_attention.py tests/runtime/test_cuda_expanded.py
    tests/runtime/test_torch_cuda.py)

stage tests 150 "${kernels[@]}" -m gpu
if command -v compute-sanitizer >/dev/null; then
    small="gpu and (page_edges or unequal or splits or arena)"
    for tool in memcheck racecheck; do
        LINES_SHOWN=6 stage "$tool" 120 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            --target-processes all "${kernels[@]}" -k "$small"
    done
else
    echo "== compute-sanitizer is not on the PATH: memory and races are unchecked"
    failures=$((failures + 1))
fi
LINES_SHOWN=40 stage benchmark 150 "$venv/bin/python" benchmarks/cuda_attention.py --quick \
    --json "$out/cuda_attention.json"
LINES_SHOWN=40 stage prompts 60 "$venv/bin/python" benchmarks/cuda_prompts.py \
    --json "$out/cuda_prompts.json"

# Where torch and onnxruntime-gpu have CUDA's libraries from; the loader does not look there.
LD_LIBRARY_PATH="$("$venv/bin/python" -c 'import glob, site
print(":".join(path for folder in site.getsitepackages() for path in
               glob.glob(folder + "/nvidia/*/lib")))' 2>/dev/null):${LD_LIBRARY_PATH:-}"
export LD_LIBRARY_PATH
if "$venv/bin/python" -c 'import sys, onnxruntime
from mla_deploy.runtime import _runtime
sys.exit("CUDAExecutionProvider" not in onnxruntime.get_available_providers()
         or not hasattr(_runtime, "Engine"))'; then
    stage end_to_end 180 "${pytest[@]}" -s -m gpu tests/runtime/test_cuda_end_to_end.py
    run="$venv/bin/python -P -c 'from mla_deploy.cli import main; main()'"
    LINES_SHOWN=30 stage speed 240 bash -ec "
        rm -rf '$out/model' '$out/small' '$out/bundle'
        '$venv/bin/python' benchmarks/make_synthetic.py '$out/model' --layers 4
        $run quantize '$out/model' -o '$out/small' --kv int4 --kv-first int4 --weights int4
        $run export '$out/small' -o '$out/bundle' --to onnx --target cuda
        $run bench '$out/bundle' --depth 0,8192,32768 --kernels native"
else
    echo "== no onnxruntime-gpu, or built without the engine: bundles are unchecked"
    failures=$((failures + 1))
fi
if "$venv/bin/python" -c 'import tensorrt_rtx' 2>/dev/null; then
    stage tensorrt_probe 60 "$venv/bin/python" -P tools/tensorrt_probe.py
    stage tensorrt 180 "${pytest[@]}" -s -m gpu tests/runtime/test_tensorrt.py \
        tests/exporters/test_tensorrt_plugin.py
else
    echo "== no tensorrt-rtx: engines are unchecked"
fi
echo "== $failures stages failed, $((SECONDS - started)) s"
exit $((failures > 0))
