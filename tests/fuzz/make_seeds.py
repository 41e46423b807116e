"""Writes tests/fuzz/seeds, the inputs that fuzzing starts from: run it when a format changes.

    .venv/bin/python tests/fuzz/make_seeds.py

Session files are of the small bundle of tests/runtime/conftest.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

TESTS = Path(__file__).resolve().parents[1]
SEEDS = TESTS / "fuzz" / "seeds"
sys.path[:0] = [str(TESTS / "runtime"), str(TESTS)]

from conftest import write_toy  # noqa: E402
from cpp.core_abi import load_api  # noqa: E402

GPT4 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
CLASSES = r"\p{Han}+|[\p{Lu}\p{M}&&[^\p{Han}]]*[a[1-9]]+|(?<=a)(?>b|bc)\S{2,}|(?m:.)\z"


def byte_level() -> Tokenizer:
    alphabet = sorted(pre.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    merges = [("a", "a"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("aa", "aa")]
    vocab |= {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    split = pre.Split(Regex(GPT4), "isolated")
    tokenizer.pre_tokenizer = pre.Sequence([split, pre.Digits(True), pre.ByteLevel(False)])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")],
    )
    return tokenizer


def sentencepiece() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(["<unk>", "▁", "t", "h", "e", "a", "▁t", "he"])}
    vocab |= {"▁the": len(vocab), "中": len(vocab) + 1}
    for byte in (0x0A, 0x20, 0xC3, 0xA9, 0xE4, 0xB8, 0xAD, 0xF0, 0x9F, 0x98, 0x80):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_tokens([AddedToken("<|x|>", single_word=True, lstrip=True, normalized=True)])
    return tokenizer


def components() -> Tokenizer:
    """What the other two leave out."""
    vocab = {char: i for i, char in enumerate(["<unk>", *"ab▁-1"])}
    tokenizer = Tokenizer(models.BPE(vocab | {"ab": 6}, [("a", "b")], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split("-", "merged_with_previous"),
            pre.Split(Regex(CLASSES), "contiguous", invert=True),
            pre.Split(Regex(r"\w+|\h"), "merged_with_next"),
            pre.Metaspace("▁", "first"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(), decoders.Fuse(), decoders.Replace("ab", "<>")]
    )
    return tokenizer


def main() -> None:
    """Write all seeds."""
    for name, tokenizer in {
        "byte_level": byte_level(),
        "sentencepiece": sentencepiece(),
        "components": components(),
    }.items():
        (SEEDS / "tokenizer" / f"{name}.json").write_text(
            json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)
        )
    with tempfile.TemporaryDirectory() as name:
        toy = write_toy(Path(name))
        manifest = (toy.path / "manifest.json").read_text()
        (SEEDS / "manifest" / "toy.json").write_text(manifest)
        engine = load_api().engine(toy.path)
        for tokens in (0, 3, 64, 70):
            session = engine.session()
            if tokens:
                session.prefill(list(range(tokens)))
            session.save(SEEDS / "session" / f"tokens-{tokens}")
            session.destroy()


if __name__ == "__main__":
    main()
