"""The steps for a Jetson, as far as they go without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from mla_deploy.bundle import Bundle
from mla_deploy.exporters.tensorrt.capability import CAPABILITIES

ROOT = Path(__file__).resolve().parents[2]
STEPS = ROOT / "examples" / "jetson"


def bash(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(STEPS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
    )


@pytest.fixture(scope="module")
def graph(tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("jetson") / "graph"
    done = bash("prepare.sh", tiny_mla, out)
    assert done.returncode == 0, done.stderr
    return out


def test_the_graph_is_for_the_boards_parser(graph: Path) -> None:
    bundle = Bundle.open(graph, verify=True)
    assert bundle.manifest.graph.lowering == "trt10.3"
    model = onnx.load(bundle.file("model.onnx"), load_external_data=False)
    assert {node.op_type for node in model.graph.node} <= CAPABILITIES["trt10.3"].operators
    assert [one.version for one in model.opset_import] == [21]
    onnx.checker.check_model(bundle.file("model.onnx"))


def test_building_stops_where_there_is_no_board(graph: Path, tmp_path: Path) -> None:
    done = bash("build.sh", graph, tmp_path / "bundle", "sm87")
    assert done.returncode == 2
    assert "tensorrt" in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert bash("build.sh", graph).returncode == 2


def test_trtexec_gets_every_shape(graph: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(STEPS / "trtexec.py"), str(graph)],
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split()
    assert words[0] == "trtexec"
    assert {"--stronglyTyped", "--noTF32", "--skipInference", "--maxAuxStreams=0"} <= set(words)
    model = onnx.load(graph / "model.onnx", load_external_data=False)
    shapes = [word for word in words if "Shapes=" in word]
    assert len(shapes) == 6
    for word in shapes:
        named = dict(one.split(":") for one in word.partition("=")[2].split(","))
        assert named.keys() == {one.name for one in model.graph.input}
        assert named["input_ids"] in ("1x1", "1x256")
