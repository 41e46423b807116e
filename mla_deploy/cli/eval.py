"""`mla-deploy eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_deploy.cli import table
from mla_deploy.cli.options import PATH, Depths, kernels_option, threads_option
from mla_deploy.cli.reporter import Reporter, reporting

if TYPE_CHECKING:
    from mla_deploy.evaluate import Evaluation
    from mla_deploy.evaluate.measures import Found, TaskScores
    from mla_deploy.evaluate.questions import QuestionScore
    from mla_deploy.evaluate.retrieval import RetrievalScore
    from mla_deploy.evaluate.scorer import TextGenerator


@click.command()
@click.argument("model", type=PATH)
@click.option("--text", type=PATH, help="UTF-8 text file to score: perplexity and KL divergence.")
@click.option("--reference", type=PATH, help="Checkpoint or bundle to compare with.")
@click.option("--window", type=int, help="Tokens seen at a time. Default: 512, or the context.")
@click.option(
    "--stride", type=int, help="Tokens between windows. Default: the window, so no overlap."
)
@click.option(
    "--score-from",
    type=click.IntRange(min=1),
    help="Leave out predictions that see fewer tokens of their window. Default: 1.",
)
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=2),
    help="Score only so many tokens from the start of the text.",
)
@click.option(
    "--passkey", type=Depths(), help="Find a number in prompts of so many tokens: 512,2k (2048)."
)
@click.option("--key-value", type=Depths(), help="Find a value by its key, likewise.")
@click.option("--trials", type=click.IntRange(min=1), help="Of each length and depth. Default: 10.")
@click.option(
    "--retrieval", type=PATH, help="File of retrieval trials: JSON lines, or .gz of them."
)
@click.option("--questions", type=PATH, help="File of questions in GSM8K's form: JSON lines.")
@click.option("--examples", type=PATH, help="File of questions to show, worked, before each.")
@click.option(
    "--shots", type=click.IntRange(min=0), help="Examples shown. Default: 5, or the task's."
)
@click.option(
    "--answer-tokens",
    type=click.IntRange(min=1),
    help="Longest answer to a question. Default: 256.",
)
@click.option("--tasks", help="Tasks of lm-evaluation-harness, with commas between them.")
@click.option("--task-path", type=PATH, help="Folder of task files of your own.")
@click.option("--offline", is_flag=True, help="Let the harness fetch nothing.")
@click.option(
    "--limit", type=click.IntRange(min=1), help="Take only so many trials, questions, documents."
)
@click.option("--resume", type=PATH, help="File that notes what is finished, to go on from there.")
@click.option("--report", type=PATH, help="HTML file to write, with plots.")
@threads_option
@kernels_option
@reporting
def command(
    reporter: Reporter,
    /,
    model: Path,
    reference: Path | None,
    threads: int | None,
    kernels: str | None,
    resume: Path | None,
    report: Path | None,
    **options: Any,
) -> None:
    """Measure how good MODEL is, and how far from a reference.

    MODEL and --reference are checkpoints (computed by the torch reference) or bundles (computed by
    the runtime). Give --text, --passkey, --key-value, --retrieval, --questions or --tasks, or
    several of them.
    """
    from mla_deploy import __version__
    from mla_deploy.bundle import MANIFEST
    from mla_deploy.cli.scorers import open_scorers
    from mla_deploy.evaluate.journal import Journal
    from mla_deploy.evaluate.measures import EvalOptions, Models, measures_of
    from mla_deploy.evaluate.report import read_calibration, require_matplotlib, write_report
    from mla_deploy.job import job_of

    chosen = EvalOptions(reference=reference, **options)
    measures = measures_of(chosen)
    if report is not None:
        require_matplotlib()
    paths = [model] if reference is None else [model, reference]
    job = job_of("eval", paths, {"kernels": kernels, **vars(chosen)}, chosen.files)
    scorers = open_scorers(paths, threads, kernels)
    for chosen_kernels in {str(getattr(one, "kernels", "")) for one in scorers}:
        reporter.kernels(chosen_kernels, kernels)
    models = Models(scorers[0], scorers[1] if reference is not None else None)
    values: dict[str, Any] = {
        "model": str(model),
        "reference": None if reference is None else str(reference),
        "version": __version__,
    }
    texts: list[str] = []
    journal = Journal(resume, job)
    for name, measure in measures.items():
        with reporter.progress(name.replace("_", " ")) as progress:
            result = measure.run(models, journal, progress)
        result.add_to(values)
        texts.append(_table(result.found, reference))
    if report is not None:
        if chosen.text is not None and not (model / MANIFEST).exists():
            values["cache"] = _latents(models.model, model, chosen.text, values["window"])
        write_report(report, values, read_calibration(model))
        texts.append(table.pairs([("report", str(report))]))
    reporter.result(values, "\n\n".join(texts))


def _latents(scorer: TextGenerator, model: Path, text: Path, window: int) -> list[dict[str, Any]]:
    from mla_deploy.evaluate import read_text
    from mla_deploy.evaluate.latents import score_latents

    ids = scorer.tokenizer.encode(read_text(text))[:window]
    return [asdict(layer) for layer in score_latents(model, ids)]


def _table(found: Found, reference: Path | None) -> str:
    from mla_deploy.evaluate import Evaluation
    from mla_deploy.evaluate.questions import QuestionScore

    if isinstance(found, Evaluation):
        return _text_table(found, reference)
    if isinstance(found, QuestionScore):
        return _question_table(found)
    return _task_table(found) if isinstance(found, dict) else _retrieval_table(found)


def _text_table(found: Evaluation, reference: Path | None) -> str:
    bits = "-" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
    entries = [
        ("tokens", f"{found.tokens:,} ({found.bytes:,} bytes of text)"),
        ("windows", f"{found.window} tokens, every {found.stride}"),
        ("perplexity", f"{found.perplexity:.4f}"),
        ("bits per byte", bits),
    ]
    if (compared := found.comparison) is None:
        return table.pairs(entries)
    change = found.perplexity / compared.reference_perplexity - 1
    entries += [
        ("", ""),
        ("reference", str(reference)),
        ("its perplexity", f"{compared.reference_perplexity:.4f} (this model: {change:+.3%})"),
        (
            "KL divergence",
            f"mean {compared.kl_mean:.3g}, median {compared.kl_median:.3g}, "
            f"p99 {compared.kl_p99:.3g}, max {compared.kl_max:.3g} nats",
        ),
        ("top-1 agreement", f"{compared.top1_agreement:.3%}"),
    ]
    rows = [
        (
            f"{span.first} to {span.last}",
            f"{span.tokens:,}",
            f"{span.perplexity:.3f}",
            *(
                "-" if value is None else f"{value:.3g}"
                for value in (span.kl_mean, span.kl_median, span.kl_p99)
            ),
            "-" if span.top1_agreement is None else f"{span.top1_agreement:.2%}",
        )
        for span in found.by_position
    ]
    head = ("tokens seen", "scored", "perplexity", "KL mean", "median", "p99", "top-1")
    return table.pairs(entries) + "\n\n" + table.table(head, rows)


def _retrieval_table(found: Sequence[RetrievalScore]) -> str:
    rows = [
        (
            one.task,
            f"{one.length:,}",
            "-" if one.depth is None else f"{one.depth:.0%}",
            str(one.trials),
            f"{one.accuracy:.1%}",
            f"{one.answer_nats:.3f}",
            "-" if one.reference_accuracy is None else f"{one.reference_accuracy:.1%}",
            "-" if one.reference_answer_nats is None else f"{one.reference_answer_nats:.3f}",
        )
        for one in found
    ]
    head = ("retrieval", "tokens", "depth", "trials", "right", "nats", "reference", "its nats")
    return table.table(head, rows)


def _question_table(found: QuestionScore) -> str:
    entries = [
        ("questions", f"{found.questions:,}, with {found.examples} examples before each"),
        ("right", f"{found.accuracy:.2%}"),
        ("with a number", f"{found.answered:.2%}"),
    ]
    return table.pairs(entries)


def _task_table(found: TaskScores) -> str:
    rows = [
        (task, metric, f"{value:.4f}" if isinstance(value, float) else str(value))
        for task, metrics in found.items()
        for metric, value in metrics.items()
    ]
    return table.table(("task", "metric", "value"), rows)
