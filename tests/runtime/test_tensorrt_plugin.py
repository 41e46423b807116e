"""The TensorRT plugin, with emulated kernels and no TensorRT: its own calls, and the library."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from cpp.builds import build
from support.plugin import built_plugin, built_program, headers

from mla_deploy.errors import UsageError
from mla_deploy.runtime import tensorrt_plugin
from mla_deploy.runtime.tensorrt_device import load_plugin

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("fields", ["cache_format is none of int4", "kv_lora_rank is 320", "mode is missing",
                    "is of another type"]),
        ("shapes", ["input q has shape"]),
        ("run", ["workspace is null"]),
    ],
)  # fmt: skip
def test_what_a_builder_and_a_context_ask_of_it(part: str, said: list[str]) -> None:
    program = built_program(HERE / f"test_tensorrt_plugin_{part}.cpp")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "ok\n"
    for text in said:
        assert text in done.stderr


def test_the_library_exports_two_calls() -> None:
    library = ctypes.CDLL(str(built_plugin()))
    count = ctypes.c_int32()
    library.getCreators.restype = ctypes.c_void_p
    assert library.getCreators(ctypes.byref(count))
    assert count.value == 2
    assert library.setLoggerFinder


def test_tensorrt_finds_it() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    load_plugin(trt, built_plugin())
    load_plugin(trt, built_plugin())
    creator = trt.get_plugin_registry().get_creator("LatentAttention", "1", "ai.mla_deploy")
    names = {field.name for field in creator.field_names}
    assert {"cache_format", "kv_lora_rank", "softmax_scale"} <= names


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc 13")
def test_tensorrt_finds_what_cmake_builds() -> None:
    """With the kernels of nvcc; in a process of its own, as TensorRT keeps what it has loaded."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    choices = ["-DMLA_CUDA=ON", "-DMLA_CUDA_TARGETS=89", "-DMLA_ENGINE=OFF", "-DMLA_OPS=OFF"]
    choices += ["-DMLA_TENSORRT=ON", f"-DTENSORRT_ROOT={headers()[0]}", "-DCMAKE_CXX_FLAGS=-Werror"]
    folder = build("tests-tensorrt-plugin", choices, ("mla_deploy_tensorrt",))
    script = (
        "import pathlib, sys, tensorrt_rtx\n"
        "from mla_deploy.runtime.tensorrt_device import load_plugin\n"
        "load_plugin(tensorrt_rtx, pathlib.Path(sys.argv[1]))\n"
    )
    library = folder / "csrc" / "tensorrt" / tensorrt_plugin.LIBRARY
    subprocess.run([sys.executable, "-c", script, library], check=True)


def test_a_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    class Registry:
        def load_library(self, path: str) -> None:
            assert path == str(tmp_path / "broken.so")

        def get_creator(self, *_: str) -> None:
            return None

    trt = SimpleNamespace(get_plugin_registry=Registry)
    with pytest.raises(UsageError, match="cannot load the plugin") as caught:
        load_plugin(trt, tmp_path / "broken.so")
    assert "libmla_deploy_cuda.so lies beside it" in str(caught.value)


def test_an_installation_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tensorrt_plugin._runtime, "__file__", str(tmp_path / "_runtime.so"))
    assert tensorrt_plugin.plugin_library() is None
    with pytest.raises(UsageError, match="this installation has none") as caught:
        tensorrt_plugin.require_plugin_library()
    assert "MLA_TENSORRT=ON" in str(caught.value)
    (tmp_path / tensorrt_plugin.LIBRARY).touch()
    assert tensorrt_plugin.require_plugin_library() == tmp_path / tensorrt_plugin.LIBRARY
