"""The tokenizer: ids, text that arrives token by token, and chat templates."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as HfTokenizer

from mla_deploy.errors import TokenizerError, UsageError
from mla_deploy.tokenizer import CHAT_TEMPLATE, GENERATION_CONFIG, TOKENIZER_CONFIG, Tokenizer

BOS, EOS = 0, 1
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def byte_level(words: Sequence[str] = ("Ã©", "th", "Ġthe", "âĤ¬a")) -> HfTokenizer:
    """Ids 2 to 257 are single bytes; the words (in bytes, one character a byte) follow."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, *words]
    tokenizer = HfTokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    )
    return tokenizer


def sentencepiece(words: Sequence[str] = ("▁", "a", "b", "▁a", "▁▁", "é", "<0xZZ>")) -> HfTokenizer:
    """As Llama's: ids 2 to 257 are the bytes <0x00> to <0xFF>."""
    tokens = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = HfTokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "▁")], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    )
    return tokenizer


def save(
    folder: Path,
    tokenizer: HfTokenizer | None = None,
    files: dict[str, object] | None = None,
    **config: object,
) -> Path:
    """A model's folder: the tokenizer, its config, and other files (text, bytes or JSON)."""
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", **config}
    for name, content in {TOKENIZER_CONFIG: config, **(files or {})}.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text, encoding="utf-8")
    return folder


def opened(tokenizer: HfTokenizer) -> Tokenizer:
    return Tokenizer(tokenizer, {"bos_token": "<s>", "eos_token": "</s>"}, {}, {}, Path("test"))


BYTE_LEVEL = byte_level(), opened(byte_level())
SENTENCEPIECE = sentencepiece(), opened(sentencepiece())
BYTES_BY_ID = {i: BYTE_LEVEL[1].token_bytes(i) for i in range(2, 258)}
ID_BY_BYTE = {data[0]: i for i, data in BYTES_BY_ID.items()}


# ---- decoding ------------------------------------------------------------------------------


def test_every_byte_has_a_token() -> None:
    assert sorted(BYTES_BY_ID.values()) == [bytes([byte]) for byte in range(256)]
    assert SENTENCEPIECE[1].token_bytes(2 + 0xE2) == b"\xe2"
    assert SENTENCEPIECE[1].token_bytes(264) == b"<0xZZ>"


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(-3, 270), max_size=40))
def test_byte_level_text_is_that_of_the_library(ids: list[int]) -> None:
    reference, ours = BYTE_LEVEL
    known = [i for i in ids if i >= 0]
    assert ours.decode(ids) == reference.decode(known)
    assert ours.decode(ids, skip_special_tokens=False) == reference.decode(
        known, skip_special_tokens=False
    )


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(258, 270), st.integers(0, 0x7F)), max_size=40))
def test_sentencepiece_text_is_that_of_the_library(ids: list[int]) -> None:
    reference, ours = SENTENCEPIECE
    assert ours.decode(ids) == reference.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
def test_byte_fallback_text_comes_back(text: str) -> None:
    reference, ours = SENTENCEPIECE
    ids = reference.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == reference.decode(ids) == text.replace("▁", " ")


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=40) | st.text(max_size=15).map(str.encode))
def test_a_stream_never_shows_half_a_character_nor_waits_for_longer(data: bytes) -> None:
    """After each byte, what was shown is all that can be known of it."""
    decoder = BYTE_LEVEL[1].stream()
    shown = ""
    for at, byte in enumerate(data, 1):
        shown += decoder.push(ID_BY_BYTE[byte])
        so_far = data[:at]
        # The longest beginning of a character at the end is all that may be missing.
        missing = max(
            (n for n in range(1, 4) if n <= at and is_begun_character(so_far[at - n :])), default=0
        )
        assert shown == so_far[: at - missing].decode("utf-8", errors="replace")
    assert shown + decoder.finish() == data.decode("utf-8", errors="replace")


def is_begun_character(data: bytes) -> bool:
    """Whether more bytes can make the data one character, and it is not one yet."""

    def is_one(candidate: bytes) -> bool:
        try:
            # Python's decoder waits for the third byte of a surrogate before it refuses it.
            return len(candidate.decode("utf-8", errors="surrogatepass")) == 1
        except UnicodeDecodeError:
            return False

    if is_one(data):
        return False
    ends = (b"\x80", b"\x90", b"\xa0", b"\xbf")  # cover every range of a second byte
    tails = [first + b"\x80" * more for first in ends for more in range(3)]
    return any(is_one(data + tail) for tail in tails)


def test_a_character_comes_with_the_token_that_completes_it() -> None:
    decoder = SENTENCEPIECE[1].stream()
    ids = [261, *(2 + byte for byte in "€".encode()), 2 + 0xE2, 260]
    assert [decoder.push(i) for i in ids] == ["a", "", "", "€", "", "\ufffdb"]
    assert decoder.finish() == ""


def test_one_space_at_the_start_goes_as_sentencepiece_put_it_there() -> None:
    reference, ours = SENTENCEPIECE
    for ids in ([258], [258, 261], [262, 260], [0, 261], [2 + 0x20, 260], [260, 261]):
        assert ours.decode(ids) == reference.decode(ids)


def test_metaspace_decoders_are_known() -> None:
    tokenizer = sentencepiece()
    tokenizer.decoder = decoders.Metaspace()
    ids = tokenizer.encode("a b a").ids
    assert opened(tokenizer).decode(ids) == tokenizer.decode(ids)


def test_an_unknown_decoder_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="decoder") as caught:
        opened(tokenizer)
    assert "WordPiece" in str(caught.value.found)
    with pytest.raises(TokenizerError, match="decoder"):
        opened(HfTokenizer(models.BPE({"<s>": 0, "</s>": 1}, [])))


# ---- encoding and special tokens -----------------------------------------------------------


@pytest.mark.parametrize("add_eos", [None, False, True])
@pytest.mark.parametrize("add_bos", [None, False, True])
@pytest.mark.parametrize("in_file", [False, True])
def test_a_flag_wins_over_the_post_processor(
    tmp_path: Path, in_file: bool, add_bos: bool | None, add_eos: bool | None
) -> None:
    tokenizer = byte_level()
    if in_file:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    ours = Tokenizer.open(save(tmp_path, tokenizer, add_bos_token=add_bos, add_eos_token=add_eos))
    bare = tokenizer.encode("a b", add_special_tokens=False).ids
    before = [BOS] if (in_file if add_bos is None else add_bos) else []
    after = [EOS] if (in_file if add_eos is None else add_eos) else []
    assert ours.encode("a b") == before + bare + after
    assert ours.encode("") == before + after
    assert ours.encode("a b", add_special_tokens=False) == bare
    if add_bos is None and add_eos is None:
        transformers = pytest.importorskip("transformers")
        reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        assert ours.encode("a b") == reference("a b")["input_ids"]


def test_a_flag_for_a_token_without_name_adds_nothing(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(save(tmp_path, bos_token=None, add_bos_token=True))
    assert tokenizer.encode("a") == byte_level().encode("a").ids


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [
        ({}, (EOS,)),
        ({"eos_token_id": 7}, (EOS, 7)),
        ({"eos_token_id": [9, EOS, 7]}, (EOS, 9, 7)),
        ({"eos_token_id": None}, (EOS,)),
    ],
)
def test_all_end_tokens_count(
    tmp_path: Path, generation_config: object, expected: tuple[int, ...]
) -> None:
    tokenizer = Tokenizer.open(save(tmp_path, files={GENERATION_CONFIG: generation_config}))
    assert tokenizer.eos_token_ids == expected
    assert tokenizer.bos_token_id == BOS


def test_special_tokens_may_be_objects_or_missing(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(
        save(tmp_path, bos_token={"content": "<s>", "__type": "AddedToken"}, eos_token=None)
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (BOS, ())


def test_a_text_is_neither_cut_nor_filled_up(tmp_path: Path) -> None:
    expected = byte_level().encode("abcdef").ids
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20, pad_id=1)
    assert Tokenizer.open(save(tmp_path, tokenizer)).encode("abcdef") == expected


def test_a_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(TokenizerError, match="Unicode"):
        BYTE_LEVEL[1].encode("a\ud800")


# ---- broken files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b"[" * 100_000),
        (
            "tokenizer.json",
            b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":["b c"]}}',
        ),
        (TOKENIZER_CONFIG, b"{"),
        (TOKENIZER_CONFIG, b"[]"),
        (TOKENIZER_CONFIG, b"\xff"),
        (TOKENIZER_CONFIG, b"[" * 100_000),
        (TOKENIZER_CONFIG, b'{"a": ' + b"1" * 10_000 + b"}"),
        (TOKENIZER_CONFIG, b'{"bos_token": "<unheard of>"}'),
        (GENERATION_CONFIG, b'{"eos_token_id": "</s>"}'),
        (GENERATION_CONFIG, b'{"eos_token_id": [-1]}'),
        (GENERATION_CONFIG, b'{"eos_token_id": true}'),
        (GENERATION_CONFIG, b'{"eos_token_id": [1, 2147483648]}'),
        (GENERATION_CONFIG, b'{"eos_token_id": 1' + b"0" * 30 + b"}"),
        (GENERATION_CONFIG, b'{"eos_token_id": 1.0}'),
        (CHAT_TEMPLATE, b"\xff"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name):
        Tokenizer.open(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer") as caught:
        Tokenizer.open(tmp_path)
    assert "tokenizer.json" in str(caught.value)


# ---- chat templates ------------------------------------------------------------------------

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "Hi <b>'there'</b> & \"you\" é"}],
    "system": [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "1+1?\n"},
        {"role": "assistant", "content": "<think>easy</think>2"},
        {"role": "user", "content": "and 2+2?"},
    ],
    "tool": [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "look", "arguments": {"at": "Köln <&>"}}}
            ],
        },
        {"role": "tool", "name": "look", "content": "rain"},
    ],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look <out> & 'see' é",
            "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
        },
    }
]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("prompt", [False, True], ids=["closed", "prompt"])
def test_templates_of_real_models_render_as_in_transformers(
    shared: Path,
    tmp_path: Path,
    conversation: str,
    tools: list[dict[str, Any]] | None,
    prompt: bool,
) -> None:
    transformers = pytest.importorskip("transformers")
    messages = CONVERSATIONS[conversation]
    templates = sorted((shared / "data/tokenizers/chat_templates").glob("*.jinja"))
    assert len(templates) >= 6
    rendered = 0
    for template in templates:
        save(tmp_path, files={CHAT_TEMPLATE: template.read_text(encoding="utf-8")})
        reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
        ours = Tokenizer.open(tmp_path)
        options: dict[str, Any] = {"add_generation_prompt": prompt, "tools": tools}
        try:
            expected = reference.apply_chat_template(messages, tokenize=False, **options)
        except Exception:
            with pytest.raises(TokenizerError, match="chat template"):
                ours.render_chat(messages, **options)
            continue
        rendered += 1
        assert ours.render_chat(messages, **options) == expected, template.name
        ids = reference.apply_chat_template(messages, return_dict=False, **options)
        assert ours.encode_chat(messages, **options) == ids, template.name
    assert rendered >= 3


@pytest.mark.parametrize(
    "template",
    [
        "{{ {'b': '<é>', 'a': [1, none]} | tojson }}",
        "{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true, ensure_ascii=true) }}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
        "{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "a\n  {% if true %}\n  b\n  {% endif %}\nc\n",
        "{% set ns = namespace(x=1) %}{% set ns.x = ns.x + 1 %}{{ ns.x }}",
        "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ tools is none }}|{{ documents }}",
        "{% generation %}said{% set x = 1 %}{% endgeneration %}{{ x }}!",
        "{{ strftime_now('%Y') }}",
        "{{ messages[0].content.upper().strip()[::-1] }}{{ extra.deep }}",
    ],
)
def test_what_templates_may_use_works_as_in_transformers(tmp_path: Path, template: str) -> None:
    transformers = pytest.importorskip("transformers")
    save(tmp_path, files={CHAT_TEMPLATE: template})
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    messages, extra = [{"role": "user", "content": " Hi "}], {"deep": 1}
    assert Tokenizer.open(tmp_path).render_chat(
        messages, extra=extra
    ) == reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, extra=extra
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ messages|map(attribute='__class__')|join }}",
        "{{ messages['__class__'] }}",
    ],
)
def test_what_a_sandbox_hides_is_empty(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.open(save(tmp_path, chat_template=template))
    assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == ""


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].system('true') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
        "{{ '{0.__class__.__mro__[1]}'.format('').x.y }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% for x in range(10**12) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.name.x }}",
        "{{ 'x' * (1 << 60) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ undefined.attribute }}",
        "{{ raise_exception('roles must alternate') }}",
        "{% for %}",
        "{{",
        "{{ 1 | nofilter }}",
        "{" * 3000,
        "{{ " + "(" * 3000,
    ],
)
def test_a_template_that_misbehaves_is_one_clear_error(tmp_path: Path, template: str) -> None:
    tokenizer = Tokenizer.open(save(tmp_path, chat_template=template))
    with pytest.raises(TokenizerError, match="chat template of"):
        tokenizer.render_chat([{"role": "user", "content": "Hi"}])


def test_a_template_does_not_change_the_conversation(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(save(tmp_path, chat_template=TEMPLATE))
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.render_chat(messages) == "[user]Hi"
    assert messages == [{"role": "user", "content": "Hi"}]


def test_only_json_values_reach_a_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(save(tmp_path, chat_template=TEMPLATE))
    with pytest.raises(UsageError, match="JSON"):
        tokenizer.render_chat([{"role": "user", "content": object()}])
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(UsageError, match="JSON"):
        tokenizer.render_chat([{"role": "user", "content": endless}])


def test_the_file_wins_over_the_config_and_names_are_followed(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools: {{ tools | length }}"},
    ]
    tokenizer = Tokenizer.open(save(tmp_path, chat_template=named))
    assert tokenizer.render_chat([]) == "plain"
    assert tokenizer.render_chat([], tools=TOOLS) == "tools: 1"
    (tmp_path / CHAT_TEMPLATE).write_text("from the file")
    assert Tokenizer.open(tmp_path).render_chat([]) == "from the file"


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    tokenizer = Tokenizer.open(save(tmp_path))
    assert not tokenizer.has_chat_template
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.render_chat([{"role": "user", "content": "Hi"}])


# ---- a real tokenizer ----------------------------------------------------------------------


def test_deepseeks_tokenizer_agrees_with_transformers(shared: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared / "data/tokenizers/deepseek-llm-100k-hf"
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.open(folder)
    assert (ours.bos_token_id, ours.eos_token_ids) == (100000, (100001,))
    texts = [
        "",
        "Hello, world!",
        " naïve café\n\n\t x",
        "你好 世界 😀👩‍👩‍👧",
        "def f(x):\n    return 1",
        "ø ÷",
    ]
    for text in texts:
        ids = ours.encode(text)
        assert ids == reference(text)["input_ids"]
        assert ours.decode(ids) == reference.decode(ids)
    generator = random.Random(0)
    for _ in range(200):
        ids = generator.choices(range(100_016), k=generator.randrange(30))
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("model", ["stories260K", "babyllama105", "tiny-mla"])
def test_tokenizers_of_small_models_agree_with_transformers(shared: Path, model: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = shared / "data/models" / model
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.open(folder)
    for text in ("Once upon a time", "  two  spaces ", "a\nb", "Zoë €5"):
        ids = ours.encode(text)
        assert ids == reference(text)["input_ids"]
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)
