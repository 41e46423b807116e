"""Every error that a user meets says what would be accepted, or what to do next."""

from __future__ import annotations

import ast
from pathlib import Path

import mla_deploy.errors

ROOT = Path(__file__).parents[2]
KINDS = {
    name for name, kind in vars(mla_deploy.errors).items()
    if isinstance(kind, type) and issubclass(kind, mla_deploy.errors.MlaError)
} | {"BuildError", "CudaError"}  # fmt: skip


def is_unhelpful(node: ast.AST) -> bool:
    """An error made with a text of its own, and neither `allowed` nor `hint`."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return False
    if node.func.id not in KINDS or not node.args:
        return False
    has_text = isinstance(node.args[0], (ast.Constant, ast.JoinedStr))
    return has_text and not {word.arg for word in node.keywords} & {"allowed", "hint", None}


def test_errors_help() -> None:
    files = [
        file for folder in ("mla_deploy", "quant", "exporters", "runtime")
        for file in sorted((ROOT / folder).rglob("*.py"))
    ]  # fmt: skip
    assert len(files) > 100
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if is_unhelpful(node) and isinstance(node, ast.Call)
    ]
    assert found == []
