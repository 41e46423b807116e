"""The sampler behind the C ABI, against the definition and numpy's random numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from cpp.core_abi import AbiError, Api, load_api, sampling
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sampling import distribution, draws

# Multiples of 1/8, so that ties occur.
LOGITS = st.lists(st.integers(-40, 40), min_size=1, max_size=60).map(
    lambda eighths: np.array(eighths, dtype=np.float32) / 8
)
CHOICES = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.25, 0.7, 1.0, 2.0]),
        "top_k": st.integers(0, 70),
        "top_p": st.sampled_from([0.05, 0.3, 0.55, 0.83, 0.97, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.2, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
    }
)


@pytest.fixture(scope="module")
def api() -> Api:
    return load_api()


@settings(max_examples=400, deadline=None)
@given(logits=LOGITS, choices=CHOICES, data=st.data())
def test_the_distribution_is_that_of_the_definition(
    logits: npt.NDArray[np.float32], choices: dict[str, float], data: st.DataObject
) -> None:
    occurred = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=10))
    ids, probabilities = distribution(logits, **choices, occurred=occurred)
    sampler = load_api().sampler(sampling(**choices), len(logits))
    sampler.observe(occurred)
    found, found_probabilities = sampler.distribution(logits)
    sampler.destroy()
    assert found.tolist() == ids
    np.testing.assert_allclose(found_probabilities, probabilities, rtol=1e-12)


@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.9, 0.999999, 1.0])
@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [0, 300])
def test_a_large_vocabulary_is_cut_alike(api: Api, top_p: float, spread: float, top_k: int) -> None:
    """The nucleus is larger than the first look for some of these, and smaller for others."""
    logits = (np.random.default_rng(1).normal(size=50_000) * spread).astype(np.float32)
    choices = {"temperature": 1.0, "top_p": top_p, "top_k": top_k}
    ids, probabilities = distribution(logits, **choices)
    found, found_probabilities = api.sampler(sampling(**choices), 50_000).distribution(logits)
    assert found.tolist() == ids
    np.testing.assert_allclose(found_probabilities, probabilities, rtol=1e-11)


@pytest.mark.parametrize("seed", [0, 1, 7, 2**32 - 1, 2**32, 2**64 - 1])
def test_a_seed_draws_the_tokens_that_it_draws_in_numpy(api: Api, seed: int) -> None:
    logits = np.random.default_rng(5).normal(size=2000).astype(np.float32)
    choices = {"temperature": 1.3, "top_k": 1500, "min_p": 0.001}
    ours = api.sampler(sampling(**choices, seed=seed), 2000)
    theirs = draws(distribution(logits, **choices), seed, 200)  # type: ignore[arg-type]
    assert [ours.pick(logits) for _ in range(200)] == theirs


def test_without_a_seed_the_draws_differ(api: Api) -> None:
    logits = np.zeros(1000, dtype=np.float32)
    draws = []
    for _ in range(2):
        sampler = api.sampler(sampling(temperature=1.0), 1000)
        draws.append([sampler.pick(logits) for _ in range(20)])
    assert draws[0] != draws[1]


def test_greedy_takes_the_first_of_equals_after_the_penalty(api: Api) -> None:
    logits = np.array([3.0, 1.9, 1.9, -1.0], dtype=np.float32)
    sampler = api.sampler(sampling(repetition_penalty=2.0), 4)
    assert sampler.pick(logits) == 0
    sampler.observe([0, 0, 3])  # 1.5, 1.9, 1.9, -2
    assert sampler.pick(logits) == 1
    assert [part.tolist() for part in sampler.distribution(logits)] == [[1], [1.0]]
    assert api.sampler(None, 4).pick(logits) == 0


def test_impossible_tokens_are_never_drawn(api: Api) -> None:
    logits = np.full(50, -np.inf, dtype=np.float32)
    logits[[3, 40]] = 0
    for choices in ({}, {"top_k": 10, "top_p": 0.99, "min_p": 0.1}):
        sampler = api.sampler(sampling(temperature=1.0, seed=0, **choices), 50)
        assert {sampler.pick(logits) for _ in range(100)} == {3, 40}


@pytest.mark.parametrize("temperature", [1e-300, 1e-5, 1e300])
def test_extreme_temperatures_stay_finite(api: Api, temperature: float) -> None:
    logits = np.array([1.0, 1000.0, -1000.0, 999.0], dtype=np.float32)
    ids, probabilities = api.sampler(sampling(temperature=temperature), 4).distribution(logits)
    assert np.isfinite(probabilities).all()
    assert abs(probabilities.sum() - 1) < 1e-12
    if temperature < 1:
        assert ids[probabilities.argmax()] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(
    api: Api, bad: float, place: int, temperature: float
) -> None:
    logits = np.array([0, 1, 2], dtype=np.float32)
    logits[place] = bad
    sampler = api.sampler(sampling(temperature=temperature), 3)
    for broken in (logits, np.full(3, -np.inf, dtype=np.float32)):
        with pytest.raises(AbiError, match=r"MODEL_FAILED.*not finite"):
            sampler.pick(broken)
    assert sampler.pick(np.array([0, 900, 2], dtype=np.float32)) == 1


def test_a_sampler_knows_its_vocabulary(api: Api) -> None:
    sampler = api.sampler(None, 4)
    for ids in ([4], [-1], [0, 2**31 - 1]):
        with pytest.raises(AbiError, match="INVALID_ARGUMENT"):
            sampler.observe(ids)
    with pytest.raises(AbiError, match="INVALID_ARGUMENT"):
        sampler.pick(np.zeros(5, dtype=np.float32))
    with pytest.raises(AbiError, match="INVALID_ARGUMENT"):
        api.sampler(None, 0)
