"""Print the `trtexec` command that builds the engine of a graph; imports nothing of mla-deploy.

python3 trtexec.py GRAPH
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any


def command(bundle: Path) -> list[str]:
    """The command, with a profile for up to a chunk of tokens and one for one token."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    info = manifest["tensorrt"]
    if info["plugin"]:
        raise SystemExit("this graph needs the plugin: build its engine with `mla-deploy export`")
    found = ["trtexec", f"--onnx={bundle / manifest['graph']['path']}", "--stronglyTyped"]
    found += ["--noTF32", "--skipInference"]
    found += ["--maxAuxStreams=0", "--saveEngine=decoder.engine"]
    for index, profile in enumerate(info["profiles"]):
        found.append(f"--profile={index}")
        for which, option in enumerate(("minShapes", "optShapes", "maxShapes")):
            shapes = [shape(one, profile, which) for one in info["inputs"]]
            found.append(f"--{option}={','.join(shapes)}")
    return found


def shape(tensor: dict[str, Any], profile: dict[str, list[int]], which: int) -> str:
    """`name:1x64x256`."""
    sizes = [profile[size][which] if isinstance(size, str) else size for size in tensor["shape"]]
    return f"{tensor['name']}:{'x'.join(map(str, sizes))}"


if __name__ == "__main__":
    print(shlex.join(command(Path(sys.argv[1]))))
