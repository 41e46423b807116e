"""`mla-deploy eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mla_deploy.cli import table
from mla_deploy.cli.options import PATH, Depths, kernels_option, threads_option
from mla_deploy.cli.reporter import Reporter, reporting

if TYPE_CHECKING:
    from mla_deploy.evaluate import Evaluation
    from mla_deploy.evaluate.retrieval import RetrievalScore

MEASURES = ("text", "passkey", "key_value", "retrieval", "questions", "tasks")


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
    default=1,
    help="Leave out predictions that see fewer tokens of their window.",
)
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=2),
    help="Score only so many tokens from the start of the text.",
)
@click.option(
    "--passkey", type=Depths(), help="Find a number in prompts of so many tokens: 512,2k."
)
@click.option("--key-value", type=Depths(), help="Find a value by its key, likewise.")
@click.option("--trials", type=click.IntRange(min=1), default=10, help="Of each length and depth.")
@click.option(
    "--retrieval", type=PATH, help="File of retrieval trials: JSON lines, or .gz of them."
)
@click.option("--questions", type=PATH, help="File of questions in GSM8K's form: JSON lines.")
@click.option("--examples", type=PATH, help="File of questions to show, worked, before each.")
@click.option(
    "--shots", type=click.IntRange(min=0), help="Examples shown. Default: 5; or the task's."
)
@click.option(
    "--answer-tokens", type=click.IntRange(min=1), default=256, help="Longest answer to a question."
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
    from mla_deploy.cli.scorers import open_scorers
    from mla_deploy.errors import UsageError
    from mla_deploy.evaluate.journal import Journal
    from mla_deploy.evaluate.report import require_matplotlib, write_report
    from mla_deploy.job import job_of

    chosen = [name for name in MEASURES if options[name] is not None]
    if not chosen:
        raise UsageError(
            "nothing was asked for",
            allowed=", ".join("--" + name.replace("_", "-") for name in MEASURES),
            hint="give one or more of them, for instance --text FILE",
        )
    if report is not None:
        require_matplotlib()
    inputs = _read_inputs(options)
    paths = [model] if reference is None else [model, reference]
    job = job_of("eval", paths, {"kernels": kernels, **options}, _input_files(options))
    scorers = open_scorers(paths, threads, kernels)
    for chosen_kernels in {str(getattr(one, "kernels", "")) for one in scorers}:
        reporter.kernels(chosen_kernels, kernels)
    other = scorers[1] if reference is not None else None
    values: dict[str, Any] = {
        "model": str(model),
        "reference": None if reference is None else str(reference),
        "version": __version__,
    }
    texts: list[str] = []
    journal = Journal(resume, job)
    for name in chosen:
        with reporter.progress(name.replace("_", " ")) as progress:
            measure = {"text": _text, "questions": _questions, "tasks": _tasks}.get(
                name, _retrieval
            )
            measure(scorers[0], other, name, options, inputs, journal, progress, values, texts)
    if report is not None:
        if "text" in chosen and not (model / "manifest.json").exists():
            values["cache"] = _latents(scorers[0], model, inputs["text"], values["window"])
        write_report(report, values, _calibration(model))
        texts.append(table.pairs([("report", str(report))]))
    reporter.result(values, "\n\n".join(texts))


def _read_inputs(options: Mapping[str, Any]) -> dict[str, Any]:
    """The files, before any model is loaded: what is wrong with them is then said at once."""
    from mla_deploy.evaluate import read_text
    from mla_deploy.evaluate.questions import read_questions
    from mla_deploy.evaluate.retrieval import read_trials

    readers = {
        "text": read_text, "retrieval": read_trials, "questions": read_questions,
        "examples": read_questions,
    }  # fmt: skip
    return {
        name: read(options[name]) for name, read in readers.items() if options[name] is not None
    }


def _input_files(options: Mapping[str, Any]) -> list[Path]:
    """What is read beside the models."""
    files = [options[name] for name in ("text", "retrieval", "questions", "examples")]
    folder = options["task_path"]
    return [file for file in files if file is not None] + (
        [] if folder is None else sorted(folder.rglob("*"))
    )


def _text(
    model: Any, other: Any, name: str, options: Mapping[str, Any], inputs: Mapping[str, Any],
    journal: Any, progress: Any, values: dict[str, Any], texts: list[str],
) -> None:  # fmt: skip
    from mla_deploy.evaluate import evaluate

    found = evaluate(
        model,
        inputs["text"],
        reference=other,
        window=options["window"],
        stride=options["stride"],
        max_tokens=options["max_tokens"],
        score_from=options["score_from"],
        journal=journal,
        progress=progress,
    )
    figures = asdict(found)
    figures.update(figures.pop("comparison") or {})
    values.update({"text": str(options["text"]), **figures})
    texts.append(_text_table(found, values["reference"]))


def _retrieval(
    model: Any, other: Any, name: str, options: Mapping[str, Any], inputs: Mapping[str, Any],
    journal: Any, progress: Any, values: dict[str, Any], texts: list[str],
) -> None:  # fmt: skip
    from mla_deploy.evaluate.retrieval import score_file, score_synthetic

    if name == "retrieval":
        path = options["retrieval"]
        found = score_file(
            model, other, path, limit=options["limit"], journal=journal, progress=progress
        )
    else:
        kinds = {"passkey": "passkey", "key_value": "key-value"}
        found = score_synthetic(
            model,
            other,
            [kinds[name]],  # type: ignore[list-item]
            options[name],
            trials=options["trials"],
            journal=journal,
            progress=progress,
        )
    values.setdefault("retrieval", []).extend(asdict(score) for score in found)
    texts.append(_retrieval_table(found))


def _questions(
    model: Any, other: Any, name: str, options: Mapping[str, Any], inputs: Mapping[str, Any],
    journal: Any, progress: Any, values: dict[str, Any], texts: list[str],
) -> None:  # fmt: skip
    from mla_deploy.evaluate.questions import score_questions

    shots = 5 if options["shots"] is None else options["shots"]
    found = score_questions(
        model,
        inputs["questions"][: options["limit"]],
        inputs.get("examples", [])[:shots],
        max_tokens=options["answer_tokens"],
        journal=journal,
        progress=progress,
    )
    values["questions"] = asdict(found)
    entries = [
        ("questions", f"{found.questions:,}, with {found.examples} examples before each"),
        ("right", f"{found.accuracy:.2%}"),
        ("with a number", f"{found.answered:.2%}"),
    ]
    texts.append(table.pairs(entries))


def _tasks(
    model: Any, other: Any, name: str, options: Mapping[str, Any], inputs: Mapping[str, Any],
    journal: Any, progress: Any, values: dict[str, Any], texts: list[str],
) -> None:  # fmt: skip
    from mla_deploy.evaluate.harness import run_tasks

    values["tasks"] = run_tasks(
        model,
        [task.strip() for task in options["tasks"].split(",")],
        task_path=options["task_path"],
        shots=options["shots"],
        limit=options["limit"],
        offline=options["offline"],
        journal=journal,
        progress=progress,
    )
    rows = [
        (task, metric, f"{value:.4f}" if isinstance(value, float) else str(value))
        for task, metrics in values["tasks"].items()
        for metric, value in metrics.items()
    ]
    texts.append(table.table(("task", "metric", "value"), rows))


def _latents(model: Any, path: Path, text: str, window: int) -> list[dict[str, Any]]:
    from mla_deploy.evaluate.latents import score_latents

    ids = model.tokenizer.encode(text)[:window]
    return [asdict(layer) for layer in score_latents(path, ids)]


def _calibration(model: Path) -> Mapping[str, Any]:
    """What `quantize` measured, if it did."""
    from mla_deploy.config_reader import read_json_object
    from mla_deploy.recipe import CALIBRATION_FILE, WEIGHT_BITS_FILE

    cache, weights = (
        read_json_object(file) if file.is_file() else {}
        for file in (model / CALIBRATION_FILE, model / WEIGHT_BITS_FILE)
    )
    return {**cache, "weights": weights}


def _text_table(found: Evaluation, reference: str | None) -> str:
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
