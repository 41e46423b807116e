"""What an installed mla-deploy offers: names, entry points, one version, the compiled module."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path

import pytest
import tomllib

import mla_deploy
from mla_deploy.cli.app import LEFT_OUT
from mla_deploy.runtime import _runtime

ROOT = Path(__file__).parents[2]

# Each feature and the words that Linux has for it in /proc/cpuinfo.
CPUINFO_WORDS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx_vnni": {"avx_vnni"},
    "avx512f": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_vnni": {"avx512_vnni"},
    "avx512_bf16": {"avx512_bf16"},
    "amx_int8": {"amx_tile", "amx_int8"},
    "amx_bf16": {"amx_tile", "amx_bf16"},
    "neon": {"asimd"},
    "dotprod": {"asimddp"},
    "i8mm": {"i8mm"},
}


@pytest.mark.parametrize("room", ["cli", "exporters", "quant", "runtime"])
def test_each_room_is_imported_under_its_name(room: str) -> None:
    module = importlib.import_module(f"mla_deploy.{room}")
    assert module.__doc__


def test_package_metadata_and_compiled_module_have_one_version() -> None:
    assert version("mla-deploy") == mla_deploy.__version__
    assert _runtime.version() == mla_deploy.__version__


def test_the_command_is_installed() -> None:
    scripts = entry_points(group="console_scripts", name="mla-deploy")
    assert [script.value for script in scripts] == ["mla_deploy.cli:main"]


def test_cache_records_are_found_by_name() -> None:
    records: dict[str, EntryPoint] = {
        point.name: point for point in entry_points(group="mla_deploy.cache_records")
    }
    assert set(records) >= {"int4", "int8", "fp16", "fp32"}
    for name, point in records.items():
        assert point.load().name == name


def test_cpu_features_agree_with_the_kernel() -> None:
    found = _runtime.cpu_features()
    assert found == [name for name in CPUINFO_WORDS if name in found]
    if sys.platform != "linux" or platform.machine() not in {"x86_64", "aarch64"}:
        pytest.skip("no /proc/cpuinfo to compare with")
    words = set(Path("/proc/cpuinfo").read_text().split())
    assert found == [name for name, needed in CPUINFO_WORDS.items() if needed <= words]


def test_the_runtime_is_imported_without_torch() -> None:
    code = (
        "import sys, mla_deploy.runtime, mla_deploy.runtime._runtime\n"
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def test_the_committed_stub_is_the_generated_one() -> None:
    generated = Path(_runtime.__file__).with_name("_runtime.pyi")
    committed = ROOT / "runtime" / "_runtime.pyi"
    assert committed.read_text() == generated.read_text(), f"copy {generated} to {committed}"


def test_a_build_without_headers_fails_and_says_so_unless_asked_for(tmp_path: Path) -> None:
    if shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no cmake, or no compiler")
    # A copy, so that headers fetched before are not found.
    shutil.copytree(ROOT / "runtime", tmp_path / "runtime")
    for name in (
        "mla_deploy/__init__.py",
        "benchmarks/cpu_attention.cpp",
        "tests/runtime/test_cpu_attention_compare.cpp",
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def configure(*choices: str) -> tuple[int, str]:
        command = ["cmake", "-S", str(tmp_path / "runtime"), "-B", str(tmp_path / "build")]
        command += [f"-DPython_EXECUTABLE={sys.executable}", "-DMLA_PYTHON=OFF"]
        command += ["-DMLA_FETCH_DEPENDENCIES=OFF", *choices]
        environment = {k: v for k, v in os.environ.items() if k != "ONNXRUNTIME_ROOT"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        output = result.stdout + result.stderr
        if "ONNX Runtime's headers: " in output:
            pytest.skip("this system has the headers")
        return result.returncode, " ".join(output.split())

    status, output = configure("-DMLA_ENGINE=ON")
    assert status != 0
    assert "The engine cannot be built" in output
    assert "onnxruntime_c_api.h. Set ONNXRUNTIME_ROOT" in output
    assert "MLA_ENGINE=OFF" in output
    status, output = configure("-DMLA_ENGINE=AUTO")
    assert (status, "libmla_deploy.so is left out" in output) == (0, True)
    status, output = configure("-DMLA_ENGINE=OFF")
    assert (status, "left out, because headers" in output) == (0, False)


def test_the_wheel_holds_the_rooms_and_no_sources(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    settings = [f"--config-settings=build-dir={tmp_path}/build", f"--wheel-dir={tmp_path}"]
    result = subprocess.run([*command, *settings, str(ROOT)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr

    (wheel,) = tmp_path.glob("*.whl")
    assert f"mla_deploy-{mla_deploy.__version__}-cp310-abi3-" in wheel.name
    files = set(zipfile.ZipFile(wheel).namelist())
    rooms = {"", "cli/", "exporters/", "quant/", "runtime/"}
    assert files >= {f"mla_deploy/{room}__init__.py" for room in rooms}
    assert files >= {"mla_deploy/py.typed", "mla_deploy/runtime/_runtime.pyi"}
    assert {name.split("/")[0] for name in files} == {
        "mla_deploy",
        f"mla_deploy-{mla_deploy.__version__}.dist-info",
    }
    with zipfile.ZipFile(wheel) as opened:
        assert b"class Engine" in opened.read("mla_deploy/runtime/_runtime.pyi"), (
            "it can run bundles"
        )
    suffixes = {Path(name).suffix for name in files if name.startswith("mla_deploy/")}
    assert suffixes <= {".py", ".pyi", ".typed", ".so"}, "C++ sources belong to the sdist only"


def test_what_runs_bundles_is_the_rest_of_what_is_depended_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "runtime" / "requirements.txt").read_text().splitlines()
    wanted = {line for line in lines if not line.startswith("#")}
    left_out = set(LEFT_OUT.values())
    held = {one for one in project["dependencies"] if re.split("[<>=]", one)[0] not in left_out}
    assert wanted == held | set(project["optional-dependencies"]["cpu"])
