"""`export_onnx`: from a checkpoint to a bundle."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from mla_deploy import __version__
from mla_deploy.bundle import MANIFEST, describe_file, write_manifest
from mla_deploy.cache import CachePart
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.config import MlaConfig
from mla_deploy.errors import UsageError
from mla_deploy.exporters.onnx.graph import build_graph
from mla_deploy.exporters.onnx.ort import OnnxRuntime
from mla_deploy.exporters.onnx.ort_cuda import OnnxRuntimeCuda
from mla_deploy.exporters.onnx.weights import write_external_data
from mla_deploy.manifest import (
    FORMAT_VERSION,
    PAGE_TOKENS,
    CacheInfo,
    CachePartInfo,
    CudaInfo,
    GraphInfo,
    LayerCache,
    Manifest,
)
from mla_deploy.model import cache_parts, check_weights, model_info
from mla_deploy.output import check_output, check_space, writing
from mla_deploy.progress import Progress
from mla_deploy.recipe import CALIBRATION_FILE, WEIGHT_BITS_FILE
from mla_deploy.tokenizer import Tokenizer
from mla_deploy.tokenizer_files import BUNDLE_FILES, checked_tokenizer, write_to_bundle
from mla_deploy.workspace import workspace

GRAPH_FILE = "model.onnx"
TARGETS: dict[str, type[OnnxRuntime]] = {"cpu": OnnxRuntime, "cuda": OnnxRuntimeCuda}
"""What ONNX Runtime may run the graph on."""
COMPANIONS = (*BUNDLE_FILES, CALIBRATION_FILE, WEIGHT_BITS_FILE)
"""Files of a bundle that no graph needs."""


@dataclass(frozen=True)
class ExportReport:
    """What an export made."""

    bundle: Path
    bytes: int
    seconds: float
    nodes: int
    kv_bytes_per_token: int


def export_onnx(
    source: Path,
    out: Path,
    *,
    target: str = "cpu",
    force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write the bundle of a checkpoint for ONNX Runtime.

    Args:
        target: what it is to run on, "cpu" or "cuda".

    Raises:
        UsageError: there is no such target.
        ConfigError, CheckpointError, TokenizerError: the source is not whole or not supported.
        OutputError: `out` exists, or cannot be written.
    """
    start = time.monotonic()
    if target not in TARGETS:
        raise UsageError(
            "ONNX Runtime has no such target",
            found=target,
            allowed=", ".join(TARGETS),
            hint="GPUs such as sm89 are named with `--to tensorrt`",
        )
    spelling = TARGETS[target]()
    checkpoint = Checkpoint(source)
    check_weights(checkpoint)
    config = checkpoint.config
    tokenizer = checked_tokenizer(source)
    output = check_output(source, out, lambda old: (old / MANIFEST).is_file(), force=force)
    graph = build_graph(config, spelling)
    initializers = list(graph.builder.initializers.values())
    check_space(out.parent, sum(one.nbytes for one in initializers))
    with workspace(output) as folder:
        data = folder / f"{GRAPH_FILE}.data"
        weights = write_external_data(initializers, data, checkpoint.read, progress)
        for name, tensor in weights.items():
            graph.builder.initializer_value(name).const_value = tensor
        with writing(folder):
            _save(graph.model, folder / GRAPH_FILE)
            names = [GRAPH_FILE, data.name, *write_companions(tokenizer, source, folder)]
            manifest = Manifest(
                version=FORMAT_VERSION,
                producer=f"mla-deploy {__version__}",
                model=model_info(config, tokenizer.eos_token_ids),
                graph=GraphInfo(
                    path=GRAPH_FILE,
                    backend="onnx",
                    lowering=spelling.name,
                    opset=spelling.opset,
                ),
                cuda=CudaInfo(dtype="float16") if target == "cuda" else None,
                cache=cache_info(config),
                recipe=config.recipe.to_json(),
                files=[describe_file(folder, name) for name in names],
            )
            write_manifest(folder, manifest)
    return ExportReport(
        bundle=out,
        bytes=sum(file.stat().st_size for file in out.iterdir()),
        seconds=time.monotonic() - start,
        nodes=len(graph.builder.nodes),
        kv_bytes_per_token=sum(
            part.bytes_per_token for parts in cache_parts(config) for part in parts
        ),
    )


def write_companions(tokenizer: Tokenizer, source: Path, folder: Path) -> list[str]:
    """Write the tokenizer of a checkpoint, and what a calibration of it measured; gives the names
    of the files."""
    names = write_to_bundle(tokenizer, source, folder)
    for name in (CALIBRATION_FILE, WEIGHT_BITS_FILE):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
            names.append(name)
    return names


def cache_info(
    config: MlaConfig,
    page_shape: Callable[[CachePart], Sequence[int]] = lambda part: part.page_shape,
) -> CacheInfo:
    """The manifest's part on the cache; `page_shape` is how a graph sees a page of a part."""
    formats = config.recipe.cache_formats(config.num_hidden_layers)
    layers = [
        LayerCache(
            format=name,
            parts=[
                CachePartInfo(
                    name=part.name,
                    dtype=str(part.dtype).removeprefix("torch."),
                    page_shape=list(page_shape(part)),
                )
                for part in parts
            ],
        )
        for name, parts in zip(formats, cache_parts(config), strict=True)
    ]
    return CacheInfo(page_tokens=PAGE_TOKENS, layers=layers)


def _save(model: ir.Model, path: Path) -> None:
    """Write the graph and have onnx check the file."""
    onnx.save(ir.to_proto(model), path)
    onnx.checker.check_model(path)
