"""Stop strings, whatever the pieces in which the text arrives."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mla_deploy.runtime.stopping import StopStrings

# Two letters, so that strings often match, and match themselves shifted.
TEXT = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """By the definition: the first end of a stop string; of those that end there the longest."""
    for end in range(len(text) + 1):
        sizes = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if sizes:
            return text[: end - max(sizes)], True
    return text, False


@given(text=TEXT, stops=STOPS, cuts=st.lists(st.integers(0, 30)))
def test_the_outcome_does_not_depend_on_the_pieces(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    filtered = StopStrings(stops)
    shown = "".join(filtered.push(text[a:b]) for a, b in itertools.pairwise(edges))
    assert (shown + filtered.finish(), filtered.stopped) == expected(text, stops)


@given(text=TEXT, stops=STOPS)
def test_no_more_is_held_back_than_could_become_a_stop_string(text: str, stops: list[str]) -> None:
    filtered = StopStrings(stops)
    shown = ""
    for at, character in enumerate(text, 1):
        shown += filtered.push(character)
        if filtered.stopped:
            break
        held = text[len(shown) : at]
        assert shown + held == text[:at]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def test_a_stop_string_is_found_across_pieces() -> None:
    filtered = StopStrings(["\nUser:"])
    assert [filtered.push(piece) for piece in ("Hi", " there\n", "Us", "er", ": x")] == [
        "Hi", " there", "", "", ""
    ]  # fmt: skip
    assert filtered.stopped
    assert filtered.push("more") == ""
    assert filtered.finish() == ""


def test_what_was_held_back_comes_when_it_is_no_stop_string() -> None:
    filtered = StopStrings(["</s>"])
    assert [filtered.push(piece) for piece in ("a<", "/s", "x</")] == ["a", "", "</sx"]
    assert filtered.finish() == "</"
