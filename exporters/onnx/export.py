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
from mla_deploy.bundle import MANIFEST, Bundle, describe_file, write_manifest
from mla_deploy.cache import CachePart
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.config import MlaConfig
from mla_deploy.errors import TokenizerError, UsageError
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
    ModelInfo,
)
from mla_deploy.model import cache_parts, check_weights, count_parameters
from mla_deploy.output import check_output, check_space, writing
from mla_deploy.progress import Progress
from mla_deploy.recipe import CALIBRATION_FILE, WEIGHT_BITS_FILE
from mla_deploy.workspace import workspace

GRAPH_FILE = "model.onnx"
TARGETS: dict[str, type[OnnxRuntime]] = {"cpu": OnnxRuntime, "cuda": OnnxRuntimeCuda}
"""What ONNX Runtime may run the graph on."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


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
    require_tokenizer(source)
    output = check_output(source, out, lambda old: (old / MANIFEST).is_file(), force=force)
    graph = build_graph(config, checkpoint, spelling)
    initializers = list(graph.builder.initializers.values())
    check_space(out.parent, sum(one.nbytes for one in initializers))
    with workspace(output) as folder:
        data = folder / f"{GRAPH_FILE}.data"
        weights = write_external_data(initializers, data, checkpoint.read, progress)
        for name, tensor in weights.items():
            graph.builder.initializer_value(name).const_value = tensor
        with writing(folder):
            _save(graph.model, folder / GRAPH_FILE)
            names = [GRAPH_FILE, data.name, *copy_tokenizer(source, folder)]
            manifest = Manifest(
                version=FORMAT_VERSION,
                producer=f"mla-deploy {__version__}",
                model=model_info(config),
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


def require_tokenizer(source: Path) -> None:
    """Raise TokenizerError unless the folder has a tokenizer.json."""
    if not (source / "tokenizer.json").is_file():
        raise TokenizerError(
            f"{source} has no tokenizer.json",
            allowed="a tokenizer in Hugging Face's fast format",
            hint="save it with `AutoTokenizer.from_pretrained(...).save_pretrained(...)`",
        )


def copy_tokenizer(source: Path | Bundle, folder: Path) -> list[str]:
    """Copy tokenizer, chat template, generation config, and what a calibration measured; gives the
    names that were there. Of a bundle, only what its manifest lists."""
    copied = []
    for name in (*TOKENIZER_FILES, CALIBRATION_FILE, WEIGHT_BITS_FILE):
        if isinstance(source, Bundle):
            file = source.file(name) if source.has(name) else None
        else:
            file = source / name
        if file is not None and file.is_file():
            shutil.copyfile(file, folder / name)
            copied.append(name)
    return copied


def model_info(config: MlaConfig) -> ModelInfo:
    """The manifest's part on the model."""
    same = {name: getattr(config, name) for name in ModelInfo.model_fields if hasattr(config, name)}
    same["eos_token_ids"] = list(config.eos_token_ids)
    return ModelInfo(parameters=count_parameters(config), **same)


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
