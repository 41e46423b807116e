"""A bundle small enough to know by heart.

The model's next token depends on all tokens so far and on their places, read from the cache through
the block table: if a page is mixed up, lost or stale, the logits are wrong. With tokens x_t at
positions t, V ids, and everything modulo V:

    h = sum_t (t % 7 + 1) x_t              from layer 0, part `token`: float32, rows
    g = sum_t [place_t = t % 251] code_t   from layer 1, part `code`: uint8, columns of x_t % 256
                                           and of the place it was written for
    logits[v] = -((v - h) % V) / 4 - ((v - g) % V) / 8
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from support.cuda import Machine, build_emulation, gpu_machine
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mla_deploy.bundle import describe_file, write_manifest
from mla_deploy.exporters.onnx import export_onnx
from mla_deploy.manifest import CacheInfo, CachePartInfo, GraphInfo, LayerCache, Manifest, ModelInfo
from mla_deploy.runtime import Engine, load

VOCAB = 263  # prime
BOS, EOS = 256, 257
MERGES = ("th", "he", "in", "er", "an")
CONTEXT = 1000

GRAPH = """
<ir_version: 10, opset_import: ["" : 21]>
toy (
    int64[B, S] input_ids, int64[B] past_lengths, int64[B] new_lengths, int64[B, M] block_table,
    int64[B, L] logit_index, float[P, 64, 1] cache_0_token, uint8[P, 2, 64] cache_1_code
) => (
    float[B, L, 263] logits, float[P, 64, 1] present_0_token, uint8[P, 2, 64] present_1_code
)
<
    int64 zero = {0}, int64 one = {1}, int64 page_tokens = {64}, int64 vocab = {263},
    int64[1] first = {0}, int64[1] second = {1}, int64[1] last = {-1}, int64[2] rows = {0, 1},
    int64[2] nothing = {0, 0}, int64[2] flat = {0, -1}, int64[3] flat_rows = {0, 2, -1},
    int64 seven = {7}, int64 places = {251}, int64 bytes = {256},
    float quarter = {-0.25}, float eighth = {-0.125}
>
{
    shape = Shape (input_ids)
    size = Gather (shape, one)
    steps = Range (zero, size, one)
    step = Unsqueeze (steps, first)
    past = Unsqueeze (past_lengths, second)
    new = Unsqueeze (new_lengths, second)
    real = Less (step, new)
    position = Add (past, step)
    written = Where (real, position, zero)
    nth = Div (written, page_tokens)
    found = GatherElements <axis = 1> (block_table, nth)
    page = Where (real, found, zero)
    slot = Mod (written, page_tokens)

    page1 = Unsqueeze (page, last)
    slot1 = Unsqueeze (slot, last)
    token_index = Concat <axis = -1> (page1, slot1)
    token_values = Cast <to = 1> (input_ids)
    token_rows = Unsqueeze (token_values, last)
    present_0_token = ScatterND (cache_0_token, token_index, token_rows)

    page2 = Add (page1, nothing)
    slot2 = Add (slot1, nothing)
    zero2 = Mul (page2, zero)
    row2 = Add (zero2, rows)
    page3 = Unsqueeze (page2, last)
    row3 = Unsqueeze (row2, last)
    slot3 = Unsqueeze (slot2, last)
    code_index = Concat <axis = -1> (page3, row3, slot3)
    code = Mod (input_ids, bytes)
    place = Mod (written, places)
    code1 = Unsqueeze (code, last)
    place1 = Unsqueeze (place, last)
    code_wide = Concat <axis = -1> (code1, place1)
    code_values = Cast <to = 2> (code_wide)
    present_1_code = ScatterND (cache_1_code, code_index, code_values)

    token_pages = Gather (present_0_token, block_table)
    token_flat = Reshape (token_pages, flat)
    tokens = Cast <to = 7> (token_flat)
    code_pages = Gather (present_1_code, block_table)
    code_turned = Transpose <perm = [0, 2, 1, 3]> (code_pages)
    code_flat = Reshape (code_turned, flat_rows)
    code_wide_read = Cast <to = 7> (code_flat)
    codes = Gather <axis = 1> (code_wide_read, zero)
    places_read = Gather <axis = 1> (code_wide_read, one)

    token_shape = Shape (tokens)
    capacity = Gather (token_shape, one)
    t = Range (zero, capacity, one)
    t7 = Mod (t, seven)
    weight = Add (t7, one)
    weighted = Mul (tokens, weight)
    t251 = Mod (t, places)
    in_place = Equal (places_read, t251)
    placed = Where (in_place, codes, zero)

    position1 = Unsqueeze (position, last)
    visible = LessOrEqual (t, position1)
    weighted1 = Unsqueeze (weighted, second)
    placed1 = Unsqueeze (placed, second)
    h_terms = Where (visible, weighted1, zero)
    g_terms = Where (visible, placed1, zero)
    h_all = ReduceSum <keepdims = 0> (h_terms, last)
    g_all = ReduceSum <keepdims = 0> (g_terms, last)
    h = GatherElements <axis = 1> (h_all, logit_index)
    g = GatherElements <axis = 1> (g_all, logit_index)
    h1 = Unsqueeze (h, last)
    g1 = Unsqueeze (g, last)
    v = Range (zero, vocab, one)
    v_h = Sub (v, h1)
    v_g = Sub (v, g1)
    from_h = Mod (v_h, vocab)
    from_g = Mod (v_g, vocab)
    float_h = Cast <to = 1> (from_h)
    float_g = Cast <to = 1> (from_g)
    part_h = Mul (float_h, quarter)
    part_g = Mul (float_g, eighth)
    logits = Add (part_h, part_g)
}
"""


def toy_logits(tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """What the model must say after these tokens: [VOCAB]."""
    h = sum((t % 7 + 1) * x for t, x in enumerate(tokens))
    g = sum(x % 256 for x in tokens)
    v = np.arange(VOCAB)
    return (-((v - h) % VOCAB) / 4 - ((v - g) % VOCAB) / 8).astype(np.float32)


def toy_model(text: str = GRAPH) -> onnx.ModelProto:
    """The graph, with the dots in its names that onnx's text format does not allow."""
    model = onnx.parser.parse_model(text)
    names = {old: old.replace("_", ".") for old in ("cache_0_token", "cache_1_code")} | {
        old: old.replace("_", ".") for old in ("present_0_token", "present_1_code")
    }
    for value in [*model.graph.input, *model.graph.output]:
        value.name = names.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    onnx.checker.check_model(model, full_check=True)
    return model


def toy_tokenizer() -> Tokenizer:
    """Byte-level BPE: id = byte for the 256 bytes, two special tokens, five merges."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {chr(byte): byte for byte in printable}
    spelling |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    assert set(alphabet) == set(spelling)
    vocab = spelling | {"<bos>": BOS, "<eos>": EOS}
    vocab |= {pair: 258 + index for index, pair in enumerate(MERGES)}
    tokenizer = Tokenizer(models.BPE(vocab, [(pair[0], pair[1]) for pair in MERGES]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<bos>", "<eos>")])
    return tokenizer


def toy_manifest(folder: Path) -> Manifest:
    """The manifest of the files in a folder."""
    parts = (
        CachePartInfo(name="token", dtype="float32", page_shape=[64, 1]),
        CachePartInfo(name="code", dtype="uint8", page_shape=[2, 64]),
    )
    return Manifest(
        version=1,
        producer="tests",
        model=ModelInfo(
            model_type="toy",
            parameters=1,
            vocab_size=VOCAB,
            hidden_size=1,
            num_hidden_layers=2,
            num_attention_heads=1,
            q_lora_rank=None,
            kv_lora_rank=1,
            qk_nope_head_dim=1,
            qk_rope_head_dim=1,
            v_head_dim=1,
            max_position_embeddings=CONTEXT,
            bos_token_id=BOS,
            eos_token_ids=[EOS],
        ),
        graph=GraphInfo(path="model.onnx", backend="onnx", lowering="test", opset=21),
        cache=CacheInfo(
            page_tokens=64, layers=[LayerCache(format="toy", parts=[part]) for part in parts]
        ),
        recipe={},
        files=[
            describe_file(folder, path.name)
            for path in sorted(folder.iterdir())
            if path.name != "manifest.json"
        ],
    )


@dataclass(frozen=True)
class Toy:
    """The bundle and what it must compute."""

    path: Path

    def load(
        self, *, max_tokens: int | None = None, prefill_chunk: int = 512, threads: int = 1
    ) -> Engine:
        """An engine that keeps to one thread."""
        return load(
            self.path,
            max_tokens=max_tokens,
            prefill_chunk=prefill_chunk,
            threads=threads,
            spin=False,
        )

    def logits(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """`toy_logits`, within reach of tests, which cannot import this file."""
        return toy_logits(tokens)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The `count` most likely tokens after a prompt, one after another."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(toy_logits(tokens).argmax()))
        return tokens[len(prompt) :]

    def seal(self) -> None:
        """Write the manifest anew, after files were changed."""
        write_manifest(self.path, toy_manifest(self.path))

    def fail_above(self, limit: int, expression: str) -> None:
        """Let the graph fail when `expression` of its inputs, an int64, is above the limit."""
        model = toy_model()
        probe = onnx.parser.parse_graph(
            f"""
            probe (int64[B, S] input_ids, int64[B] past_lengths) => (float at_probe)
            <int64[1] probe_shape = {{{limit + 1}}}, float probe_zero = {{0}}>
            {{
                probe_index = {expression}
                probe_table = Expand (probe_zero, probe_shape)
                at_probe = Gather (probe_table, probe_index)
            }}
            """
        )
        model.graph.node[-1].output[0] = "logits_before"
        model.graph.initializer.extend(probe.initializer)
        model.graph.node.extend(probe.node)
        model.graph.node.append(
            onnx.helper.make_node("Add", ["logits_before", "at_probe"], ["logits"])
        )
        onnx.save(model, self.path / "model.onnx")
        self.seal()


def write_toy(folder: Path) -> Toy:
    """Make the bundle in an empty folder."""
    onnx.save(toy_model(), folder / "model.onnx")
    toy_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": true}'
    )
    toy = Toy(folder)
    toy.seal()
    return toy


SCRIPTED = """
<ir_version: 10, opset_import: ["" : 21]>
scripted (
    int64[B, S] input_ids, int64[B] past_lengths, int64[B] new_lengths, int64[B, M] block_table,
    int64[B, L] logit_index, float[P, 64, 1] cache_0_token, uint8[P, 2, 64] cache_1_code
) => (
    float[B, L, 263] logits, float[P, 64, 1] present_0_token, uint8[P, 2, 64] present_1_code
)
<
    int64[1] second = {1}, int64 vocab = {263}, float[2] off_and_on = {0, 1},
    int64[1000] script = {SCRIPT}
>
{
    past = Unsqueeze (past_lengths, second)
    position = Add (past, logit_index)
    next = Gather (script, position)
    logits = OneHot (next, vocab, off_and_on)
    present_0_token = Identity (cache_0_token)
    present_1_code = Identity (cache_1_code)
}
"""


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Sequence[int]], Engine]:
    """An engine whose model, after a prompt of the length, says these tokens and then zeros."""
    folder = tmp_path_factory.mktemp("scripted")
    toy = write_toy(folder)

    def engine(prompt_length: int, tokens: Sequence[int]) -> Engine:
        script = [0] * (prompt_length - 1) + list(tokens)
        script += [0] * (CONTEXT - len(script))
        onnx.save(
            toy_model(SCRIPTED.replace("SCRIPT}", ", ".join(map(str, script)) + "}")),
            folder / "model.onnx",
        )
        toy.seal()
        return toy.load()

    return engine


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The bundle; not to be changed."""
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def own_toy(tmp_path: Path) -> Toy:
    """A bundle that the test may damage."""
    return write_toy(tmp_path)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-mla with an int4 cache; not to be changed."""
    root = tmp_path_factory.mktemp("tiny")
    source = shutil.copytree(tiny_mla, root / "source")
    config = json.loads((source / "config.json").read_text())
    config["mla_deploy"] = {"version": 1, "cache_format": "int4"}
    (source / "config.json").write_text(json.dumps(config))
    return export_onnx(source, root / "bundle").bundle


@pytest.fixture(scope="session")
def toy_engine(toy: Toy) -> Engine:
    """A loaded engine that tests share; they close their sessions."""
    return toy.load()


@pytest.fixture
def one_torch_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """For oracles of many small products, which threads only slow down. Those of tests on a GPU
    are larger, and keep theirs."""
    if request.node.get_closest_marker("gpu"):
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", params=["emulation", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    """Where CUDA kernels run."""
    return Machine(build_emulation(), "cpu") if request.param == "emulation" else gpu_machine()
