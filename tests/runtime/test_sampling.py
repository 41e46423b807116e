"""Sampling, against the definitions and against transformers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sampling import dense, distribution

from mla_deploy.errors import SessionError, UsageError
from mla_deploy.runtime import GenerationOptions, Sampler

Probabilities = npt.NDArray[np.float64]

# Multiples of 1/8, so that ties occur and float32 is exact.
LOGITS = st.lists(st.integers(-40, 40), min_size=1, max_size=60).map(
    lambda eighths: np.array(eighths, dtype=np.float32) / 8
)
OPTIONS = st.builds(
    GenerationOptions,
    temperature=st.sampled_from([0.25, 0.7, 1.0, 2.0]),
    top_k=st.integers(0, 70),
    top_p=st.sampled_from([0.05, 0.3, 0.55, 0.83, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
)


def expected(logits: npt.NDArray[np.float32], options: GenerationOptions) -> Probabilities:
    choices = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    return dense(distribution(logits, **choices), len(logits))


def found(options: GenerationOptions, logits: npt.NDArray[np.float32]) -> Probabilities:
    return dense(Sampler(options, len(logits)).distribution(logits), len(logits))


@settings(max_examples=300, deadline=None)
@given(logits=LOGITS, options=OPTIONS)
def test_the_distribution_is_that_of_the_definition(
    logits: npt.NDArray[np.float32], options: GenerationOptions
) -> None:
    np.testing.assert_allclose(found(options, logits), expected(logits, options), atol=1e-12)


@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.9, 0.999999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
def test_top_p_of_a_large_vocabulary_is_exact(top_p: float, spread: float) -> None:
    """The nucleus is larger than the first look for some of these, and smaller for others."""
    logits = (np.random.default_rng(1).normal(size=50_000) * spread).astype(np.float32)
    options = GenerationOptions(temperature=1.0, top_p=top_p)
    np.testing.assert_allclose(found(options, logits), expected(logits, options), atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    options=OPTIONS,
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
    occurred=st.sets(st.integers(0, 39)),
)
def test_the_distribution_is_that_of_transformers(
    seed: int, options: GenerationOptions, penalty: float, occurred: set[int]
) -> None:
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(seed).normal(size=40).astype(np.float32) * 2
    chain = [processors.RepetitionPenaltyLogitsProcessor(penalty)] if occurred else []
    chain.append(processors.TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        chain.append(processors.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        chain.append(processors.TopPLogitsWarper(options.top_p))
    if options.min_p:
        chain.append(processors.MinPLogitsWarper(options.min_p))
    scores = torch.from_numpy(logits)[None]
    for step in chain:
        scores = step(torch.tensor([sorted(occurred)], dtype=torch.long), scores)

    options = GenerationOptions(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=penalty,
    )
    sampler = Sampler(options, 40)
    sampler.observe(occurred)
    ours = dense(sampler.distribution(logits), 40)
    np.testing.assert_allclose(ours, scores[0].softmax(-1).numpy(), atol=1e-5)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    options = GenerationOptions(temperature=0.7, top_p=0.95, seed=3)
    logits = np.random.default_rng(0).normal(size=20).astype(np.float32) * 2
    sampler = Sampler(options, 20)
    draws = 20_000
    counts = np.bincount([sampler.pick(logits) for _ in range(draws)], minlength=20)
    likely = expected(logits, options)
    assert (counts[likely == 0] == 0).all()
    deviation = np.sqrt(draws * likely * (1 - likely))
    assert (abs(counts - draws * likely) <= 5 * deviation).all()


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others() -> None:
    logits = np.zeros(1000, dtype=np.float32)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(GenerationOptions(temperature=1.0, seed=seed), 1000)
        return [sampler.pick(logits) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals() -> None:
    logits = np.array([1, 5, 5, 2], dtype=np.float32)
    assert Sampler(GenerationOptions(temperature=0), 4).pick(logits) == 1


def test_the_penalty_comes_before_the_temperature_and_counts_once() -> None:
    sampler = Sampler(GenerationOptions(repetition_penalty=2.0), 3)
    logits = np.array([3.0, 1.9, -1.0], dtype=np.float32)
    assert sampler.pick(logits) == 0
    sampler.observe([0, 0, 2])  # 1.5, 1.9, -2
    assert sampler.pick(logits) == 1
    assert logits.tolist() == [3.0, np.float32(1.9), -1.0], "the caller's logits stay"


def test_top_p_counts_what_top_k_left() -> None:
    """0.4, 0.3, 0.2, 0.1: of the first two alone, the first has 0.57."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1])).astype(np.float32)
    options = GenerationOptions(temperature=1.0, top_k=2, top_p=0.5)
    assert found(options, logits).tolist() == [1, 0, 0, 0]


def test_impossible_tokens_are_never_drawn() -> None:
    logits = np.full(50, -np.inf, dtype=np.float32)
    logits[[3, 40]] = 0
    for options in (
        GenerationOptions(temperature=1.0, seed=0),
        GenerationOptions(temperature=1.0, top_k=10, top_p=0.99, min_p=0.1, seed=0),
    ):
        sampler = Sampler(options, 50)
        assert {sampler.pick(logits) for _ in range(100)} == {3, 40}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    sampler = Sampler(GenerationOptions(temperature=temperature), 3)
    with pytest.raises(SessionError, match="finite"):
        sampler.pick(np.array([0, bad, 1], dtype=np.float32))
    with pytest.raises(SessionError, match="finite"):
        sampler.pick(np.full(3, -np.inf, dtype=np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 2.0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "warm"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", 1 << 64),
        ("top_k", 1 << 32),
        ("max_tokens", 1 << 32),
        ("stop", "text"),
        ("stop", ("",)),
        ("stop", (1,)),
    ],
)
def test_options_out_of_range_are_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{name} is out of range"):
        GenerationOptions(**{name: value})  # type: ignore[arg-type]
