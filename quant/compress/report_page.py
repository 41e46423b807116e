"""The report as a page: report.html, one file with its plots inside."""

from __future__ import annotations

import html
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mla_deploy.inspection import described_formats
from mla_deploy.output import writing
from mla_deploy.quant.compress.layout import CONSTANT
from mla_deploy.quant.compress.report import ConversionReport

REPORT_HTML = "report.html"
PLOTS_EXTRA = "pip install matplotlib"
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;text-align:right;
border-bottom:1px solid #ccc}td:first-child,th:first-child{text-align:left}
svg{max-width:100%;height:auto}"""


def has_plots() -> bool:
    """Whether matplotlib is there; without it the page says that its plots are missing."""
    return importlib.util.find_spec("matplotlib") is not None


def write_page(report: ConversionReport, folder: Path) -> None:
    """Put `REPORT_HTML` into the result."""
    with writing(folder):
        (folder / REPORT_HTML).write_text(report_page(report), encoding="utf-8")


def report_page(report: ConversionReport) -> str:
    """The page as HTML."""
    plots = _plots(report) if has_plots() else [f"<p>No plots: {html.escape(PLOTS_EXTRA)}</p>"]
    parts = [
        "<!doctype html><meta charset=utf-8><title>Conversion to MLA</title>",
        f"<style>{_STYLE}</style>",
        "<h1>Conversion to MLA</h1>",
        _table(("", ""), _summary(report)),
        *_layout_note(report),
        "<h2>Cache</h2>",
        _table(("format", "bytes a token", "of the source in fp16"), _cache(report)),
        "<h2>Layers</h2>",
        *plots,
        _table(
            ("layer", "positions lost", "rank lost", "output error", "chosen"),
            [
                (
                    str(one.layer),
                    _share(one.rope_loss),
                    _share(one.rank_loss),
                    _share(one.output_error),
                    ", ".join(f"{name} {value:g}" for name, value in one.choices.items()),
                )
                for one in report.layers
            ],
        ),
    ]
    if report.held_out is not None:
        quarters = zip(
            ("first", "second", "third", "last"),
            report.held_out.loss_by_quarter,
            report.held_out.converted_loss_by_quarter,
            strict=True,
        )
        parts += [
            "<h2>Long context</h2>",
            "<p>Loss in nats a token on held-out text, by quarter of a window.</p>",
            _table(
                ("quarter", "source", "converted", "difference"),
                [(name, f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}") for name, a, b in quarters],
            ),
        ]
    return "\n".join(parts) + "\n"


def _summary(report: ConversionReport) -> list[tuple[str, str]]:
    rows = [
        ("method", report.options.method),
        ("layout", report.options.layout),
        ("latent", report.geometry.text),
        ("numbers cached, of the source's", f"{report.geometry.ratio(report.source):.2%}"),
        ("calibration", f"{report.calibration_tokens:,} tokens"),
    ]
    if (held_out := report.held_out) is not None:
        rows += [
            ("held-out tokens", f"{held_out.tokens:,}"),
            ("loss of the source", f"{held_out.loss:.4f}"),
            ("loss, converted", f"{held_out.converted_loss:.4f}"),
            ("KL divergence, nats a token", f"{held_out.kl:.4f}"),
            ("top-1 agreement", f"{held_out.top1_agreement:.2%}"),
        ]
    return rows


def _layout_note(report: ConversionReport) -> list[str]:
    if report.options.layout != "deepseek_v3":
        return []
    return [
        f"<p>Engines that load this layout normalise the latent. One constant number in it, "
        f"{CONSTANT:g} times as large as the root of the squared sum of the others, keeps that "
        "norm within about 1e-4 of the identity. It costs one number of the rank, and it is an "
        "outlier for a quantised cache: for that, convert to the layout mla_deploy.</p>"
    ]


def _cache(report: ConversionReport) -> list[tuple[str, str, str]]:
    source = report.source_bytes_per_token
    rows = [("source, fp16", f"{source:,}", "100.00%")]
    return rows + [
        (described_formats(formats), f"{size:,}", f"{size / source:.2%}")
        for formats, size in report.bytes_per_token().items()
    ]


def _plots(report: ConversionReport) -> list[str]:
    layers = [one.layer for one in report.layers]
    lines = {
        "positions lost": [one.rope_loss for one in report.layers],
        "rank lost": [one.rank_loss for one in report.layers],
        "output error": [one.output_error for one in report.layers],
    }
    drawn = {name: values for name, values in lines.items() if any(v == v for v in values)}

    def shares(axes: Any) -> None:
        for name, values in drawn.items():
            axes.plot(layers, values, marker="o", label=name)
        axes.set(xlabel="layer", ylabel="share", yscale="log")
        axes.legend()

    def frequencies(axes: Any) -> None:
        for one in report.layers:
            axes.scatter([one.layer] * len(one.inv_freq), one.inv_freq, s=12, color="tab:blue")
        axes.set(xlabel="layer", ylabel="radians a position", yscale="log")
        axes.set_title("frequencies that stay")

    def healing(axes: Any) -> None:
        assert report.distillation is not None
        axes.plot(report.distillation.tokens, report.distillation.loss)
        axes.set(xlabel="tokens", ylabel="cross-entropy + KL", title="distillation")

    def matching(axes: Any) -> None:
        for one in report.layers:
            if one.match is not None:
                axes.plot(one.match.tokens, one.match.loss, label=f"layer {one.layer}")
        axes.set(xlabel="tokens", ylabel="output error", yscale="log", title="layers by themselves")

    plots = [_svg(shares), _svg(frequencies)]
    if any(one.match is not None for one in report.layers):
        plots.append(_svg(matching))
    if report.distillation is not None:
        plots.append(_svg(healing))
    return plots


def _svg(draw: Any) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    draw(figure.subplots())
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = []
    if any(head):
        lines.append("".join(f"<th>{html.escape(cell)}</th>" for cell in head))
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _share(value: float) -> str:
    return "-" if value != value else f"{value:.3%}"
