"""tools/fetch_tensorrt_headers.py: the headers alone, of the file that is expected, or nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "fetch_tensorrt_headers.py"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script, with pip looking for packages in `tmp_path / "packages"` only."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "packages").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "packages"))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--folder", str(tmp_path / "headers")])
    return module


def make_wheel(tool: ModuleType, folder: Path) -> str:
    """A wheel of the name that is looked for; gives its digest."""
    name, _, version = tool.WHEEL.partition("==")
    stem = f"{name.replace('-', '_')}-{version}"
    file = folder / f"{stem}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: absent\n"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(f"{tool.HEADERS}/NvInferRuntime.h", "// new")
        wheel.writestr(f"{tool.HEADERS}/tool.py", "")
        wheel.writestr("kernel_lens/other.h", "")
        wheel.writestr(f"{stem}.dist-info/METADATA", metadata)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_only_headers_are_taken_and_old_ones_go(
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    include = tmp_path / "headers" / "include"
    include.mkdir(parents=True)
    (include / "NvOld.h").touch()
    monkeypatch.setattr(tool, "SHA256", make_wheel(tool, tmp_path / "packages"))
    assert tool.main() == 0
    assert capsys.readouterr().out == f"{tmp_path / 'headers'}\n"
    assert [file.name for file in include.iterdir()] == ["NvInferRuntime.h"]
    assert (include / "NvInferRuntime.h").read_text() == "// new"


def test_another_file_of_that_name_is_refused(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_wheel(tool, tmp_path / "packages")
    assert tool.main() == 1
    assert "DO NOT MATCH THE HASHES" in capsys.readouterr().err
    assert not (tmp_path / "headers").exists()


def test_it_says_why_they_cannot_be_had(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main() == 1
    error = capsys.readouterr().err
    assert "cannot fetch TensorRT's headers" in error
    assert "No matching distribution" in error
    assert not (tmp_path / "headers").exists()
