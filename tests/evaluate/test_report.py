"""The HTML report: whole, self-contained, and nothing of its input is taken for HTML."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mla_deploy.evaluate.report import write_report

pytest.importorskip("matplotlib")

SPAN = {
    "first": 1, "last": 63, "tokens": 63, "perplexity": 9.0, "reference_perplexity": 8.0,
    "kl_mean": 0.01, "kl_median": 0.001, "kl_p99": 0.1, "top1_agreement": 0.9,
}  # fmt: skip
VALUES: dict[str, Any] = {
    "model": "<script>alert(1)</script>", "reference": "a&b", "version": "1", "text": "t.txt",
    "tokens": 63, "window": 64, "stride": 64, "score_from": 1, "perplexity": 9.0,
    "bits_per_byte": 1.5, "by_position": [SPAN, {**SPAN, "first": 64, "last": 127, "kl_mean": 0.0}],
    "reference_perplexity": 8.0, "kl_mean": 0.01, "kl_median": 0.001, "kl_p99": 0.1, "kl_max": 1.0,
    "top1_agreement": 0.9,
    "cache": [{"format": "int4", "bytes": 108, "latent_rotation": 64, "sqnr_db": 22.0}],
    "retrieval": [
        {
            "task": "passkey", "length": 512, "depth": 0.5, "trials": 10, "accuracy": 0.6,
            "answer_nats": 1.0, "reference_accuracy": None, "reference_answer_nats": None,
        }
    ],
    "questions": {"questions": 5, "accuracy": 0.2, "answered": 1.0, "examples": 5},
    "tasks": {"local": {"acc,none": 0.5}},
}  # fmt: skip
CALIBRATION: dict[str, Any] = {
    "points": [
        {"name": "int4", "size": 108.0, "kl": 0.004, "is_measured": True},
        {"name": "greedy", "size": 100.0, "kl": 0.005, "is_measured": True},
        {"name": "greedy", "size": 76.0, "kl": 0.05, "is_measured": False},
        {"name": "greedy", "size": 100.0, "kl": 0.006, "is_measured": False},
    ],
    "chosen": [{"format": "int3", "bytes": 92, "rotation": "balanced", "kl": 0.001}],
    "budget": 100.0,
    "bytes_per_layer": 92.0,
    "weights": {
        "items": [
            {
                "layer": 3, "kind": "experts", "parameters": 1000, "chosen": 1,
                "choices": [
                    {"format": "int4", "bytes": 550, "nmse": 0.008, "kl": 0.01},
                    {"format": "int8", "bytes": 1050, "nmse": 3e-5, "kl": 0.0002},
                ],
            }
        ],
        "budget": 9.0,
        "points": [
            {"name": "greedy", "size": 8.4, "kl": 0.0003, "is_measured": True},
            {"name": "greedy", "size": 4.4, "kl": 0.01, "is_measured": False},
        ],
    },
}  # fmt: skip


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_everything_is_in_it_and_nothing_is_fetched(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_report(file, VALUES, CALIBRATION)
    text = file.read_text()
    page = Page(text)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [image["alt"] for image in images] == [
        "KL divergence by position",
        "SQNR by layer",
        "Bytes by layer, and the budget",
        "Bytes against KL divergence, on the calibration text",
        "Bits a weight by layer, and the budget",
        "Bits a weight against KL divergence, on the calibration text",
    ]
    assert all(str(image["src"]).startswith("data:image/png;base64,iVBOR") for image in images)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe"}
    assert "&lt;script&gt;alert(1)" in text
    for word in ("passkey", "acc,none", "balanced", "experts 3", "64 to 127", "a&amp;b"):
        assert word in text
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_a_report_without_reference_and_calibration(tmp_path: Path) -> None:
    bare = {**SPAN, "kl_mean": None, "kl_median": None, "kl_p99": None, "top1_agreement": None}
    values = {
        name: value
        for name, value in VALUES.items()
        if not name.startswith(("kl", "ref", "top1", "cache", "retr", "ques", "tasks"))
    }
    write_report(tmp_path / "r.html", {**values, "by_position": [bare]}, {})
    assert "img" not in {tag for tag, _ in Page((tmp_path / "r.html").read_text()).tags}
