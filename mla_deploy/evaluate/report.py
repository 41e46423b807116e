"""An evaluation as one HTML file: tables and plots, nothing fetched, no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mla_deploy.config_reader import read_json_object
from mla_deploy.errors import UsageError
from mla_deploy.output import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .8rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr + tr { border-top: 1px solid #ddd }
img { max-width: 100% } h2 { margin-top: 2.5rem }
"""


def read_calibration(model: Path) -> dict[str, Any]:
    """What `quantize` measured, if it did, as `write_report` takes it."""
    from mla_deploy.recipe import CALIBRATION_FILE, WEIGHT_BITS_FILE  # with torch

    cache, weights = (
        read_json_object(file) if file.is_file() else {}
        for file in (model / CALIBRATION_FILE, model / WEIGHT_BITS_FILE)
    )
    return {**cache, "weights": weights}


def write_report(path: Path, values: Mapping[str, Any], calibration: Mapping[str, Any]) -> None:
    """Write the report.

    Args:
        values: what `mla-deploy eval --json` prints.
        calibration: what `quantize` wrote into calibration.json, and under `weights` what it wrote
            into weight_bits.json; empty where it did not measure.

    Raises:
        UsageError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    require_matplotlib()
    sections = [_head(values)]
    if "perplexity" in values:
        sections += _text(values)
    if values.get("cache"):
        sections.append(_latents(values["cache"]))
    if calibration.get("points"):
        sections += _allocation(calibration, values)
    if calibration.get("weights"):
        sections += _weight_bits(calibration["weights"])
    if values.get("retrieval"):
        sections.append(_retrieval(values["retrieval"]))
    if values.get("questions"):
        sections += ["<h2>Questions</h2>", _table(("", ""), values["questions"].items())]
    if values.get("tasks"):
        rows = [
            (task, metric, value)
            for task, metrics in values["tasks"].items()
            for metric, value in metrics.items()
        ]
        sections += ["<h2>Tasks</h2>", _table(("task", "metric", "value"), rows)]
    body = "\n".join(sections)
    page = (
        f"<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>{_cell(values['model'])}"
        f"</title><style>{STYLE}</style>\n{body}\n</html>\n"
    )
    with whole_file(path) as file:
        file.write_text(page, encoding="utf-8")


def require_matplotlib() -> None:
    """Raise a UsageError if the plots cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError(
            "matplotlib, which draws the report, is not installed",
            hint="pip install matplotlib, or leave --report out",
        ) from None


def _head(values: Mapping[str, Any]) -> str:
    reference = values.get("reference") or "none"
    return (
        f"<h1>{_cell(values['model'])}</h1><p>Reference: {_cell(reference)}; "
        f"mla-deploy {_cell(values['version'])}</p>"
    )


def _text(values: Mapping[str, Any]) -> list[str]:
    names = ("text", "tokens", "window", "stride", "score_from", "perplexity", "bits_per_byte")
    compared = (
        "reference_perplexity", "kl_mean", "kl_median", "kl_p99", "kl_max", "top1_agreement",
    )  # fmt: skip
    rows = [(name.replace("_", " "), values[name]) for name in names]
    rows += [(name.replace("_", " "), values[name]) for name in compared if name in values]
    spans = values["by_position"]
    head = ("tokens seen", "scored", "perplexity", "reference", "KL mean", "median", "p99", "top-1")
    found = [
        "<h2>Text</h2>",
        _table(("", ""), rows),
        _table(
            head,
            [
                (
                    f"{span['first']} to {span['last']}", span["tokens"], span["perplexity"],
                    span["reference_perplexity"], span["kl_mean"], span["kl_median"],
                    span["kl_p99"], span["top1_agreement"],
                )
                for span in spans
            ],
        ),
    ]  # fmt: skip
    if "kl_mean" in values:

        def draw(axes: Axes) -> None:
            middle = [(span["first"] + span["last"]) / 2 for span in spans]
            for name, label in (("kl_mean", "mean"), ("kl_median", "median"), ("kl_p99", "p99")):
                axes.plot(middle, [max(span[name], 1e-9) for span in spans], "o-", label=label)
            axes.set(xscale="log", yscale="log", xlabel="tokens seen", ylabel="KL, nats")
            axes.legend()

        found.append(_plot("KL divergence by position", draw))
    return found


def _latents(layers: Sequence[Mapping[str, Any]]) -> str:
    def draw(axes: Axes) -> None:
        decibels = [layer["sqnr_db"] or 0.0 for layer in layers]
        bars = axes.bar(range(len(layers)), decibels)
        axes.bar_label(bars, [layer["format"] for layer in layers], rotation=90, padding=3)
        axes.set(xlabel="layer", ylabel="SQNR of the latent, dB")
        axes.margins(y=0.25)

    rows = [
        (at, one["format"], one["bytes"], one["latent_rotation"], one["sqnr_db"])
        for at, one in enumerate(layers)
    ]
    head = ("layer", "cache", "bytes a token", "rotation", "SQNR, dB")
    return "<h2>Cache</h2>" + _table(head, rows) + _plot("SQNR by layer", draw)


def _allocation(calibration: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    points = calibration["points"]
    chosen = calibration["chosen"]

    def draw_pareto(axes: Axes) -> None:
        _draw_points(axes, points)
        if "kl_mean" in values and calibration.get("bytes_per_layer"):
            axes.plot(
                calibration["bytes_per_layer"], values["kl_mean"], "*", markersize=14,
                label="this model on this text",
            )  # fmt: skip
        axes.set(xlabel="bytes a token and layer")
        axes.legend()

    def draw_layers(axes: Axes) -> None:
        axes.bar(range(len(chosen)), [one["bytes"] for one in chosen])
        axes.axhline(calibration["budget"], color="0.5", linestyle="--")
        axes.set(xlabel="layer", ylabel="bytes a token")

    head = ("layer", "cache", "bytes", "rotation", "KL alone")
    rows = [
        (at, one["format"], one["bytes"], one["rotation"], one["kl"])
        for at, one in enumerate(chosen)
    ]
    return [
        "<h2>Allocation</h2>",
        _table(head, rows),
        _plot("Bytes by layer, and the budget", draw_layers),
        _plot("Bytes against KL divergence, on the calibration text", draw_pareto),
    ]


def _weight_bits(weights: Mapping[str, Any]) -> list[str]:
    items = weights["items"]
    chosen = [item["choices"][item["chosen"]] for item in items]
    names = [f"{item['kind']} {item['layer']}" for item in items]

    def draw_pareto(axes: Axes) -> None:
        _draw_points(axes, weights["points"])
        axes.set(xlabel="bits a weight")
        axes.legend()

    def draw_bits(axes: Axes) -> None:
        bits = [
            8 * one["bytes"] / item["parameters"] for one, item in zip(chosen, items, strict=True)
        ]
        axes.bar(names, bits)
        axes.axhline(weights["budget"], color="0.5", linestyle="--")
        axes.tick_params(axis="x", rotation=90)
        axes.set(ylabel="bits a weight")

    head = ("matrices and layer", "format", "bytes", "relative error", "KL alone")
    rows = [
        (name, one["format"], one["bytes"], one["nmse"], one["kl"])
        for name, one in zip(names, chosen, strict=True)
    ]
    return [
        "<h2>Bits of the matrices</h2>",
        _table(head, rows),
        _plot("Bits a weight by layer, and the budget", draw_bits),
        _plot("Bits a weight against KL divergence, on the calibration text", draw_pareto),
    ]


def _draw_points(axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """Size against divergence: the greedy way, and what was measured with all layers at once."""
    way = sorted((p["size"], p["kl"]) for p in points if not p["is_measured"])
    axes.plot(*zip(*way, strict=True), ".-", color="0.7", label="greedy, layers added up")
    for point in (p for p in points if p["is_measured"]):
        axes.plot(point["size"], point["kl"], "o", label=point["name"])
    axes.set(yscale="log", ylabel="KL, nats")


def _retrieval(scores: Sequence[Mapping[str, Any]]) -> str:
    head = ("task", "tokens", "depth", "trials", "accuracy", "answer nats", "reference", "nats")
    rows = [
        (
            one["task"], one["length"], one["depth"], one["trials"], one["accuracy"],
            one["answer_nats"], one["reference_accuracy"], one["reference_answer_nats"],
        )
        for one in scores
    ]  # fmt: skip
    return "<h2>Retrieval</h2>" + _table(head, rows)


def _plot(title: str, draw: Any) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")  # no pyplot: no global state, no screen
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="{_cell(title)}" src="data:image/png;base64,{data}"></p>'


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["<table>"]
    if any(head):
        lines.append("<tr>" + "".join(f"<th>{_cell(name)}</th>" for name in head) + "</tr>")
    lines += ["<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return escape(f"{value:.5g}" if isinstance(value, float) else str(value))
