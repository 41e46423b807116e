"""Conversations: turns, the cache between them, and what is forgotten."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.host_engine import host_graph

from mla_deploy.bundle import Bundle
from mla_deploy.errors import OutputError, SessionError, TokenizerError
from mla_deploy.exporters.tensorrt.export import TensorRtOptions, export_tensorrt
from mla_deploy.runtime import Cancellation, Conversation, Engine, GenerationOptions
from mla_deploy.runtime.tensorrt import TensorRtEngine

if TYPE_CHECKING:
    from tests.runtime.conftest import Toy

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + TEMPLATE
)
FIVE = GenerationOptions(max_tokens=5)


@pytest.fixture
def chatty(own_toy: Toy) -> Toy:
    """The toy with a chat template."""
    return with_template(own_toy, TEMPLATE)


def with_template(toy: Toy, template: str) -> Toy:
    (toy.path / "chat_template.jinja").write_text(template)
    toy.seal()
    return toy


def say(conversation: Conversation, text: str) -> list[int]:
    """The tokens of the answer."""
    return [event.token for event in conversation.send(text)]


def prompt_of(engine: Engine, messages: list[dict[str, str]], text: str) -> list[int]:
    return engine.tokenizer.encode_chat([*messages, {"role": "user", "content": text}])


def test_every_turn_gives_what_a_fresh_session_gives(chatty: Toy) -> None:
    engine = chatty.load()
    with Conversation(engine, FIVE, system="Short.") as talk:
        for text in ("one", "two, then", "three"):
            prompt = prompt_of(engine, talk.messages, text)
            before = talk.tokens
            assert say(talk, text) == chatty.greedy(prompt, 5)
            took = talk.result.statistics if talk.result else None
            assert took is not None
            assert took.prompt_tokens == len(prompt)
            # All that was there, but for where the tokens of an answer are not those of its text.
            assert before - 5 <= took.reused_tokens <= before
            assert (took.reused_tokens > 0) == (talk.turns > 1)
        roles = [message["role"] for message in talk.messages]
        assert roles == ["system"] + ["user", "assistant"] * 3
        assert talk.turns == 3


def test_the_text_of_an_answer_becomes_its_message(chatty: Toy) -> None:
    with Conversation(chatty.load(), FIVE) as talk:
        answer = talk.send("one")
        text = "".join(event.text for event in answer)
        assert talk.messages[-1] == {"role": "assistant", "content": text}
        assert talk.result == answer.result
        assert answer.result.text == text


def test_undo_is_as_if_it_was_never_asked(chatty: Toy) -> None:
    engine = chatty.load()
    with Conversation(engine, FIVE) as talk, Conversation(engine, FIVE) as other:
        assert say(talk, "one") == say(other, "one")
        before = talk.messages
        say(talk, "something long that is not asked there")
        used = engine.free_tokens
        assert talk.undo()
        assert talk.messages == before
        assert talk.result is None
        assert talk.tokens < len(prompt_of(engine, before, "?")), "the start of a turn may stay"
        assert engine.free_tokens >= used
        assert say(talk, "two") == say(other, "two")
        assert talk.messages == other.messages
        assert talk.result is not None
        assert other.result is not None
        reused = [one.result.statistics.reused_tokens for one in (talk, other) if one.result]
        assert reused[0] >= reused[1] > 0


def test_undo_to_the_beginning_and_beyond(chatty: Toy) -> None:
    engine = chatty.load()
    with Conversation(engine, FIVE, system="Short.") as talk:
        first = say(talk, "one")
        say(talk, "two")
        assert [talk.undo(), talk.undo(), talk.undo()] == [True, True, False]
        assert [message["role"] for message in talk.messages] == ["system"]
        assert say(talk, "one") == first
        took = talk.result.statistics if talk.result else None
        assert took is not None
        assert took.reused_tokens == len(engine.tokenizer.encode("[system]Short.[user]")) - 1


def test_clear_keeps_what_the_model_is_told_first(chatty: Toy) -> None:
    engine = chatty.load()
    with Conversation(engine, FIVE, system="Short.") as talk:
        first = say(talk, "one")
        say(talk, "two")
        talk.clear()
        assert talk.messages == [{"role": "system", "content": "Short."}]
        assert say(talk, "one") == first


def test_options_may_change_between_turns(chatty: Toy) -> None:
    with Conversation(chatty.load(), FIVE) as talk:
        say(talk, "one")
        talk.options = GenerationOptions(max_tokens=2)
        assert len(say(talk, "two")) == 2


def test_a_cancelled_answer_is_kept_as_far_as_it_came(chatty: Toy) -> None:
    engine = chatty.load()
    with Conversation(engine, GenerationOptions(max_tokens=400)) as talk:
        cancellation = Cancellation()
        seen = []
        answer = talk.send("one", cancellation=cancellation)
        for event in answer:
            seen.append(event)
            if len(seen) == 3:
                cancellation.request()
        assert answer.result.finish_reason == "cancelled"
        assert len(seen) == 3
        said = "".join(event.text for event in seen)
        assert said
        assert talk.messages[-1] == {"role": "assistant", "content": said}
        talk.options = FIVE
        assert say(talk, "two") == chatty.greedy(prompt_of(engine, talk.messages[:-2], "two"), 5)


def test_a_turn_that_is_cancelled_before_its_first_word_is_forgotten(chatty: Toy) -> None:
    engine = chatty.load()
    with Conversation(engine, FIVE) as talk:
        say(talk, "one")
        before = talk.messages
        cancellation = Cancellation()
        cancellation.request()
        assert list(talk.send("two", cancellation=cancellation)) == []
        assert talk.messages == before
        assert say(talk, "two") == chatty.greedy(prompt_of(engine, before, "two"), 5)


def test_an_answer_that_is_left_ends_with_the_next_turn(chatty: Toy) -> None:
    engine = chatty.load()
    with Conversation(engine, FIVE) as talk:
        left = talk.send("one")
        text = next(left).text + next(left).text
        assert talk.result == left.result
        tokens = say(talk, "two")
        assert list(left) == []
        assert talk.messages[1] == {"role": "assistant", "content": text}
        assert tokens == chatty.greedy(prompt_of(engine, talk.messages[:2], "two"), 5)
        talk.send("three")  # and not one word
        assert talk.undo()
        assert talk.turns == 2, "only the turn without an answer is forgotten"


def test_an_interrupt_keeps_the_conversation(chatty: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    with Conversation(chatty.load(), FIVE) as talk:
        answer = talk.send("one")
        text = next(answer).text

        def interrupt(*_: object) -> Any:
            raise KeyboardInterrupt

        with monkeypatch.context() as broken:
            broken.setattr("mla_deploy.runtime.generation.Generation.__next__", interrupt)
            with pytest.raises(KeyboardInterrupt):
                next(answer)
        assert talk.messages[-1]["content"] == text
        assert len(say(talk, "two")) == 5


def test_a_turn_beyond_the_context_is_refused_and_changes_nothing(chatty: Toy) -> None:
    engine = chatty.load()
    with Conversation(engine, FIVE) as talk:
        say(talk, "one")
        before = talk.messages
        with pytest.raises(SessionError, match="does not fit into the context") as error:
            talk.send("x" * 1000)
        assert error.value.allowed is not None
        assert error.value.allowed.startswith("1,000")
        assert "undo" in (error.value.hint or "")
        assert talk.messages == before
        assert say(talk, "two") == chatty.greedy(prompt_of(engine, before, "two"), 5)


def test_a_context_that_fills_up_cuts_the_answer_and_says_so(chatty: Toy) -> None:
    with Conversation(chatty.load(), GenerationOptions(max_tokens=100)) as talk:
        say(talk, "x" * 500)
        assert not talk.is_nearly_full
        say(talk, "x" * 200)
        assert talk.is_nearly_full
        answer = talk.send("x" * 30)
        for _ in answer:
            pass
        assert answer.result.finish_reason == "context"
        assert talk.room == 0
        assert talk.messages[-1]["content"] == answer.result.text
        with pytest.raises(SessionError, match="does not fit"):
            talk.send("more")
        talk.undo()
        talk.undo()
        assert len(say(talk, "two")) == 100


def test_a_bundle_without_a_template_names_the_command_for_plain_text(own_toy: Toy) -> None:
    with pytest.raises(TokenizerError, match="cannot hold a conversation") as error:
        Conversation(own_toy.load())
    assert "mla-deploy run" in (error.value.hint or "")


def test_a_role_that_the_template_refuses_is_refused_at_once(own_toy: Toy) -> None:
    engine = with_template(own_toy, STRICT).load()
    with pytest.raises(TokenizerError, match="does not accept") as error:
        Conversation(engine, system="Short.")
    assert error.value.found == "no system role"
    assert engine.free_tokens == engine.capacity_tokens
    with Conversation(engine, FIVE) as talk:
        say(talk, "one")
        say(talk, "two")
        assert talk.undo()
        assert talk.undo()
        assert len(say(talk, "one")) == 5


def test_a_saved_conversation_goes_on_without_computing_it_again(
    chatty: Toy, tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    with Conversation(chatty.load(), FIVE, system="Short.") as talk:
        say(talk, "one")
        say(talk, "two")
        talk.save(file)
        messages, held = talk.messages, talk.tokens
        third = say(talk, "three")
    engine = chatty.load()
    with Conversation(engine, FIVE) as other:
        say(other, "x" * 960)  # all pages: room is made before
        assert other.load(file)
        assert (other.messages, other.tokens, other.turns) == (messages, held, 2)
        assert other.result is None
        assert say(other, "three") == third
        took = other.result.statistics if other.result else None
        assert took is not None
        assert took.reused_tokens >= held - 5
    assert engine.free_tokens == engine.capacity_tokens, "no session was left open"


def test_without_its_cache_a_conversation_is_computed_again(chatty: Toy, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    with Conversation(chatty.load(), FIVE) as talk:
        say(talk, "one")
        talk.save(file)
        (tmp_path / "talk.json.session").unlink()
        second = say(talk, "two")
        assert not talk.load(file)
        assert talk.tokens == 0
        assert say(talk, "two") == second


def test_a_cache_of_other_messages_does_no_harm(chatty: Toy, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    with Conversation(chatty.load(), FIVE) as talk:
        say(talk, "one")
        talk.save(file)
        second = say(talk, "two")
        talk.clear()
        say(talk, "another matter")
        talk.save(tmp_path / "other.json")
        (tmp_path / "other.json.session").replace(tmp_path / "talk.json.session")
        assert talk.load(file)
        assert say(talk, "two") == second


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"{",
        b"[]",
        b"\xff",
        b'{"format": "mla-deploy-conversation", "version": 2, "messages": []}',
        b'{"format": "other", "version": 1, "messages": []}',
        b'{"format": "mla-deploy-conversation", "version": 1}',
        b'{"format": "mla-deploy-conversation", "version": 1, "messages": [{"role": "user"}]}',
        b'{"format": "mla-deploy-conversation", "version": 1, "messages": '
        b'[{"role": "user", "content": 1}]}',
    ],
)
def test_a_file_that_is_no_conversation_is_refused(
    content: bytes | None, chatty: Toy, tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    if content is not None:
        file.write_bytes(content)
    with Conversation(chatty.load(), FIVE) as talk:
        say(talk, "one")
        before = talk.messages
        with pytest.raises(SessionError, match=r"talk\.json") as error:
            talk.load(file)
        assert error.value.hint
        assert talk.messages == before
        assert len(say(talk, "two")) == 5


def test_a_damaged_cache_is_refused_and_the_conversation_goes_on(
    chatty: Toy, tmp_path: Path
) -> None:
    file, cache = tmp_path / "talk.json", tmp_path / "talk.json.session"
    with Conversation(chatty.load(), FIVE) as talk:
        say(talk, "one")
        talk.save(file)
        cache.write_bytes(cache.read_bytes()[:-1] + b"x")
        say(talk, "two")
        before = talk.messages
        with pytest.raises(SessionError, match="cannot be used") as error:
            talk.load(file)
        assert str(cache) in (error.value.hint or "")
        assert talk.messages == before
        assert len(say(talk, "three")) == 5


def test_a_file_that_cannot_be_written_leaves_nothing(chatty: Toy, tmp_path: Path) -> None:
    with Conversation(chatty.load(), FIVE) as talk:
        say(talk, "one")
        with pytest.raises(OutputError):
            talk.save(tmp_path / "no" / "such" / "folder")
        (tmp_path / "taken").mkdir()
        with pytest.raises(OutputError):
            talk.save(tmp_path / "taken")
        assert not (tmp_path / ".taken.partial").exists()


def test_a_closed_conversation_says_so(chatty: Toy) -> None:
    engine = chatty.load()
    talk = Conversation(engine, FIVE)
    answer = talk.send("one")
    next(answer)
    talk.close()
    talk.close()
    assert list(answer) == []
    assert engine.free_tokens == engine.capacity_tokens
    uses: list[Callable[[], object]] = [lambda: talk.send("two"), talk.clear, talk.undo]
    for use in uses:
        with pytest.raises(SessionError, match="closed"):
            use()


@pytest.fixture(scope="module")
def on_tensorrt(tiny_mla: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """tiny-mla with a chat template, as a graph for TensorRT on a stand-in for the GPU."""
    folder = tmp_path_factory.mktemp("tensorrt")
    source = shutil.copytree(tiny_mla, folder / "source")
    (source / "chat_template.jinja").write_text(TEMPLATE)
    options = TensorRtOptions(onnx_only=True, dtype="fp32", max_tokens=128, prefill_chunk=32)
    bundle = export_tensorrt(source, folder / "bundle", options).bundle
    return TensorRtEngine(Bundle.open(bundle), host_graph(bundle))


def test_an_engine_of_tensorrt_holds_a_conversation_too(
    on_tensorrt: Engine, tmp_path: Path
) -> None:
    with Conversation(on_tensorrt, FIVE) as talk:
        first = say(talk, "one")
        second = say(talk, "two")
        took = talk.result.statistics if talk.result else None
        assert took is not None
        assert took.reused_tokens > 0
        assert talk.undo()
        assert say(talk, "two") == second
        talk.save(tmp_path / "talk.json")
        talk.clear()
        assert not talk.load(tmp_path / "talk.json")  # whose cache is computed again
        assert say(talk, "three")
        assert talk.turns == 3
        talk.clear()
        cancellation = Cancellation()
        answer = talk.send("one", cancellation=cancellation)
        assert next(answer).token == first[0]
        cancellation.request()
        assert list(answer) == []
        assert [message["role"] for message in talk.messages] == ["user", "assistant"]
    assert [file.name for file in tmp_path.iterdir()] == ["talk.json"]
