"""`export_tensorrt`: from a checkpoint to a bundle of engines, or to the graph for a device."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from mla_deploy import __version__
from mla_deploy.bundle import MANIFEST, Bundle, describe_file, write_manifest
from mla_deploy.checkpoint import Checkpoint
from mla_deploy.config import MlaConfig
from mla_deploy.errors import BundleError, UsageError
from mla_deploy.exporters.onnx import export as onnx_export
from mla_deploy.exporters.onnx.export import (
    COMPANIONS,
    GRAPH_FILE,
    write_companions,
)
from mla_deploy.exporters.onnx.graph import build_graph
from mla_deploy.exporters.onnx.weights import write_external_data
from mla_deploy.exporters.tensorrt.build import (
    TIMEOUT,
    EngineReport,
    build_engine,
    check_backend,
    check_memory,
)
from mla_deploy.exporters.tensorrt.capability import (
    DEFAULT,
    Capability,
    capability,
    check_target,
)
from mla_deploy.exporters.tensorrt.context_model import context_model
from mla_deploy.exporters.tensorrt.plugin import TensorRtPlugin, check_plugin
from mla_deploy.exporters.tensorrt.target import TensorRt
from mla_deploy.manifest import (
    FORMAT_VERSION,
    PAGE_TOKENS,
    CacheInfo,
    EngineInfo,
    GraphInfo,
    Manifest,
    ProfileInfo,
    TensorInfo,
    TensorRtInfo,
)
from mla_deploy.model import cache_parts, check_weights, model_info
from mla_deploy.output import check_output, check_space, writing
from mla_deploy.progress import Progress
from mla_deploy.tokenizer_files import checked_tokenizer
from mla_deploy.workspace import workspace

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LOGITS = 64
"""Positions whose logits come of one step at most: those of a whole chunk would take more scratch
memory than the rest of the model."""


@dataclass(frozen=True)
class TensorRtOptions:
    """How to export; None stands for what the model says."""

    targets: Sequence[str] = ()
    """GPUs to build for, such as `sm89`."""
    compat: str = DEFAULT
    """The version of TensorRT, by its table's name."""
    dtype: str = "fp16"
    """Of activations: fp16, bf16 or fp32."""
    onnx_only: bool = False
    """Write the graph alone; engines are built from it where the GPU is."""
    max_tokens: int = 8192
    """Rows of the cache that a step can read. Scratch memory grows with it."""
    prefill_chunk: int = 256
    """New tokens of one step at most. Scratch memory grows with it."""
    timeout: float = TIMEOUT
    """Seconds for each engine."""
    plugin: bool = False
    """Keep latent attention as a node, which the plugin computes with the CUDA kernels."""
    plugin_library: Path | None = None
    """The plugin; engines of such a graph are built with it."""


@dataclass(frozen=True)
class TensorRtReport:
    """What an export made."""

    bundle: Path
    bytes: int
    seconds: float
    nodes: int
    kv_bytes_per_token: int
    engines: tuple[EngineReport, ...]


def export_tensorrt(
    source: Path,
    out: Path,
    options: TensorRtOptions,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> TensorRtReport:
    """Write the bundle of a checkpoint, or of a bundle that was exported with `onnx_only`.

    Raises:
        UsageError: options outside their range, a GPU or a TensorRT that cannot be had.
        BuildError: too little memory, or TensorRT fails.
        ConfigError, CheckpointError, TokenizerError, BundleError: the source is not whole.
        OutputError: `out` exists, or cannot be written.
    """
    start = time.monotonic()
    wanted = check_options(options)
    if not options.onnx_only:
        check_backend(wanted, options.targets)
        _check_library(options, options.plugin)
    if (source / MANIFEST).is_file():
        return _build_bundle(source, out, options, wanted, force, progress, start)
    checkpoint = Checkpoint(source)
    check_weights(checkpoint)
    config = checkpoint.config
    tokenizer = checked_tokenizer(source)
    output = check_output(source, out, lambda old: (old / MANIFEST).is_file(), force=force)
    if options.plugin:
        check_plugin(config)
    target = (TensorRtPlugin if options.plugin else TensorRt)(wanted, DTYPES[options.dtype])
    graph = build_graph(config, target)
    initializers = list(graph.builder.initializers.values())
    weights = sum(one.nbytes for one in initializers)
    _check_types({one.dtype for one in initializers}, options)
    _check_room(out, weights, options)
    inputs, outputs = (
        [_tensor(value) for value in values]
        for values in (graph.model.graph.inputs, graph.model.graph.outputs)
    )
    with workspace(output) as folder:
        data = folder / f"{GRAPH_FILE}.data"
        tensors = write_external_data(initializers, data, checkpoint.read, progress)
        for name, tensor in tensors.items():
            graph.builder.initializer_value(name).const_value = tensor
        with writing(folder):
            onnx.save(ir.to_proto(graph.model), folder / GRAPH_FILE)
            onnx.checker.check_model(folder / GRAPH_FILE)
            names = write_companions(tokenizer, source, folder)
        manifest = Manifest(
            version=FORMAT_VERSION,
            producer=f"mla-deploy {__version__}",
            model=model_info(config, tokenizer.eos_token_ids),
            graph=GraphInfo(
                path=GRAPH_FILE, backend="tensorrt", lowering=wanted.name, opset=wanted.opset
            ),
            cache=cache_info(config, pages=options.plugin),
            recipe=config.recipe.to_json(),
            files=[],
            tensorrt=TensorRtInfo(
                module=wanted.module,
                version=None,
                dtype=str(DTYPES[options.dtype]).removeprefix("torch."),
                profiles=profiles(config.max_position_embeddings, options),
                plugin=options.plugin,
                engines=[],
                inputs=inputs,
                outputs=outputs,
            ),
        )
        built: list[EngineReport] = []
        if options.onnx_only:
            names = [GRAPH_FILE, data.name, *names]
        else:
            manifest, built = _build_all(folder, folder, manifest, options, wanted, progress)
            (folder / GRAPH_FILE).unlink()
            data.unlink()
        _finish(folder, manifest, names)
    return TensorRtReport(
        bundle=out,
        bytes=sum(file.stat().st_size for file in out.iterdir()),
        seconds=time.monotonic() - start,
        nodes=len(graph.builder.nodes),
        kv_bytes_per_token=sum(
            part.bytes_per_token for parts in cache_parts(config) for part in parts
        ),
        engines=tuple(built),
    )


def check_options(options: TensorRtOptions) -> Capability:
    """The version that is wanted, if the options fit each other and it."""
    wanted = capability(options.compat)
    for name, value, allowed in (
        ("dtype", options.dtype, tuple(DTYPES)),
        ("max_tokens", options.max_tokens, range(PAGE_TOKENS, (1 << 24) + 1)),
        ("prefill_chunk", options.prefill_chunk, range(2, 4097)),
    ):
        if value not in allowed:
            raise UsageError(
                f"{name} is out of range",
                found=value,
                allowed=f"{allowed[0]} to {allowed[-1]}"
                if isinstance(allowed, range)
                else ", ".join(allowed),
            )
    if options.timeout <= 0:
        raise UsageError("timeout is out of range", found=options.timeout, allowed="above 0")
    if options.onnx_only and options.targets:
        raise UsageError(
            "the graph is the same for every GPU",
            found=f"--onnx-only with --target {options.targets[0]}",
            hint="leave one of them out",
        )
    if not options.onnx_only and not options.targets:
        raise UsageError(
            "an engine is built for a GPU, and none is named",
            allowed=", ".join(wanted.targets),
            hint="name it with --target, or write the graph alone with --onnx-only",
        )
    if len(set(options.targets)) < len(options.targets):
        raise UsageError(
            "a GPU is named twice", found=", ".join(options.targets), hint="name each once"
        )
    for target in options.targets:
        check_target(target, wanted)
    if options.dtype == "bf16" and "sm75" in options.targets:
        raise UsageError("sm75 has no bfloat16", found="--dtype bf16", allowed="fp16, fp32")
    if options.plugin and "sm75" in options.targets:
        raise UsageError(
            "the plugin has no kernels for this GPU",
            found="--target sm75",
            allowed="sm80 and later",
        )
    return wanted


def _check_library(options: TensorRtOptions, is_needed: bool) -> None:
    if is_needed and options.plugin_library is None:
        raise UsageError(
            "engines with the plugin are built with its library, and this installation has none",
            hint="write the graph alone with --onnx-only, or install from source with "
            "-DMLA_CUDA=ON -DMLA_TENSORRT=ON: docs/tensorrt.md",
        )


def profiles(context: int, options: TensorRtOptions) -> list[ProfileInfo]:
    """One for up to a chunk of tokens, and one for exactly one token."""
    most = -(-min(options.max_tokens, context) // PAGE_TOKENS) * PAGE_TOKENS
    rows = (PAGE_TOKENS, max(PAGE_TOKENS, most // 4 // PAGE_TOKENS * PAGE_TOKENS), most)
    chunk = min(options.prefill_chunk, most)
    several = min(LOGITS, chunk)
    return [
        ProfileInfo(tokens=(1, chunk, chunk), rows=rows, logits=(1, 1, several)),
        ProfileInfo(tokens=(1, 1, 1), rows=rows, logits=(1, 1, 1)),
    ]


def cache_info(config: MlaConfig, *, pages: bool = False) -> CacheInfo:
    """The manifest's part on the cache: the record's pages, or rows of its parts."""
    if pages:
        return onnx_export.cache_info(config)
    return onnx_export.cache_info(config, lambda part: (PAGE_TOKENS, part.width))


def _build_bundle(
    source: Path,
    out: Path,
    options: TensorRtOptions,
    wanted: Capability,
    force: bool,
    progress: Progress | None,
    start: float,
) -> TensorRtReport:
    """Engines from a graph that was exported with --onnx-only, perhaps on another machine."""
    bundle = Bundle.open(source, verify=True)
    made_for = bundle.manifest.graph.lowering
    if bundle.manifest.tensorrt is None or bundle.manifest.tensorrt.engines or options.onnx_only:
        raise BundleError(
            f"{source} is not the graph for TensorRT that engines are built from",
            allowed="a checkpoint, or a bundle exported with --to tensorrt --onnx-only",
        )
    if made_for != wanted.name:
        raise UsageError(
            "the graph was made for another TensorRT",
            found=f"--compat {wanted.name}",
            allowed=made_for,
            hint=f"use --compat {made_for}, or export the model again",
        )
    if options.plugin and not bundle.manifest.tensorrt.plugin:
        raise UsageError("the graph was made without the plugin", hint="leave --plugin out")
    _check_library(options, bundle.manifest.tensorrt.plugin)
    output = check_output(source, out, lambda old: (old / MANIFEST).is_file(), force=force)
    graph = bundle.file(GRAPH_FILE)
    model = onnx.load(graph, load_external_data=False).graph
    _check_types({ir.DataType(one.data_type) for one in model.initializer}, options)
    _check_room(out, bundle.file(f"{GRAPH_FILE}.data").stat().st_size, options)
    with workspace(output) as folder:
        with writing(folder):
            names = [name for name in COMPANIONS if bundle.has(name)]
            for name in names:
                shutil.copyfile(bundle.file(name), folder / name)
        manifest, built = _build_all(
            graph.parent, folder, bundle.manifest, options, wanted, progress
        )
        _finish(folder, manifest, names)
    return TensorRtReport(
        bundle=out,
        bytes=sum(file.stat().st_size for file in out.iterdir()),
        seconds=time.monotonic() - start,
        nodes=len(model.node),
        kv_bytes_per_token=bundle.kv_bytes_per_token,
        engines=tuple(built),
    )


def _check_types(stored: Set[ir.DataType], options: TensorRtOptions) -> None:
    if ir.DataType.INT4 in stored and "sm75" in options.targets:
        raise UsageError(
            "sm75 multiplies no matrices in 4 bits",
            found="a model with quantised weights, which are stored as INT4",
            hint="quantize with --weights none for it",
        )


def _check_room(out: Path, weights: int, options: TensorRtOptions) -> None:
    """Disk for the graph and the engines, and memory for a build."""
    check_space(out.parent, weights * (1 + len(options.targets)))
    if not options.onnx_only:
        check_memory(weights)


def _build_all(
    graph: Path,
    folder: Path,
    manifest: Manifest,
    options: TensorRtOptions,
    wanted: Capability,
    progress: Progress | None,
) -> tuple[Manifest, list[EngineReport]]:
    """Engines and their context models in `folder`, and the manifest that names them."""
    info = manifest.tensorrt
    assert info is not None
    built, engines = [], []
    for target in options.targets:
        entry = EngineInfo(target=target, path=f"{target}.engine", context=f"{target}.onnx")
        report = build_engine(
            graph / GRAPH_FILE,
            folder / entry.path,
            wanted,
            target,
            info.inputs,
            info.profiles,
            plugin=options.plugin_library if info.plugin else None,
            timeout=options.timeout,
            progress=progress,
        )
        model = context_model(
            entry.path, wanted.module, report.version, target, info.inputs, info.outputs
        )
        with writing(folder):
            onnx.save(model, folder / entry.context)
        built.append(report)
        engines.append(entry)
    update = {"version": built[0].version, "engines": engines}
    return manifest.model_copy(
        update={
            "graph": manifest.graph.model_copy(update={"path": engines[0].context}),
            "tensorrt": info.model_copy(update=update),
        }
    ), built


def _finish(folder: Path, manifest: Manifest, names: list[str]) -> None:
    """Write the manifest."""
    assert manifest.tensorrt is not None
    engines = [name for one in manifest.tensorrt.engines for name in (one.path, one.context)]
    with writing(folder):
        files = [describe_file(folder, name) for name in [*engines, *names]]
        write_manifest(folder, manifest.model_copy(update={"files": files}))


def _tensor(value: ir.Value) -> TensorInfo:
    assert value.shape is not None
    assert value.dtype is not None
    names = {"FLOAT": "float32"}
    shape = [size if isinstance(size, int) else str(size.value) for size in value.shape]
    kind = names.get(value.dtype.name, value.dtype.name.lower())
    return TensorInfo.model_validate({"name": value.name, "dtype": kind, "shape": shape})
