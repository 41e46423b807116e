"""The tasks of lm-evaluation-harness on a scorer, through an adapter to its `LM`.

Tasks come from the harness's own collection, which fetches its data, or from a folder of task files
of one's own, whose data may be local files: then nothing is fetched.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mla_deploy.errors import UsageError
from mla_deploy.evaluate.journal import Journal
from mla_deploy.evaluate.scorer import TextGenerator
from mla_deploy.progress import Progress

DEFAULT_ANSWER_TOKENS = 256


def run_tasks(
    model: TextGenerator,
    tasks: Sequence[str],
    *,
    task_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    offline: bool = False,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, float | str]]:
    """Run tasks by name.

    Args:
        task_path: folder with task files (YAML) beside the harness's own.
        shots: worked examples before each question; None: as the task says.
        limit: take only so many documents of each task.
        offline: fetch nothing; data must be local or fetched before.
        journal: what an earlier run of the same evaluation has finished.

    Returns:
        For each task its metrics by name, such as `acc,none` and `acc_stderr,none`.

    Raises:
        UsageError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    if offline:
        os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")
    try:
        import lm_eval
    except ImportError:
        raise UsageError(
            "lm-evaluation-harness is not installed", hint="pip install lm-eval"
        ) from None
    if task_path is not None and not task_path.is_dir():
        raise UsageError(
            "the folder of task files does not exist", found=task_path, hint="give another one"
        )
    manager = _manager(tasks, task_path)
    adapter = _adapter(model, journal or Journal(), progress)
    try:
        results = lm_eval.simple_evaluate(
            adapter,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except (OSError, ConnectionError, ValueError) as error:
        raise UsageError(
            f"the tasks {', '.join(tasks)} could not be run",
            found=f"{type(error).__name__}: {error}",
            hint="without a network, fetch the data before, or use --task-path with local files",
        ) from error
    assert results is not None
    return {
        name: {
            metric: value for metric, value in found.items() if isinstance(value, (int, float, str))
        }
        for name, found in results["results"].items()
    }


def _manager(tasks: Sequence[str], task_path: Path | None) -> Any:
    """Finds tasks; the harness's own are read only if they are wanted, since they are thousands."""
    from lm_eval.tasks import TaskManager

    path = None if task_path is None else str(task_path)
    unknown = list(tasks)
    for with_own in (False, True) if path else (True,):
        manager = TaskManager(include_path=path, include_defaults=with_own)
        unknown = [name for name in tasks if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise UsageError(
        "the harness has no such task",
        found=", ".join(unknown),
        hint="`lm-eval ls tasks` lists its own; --task-path names a folder of yours",
    )


def _adapter(model: TextGenerator, journal: Journal, progress: Progress | None) -> Any:
    from lm_eval.api.model import LM

    class Adapter(LM):  # type: ignore[misc]
        """Requests in text, answered with the scorer's own tokenizer."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            def one(arguments: tuple[str, str]) -> list[float]:
                return _likelihood(model, *_split(model, *arguments))

            found = self._each("likelihood", requests, one)
            return [(nats, bool(is_greedy)) for nats, is_greedy in found]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            def one(arguments: tuple[str]) -> float:
                return _rolling(model, arguments[0])

            return self._each("rolling", requests, one)

        def generate_until(self, requests: list[Any]) -> list[str]:
            def one(arguments: tuple[str, dict[str, Any]]) -> str:
                return _generate(model, *arguments)

            return self._each("generate", requests, one)

        def _each(self, kind: str, requests: list[Any], one: Callable[..., Any]) -> list[Any]:
            found = []
            for request in requests:
                key = f"{kind} {request.args!r}"
                found.append(journal.item(key, functools.partial(one, request.args)))
                if progress is not None:
                    progress(len(found), len(requests), f"{request.task_name or ''} {kind}")
            return found

    return Adapter()


def _start(model: TextGenerator) -> list[int]:
    """What stands before a text without context: the tokenizer's start, or an end token."""
    return model.tokenizer.encode("") or sorted(model.tokenizer.eos_token_ids)[:1] or [0]


def _split(model: TextGenerator, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of both; the space between them belongs to the continuation."""
    if not context:
        return _start(model), model.tokenizer.encode(continuation, add_special_tokens=False)
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    ids = model.tokenizer.encode(bare)
    whole = model.tokenizer.encode(bare + continuation)
    if whole[: len(ids)] == ids:
        return ids, whole[len(ids) :]
    return ids, model.tokenizer.encode(continuation, add_special_tokens=False)


def _likelihood(model: TextGenerator, context: list[int], target: list[int]) -> list[float]:
    """ln p of the target behind the context, and 1.0 if greedy decoding gives it."""
    ids = [*context, *target][-model.context :]
    count = min(len(target), len(ids) - 1)
    rows = model.logits(ids[:-1])[-count:].astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    wanted = np.array(ids[-count:])
    logs = rows[np.arange(count), wanted] - np.log(np.exp(rows).sum(-1))
    return [float(logs.sum()), float((rows.argmax(-1) == wanted).all())]


def _rolling(model: TextGenerator, text: str) -> float:
    """ln p of a whole text, each token predicted once, with as much context as there is."""
    ids = [*_start(model), *model.tokenizer.encode(text, add_special_tokens=False)]
    total, done = 0.0, 1
    while done < len(ids):
        end = min(len(ids), done + model.context - 1)
        begin = max(0, end - model.context)
        total += _likelihood(model, ids[begin:done], ids[done:end])[0]
        done = end
    return total


def _generate(model: TextGenerator, context: str, arguments: dict[str, Any]) -> str:
    stop = arguments.get("until") or []
    stop = [stop] if isinstance(stop, str) else list(stop)
    wanted = int(arguments.get("max_gen_toks", DEFAULT_ANSWER_TOKENS))
    ids = model.tokenizer.encode(context)[-(model.context - wanted) :]
    return model.generate(ids, wanted, [one for one in stop if one])
