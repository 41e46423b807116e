"""A bundle's tokenizer: the same ids and end tokens for Python, C++ and stock programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cpp.text_abi import CppTokenizer, load_text
from support.ranks import oracle, trained_tokens, write_ranks
from support.sources import byte_tokenizer
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import processors

from mla_deploy.bundle import Bundle
from mla_deploy.errors import TokenizerError
from mla_deploy.exporters.onnx.export import export_onnx
from mla_deploy.quant.quantize import quantize_checkpoint
from mla_deploy.tokenizer import Tokenizer
from mla_deploy.tokenizer_files import checked_tokenizer, copy_to_checkpoint, write_to_bundle

TEXT = "A cat, 你好 and <s>  x\n"
TEMPLATE = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    byte_tokenizer(folder)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("add_eos", [None, False, True])
@pytest.mark.parametrize("add_bos", [None, False, True])
@pytest.mark.parametrize("in_file", [None, TEMPLATE])
def test_every_reader_of_a_bundle_puts_the_same_around_a_text(
    source: Path, out: Path, in_file: Any, add_bos: bool | None, add_eos: bool | None
) -> None:
    load_text()
    theirs = HfTokenizer.from_file(str(source / "tokenizer.json"))
    if in_file is not None:
        theirs.post_processor = in_file
    theirs.save(str(source / "tokenizer.json"))
    change(source / "tokenizer_config.json", add_bos_token=add_bos, add_eos_token=add_eos)
    tokenizer = checked_tokenizer(source)
    ids = tokenizer.encode(TEXT)
    assert (ids[0] == 0) == (in_file is not None if add_bos is None else add_bos)
    assert (ids[-1] == 1) == bool(add_eos)
    write_to_bundle(tokenizer, source, out)
    assert HfTokenizer.from_file(str(out / "tokenizer.json")).encode(TEXT).ids == ids
    assert CppTokenizer(out / "tokenizer.json").encode(TEXT, True) == ids
    assert Tokenizer.open(out).encode(TEXT) == ids
    two = HfTokenizer.from_file(str(out / "tokenizer.json")).encode("a", "b").ids
    assert [one for one in two if one > 1] == tokenizer.encode("ab", add_special_tokens=False)


def test_a_bundles_tokenizer_neither_cuts_nor_fills_up(source: Path, out: Path) -> None:
    load_text()
    theirs = HfTokenizer.from_file(str(source / "tokenizer.json"))
    theirs.enable_truncation(3)
    theirs.enable_padding(length=40)
    theirs.save(str(source / "tokenizer.json"))
    tokenizer = checked_tokenizer(source)
    write_to_bundle(tokenizer, source, out)
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 3
    assert HfTokenizer.from_file(str(out / "tokenizer.json")).encode(TEXT).ids == ids
    assert CppTokenizer(out / "tokenizer.json").encode(TEXT, True) == ids


def test_a_file_that_says_all_is_copied_as_it_is(source: Path, out: Path) -> None:
    (source / "generation_config.json").write_text("{}")
    (source / "vocab.json").write_text("{}")
    names = write_to_bundle(checked_tokenizer(source), source, out)
    assert names == ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    assert sorted(names) == sorted(file.name for file in out.iterdir())
    for name in names:
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_an_older_file_of_the_chat_template_is_read_and_renamed(source: Path, out: Path) -> None:
    change(source / "tokenizer_config.json", chat_template="config")
    (source / "chat_template.json").write_text('{"chat_template": "old\\n{{ messages[0].x }}"}')
    tokenizer = checked_tokenizer(source)
    assert tokenizer.render_chat([{"x": "é"}]) == "old\né"
    names = write_to_bundle(tokenizer, source, out)
    assert "chat_template.jinja" in names
    assert not (out / "chat_template.json").exists()
    assert Tokenizer.open(out).render_chat([{"x": "é"}]) == "old\né"
    (source / "chat_template.jinja").write_text("new")
    write_to_bundle(checked_tokenizer(source), source, out)
    assert Tokenizer.open(out).render_chat([]) == "new"


@pytest.mark.parametrize("content", ["[]", '"x"', "{}", '{"chat_template": 1}', "{"])
def test_an_older_file_without_chat_template_is_refused(source: Path, content: str) -> None:
    (source / "chat_template.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"chat_template\.json"):
        Tokenizer.open(source)


def test_what_a_checkpoint_has_is_copied(source: Path, out: Path) -> None:
    (source / "chat_template.json").write_text('{"chat_template": "x"}')
    change(source / "tokenizer_config.json", add_bos_token=True)
    copy_to_checkpoint(source, out)
    assert sorted(file.name for file in out.iterdir()) == [
        "chat_template.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for file in out.iterdir():
        assert file.read_bytes() == (source / file.name).read_bytes()


@pytest.fixture(scope="module")
def kimi(tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-mla with the tokenizer files of another family."""
    folder = tmp_path_factory.mktemp("kimi") / "source"
    shutil.copytree(tiny_mla, folder)
    (folder / "tokenizer.json").unlink()
    end = len(trained_tokens()) + 2
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 1]}))
    return write_ranks(folder, trained_tokens(), add_bos_token=True)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_with_ranks_becomes_a_bundle_like_any_other(
    kimi: Path, tmp_path: Path, quantized: bool
) -> None:
    load_text()
    source = kimi
    if quantized:
        quantize_checkpoint(kimi, tmp_path / "quantized")
        source = tmp_path / "quantized"
        assert (source / "tokenizer.json").is_file()
    bundle = Bundle.open(export_onnx(source, tmp_path / "bundle").bundle, verify=True)
    first = len(trained_tokens())
    ids = [first, *oracle(trained_tokens()).encode(TEXT)]
    assert Tokenizer.open(bundle).encode(TEXT) == ids
    assert HfTokenizer.from_file(str(bundle.file("tokenizer.json"))).encode(TEXT).ids == ids
    assert CppTokenizer(bundle.file("tokenizer.json")).encode(TEXT, True) == ids
    # config.json's, the tokenizer's and generation_config.json's.
    assert bundle.manifest.model.eos_token_ids == [1, first + 1, first + 2]
