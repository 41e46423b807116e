"""The greedy allocation: against all allocations of small problems."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mla_deploy.cache import cache_record
from mla_deploy.errors import UsageError
from mla_deploy.quant.allocate import Choice, allocate, cheapest, decide, steps

costs_and_losses = st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=4)
problems = st.lists(costs_and_losses, min_size=1, max_size=4)


def items_of(problem: list[list[tuple[int, float]]]) -> list[list[Choice]]:
    return [[Choice("x", cost, loss) for cost, loss in choices] for choices in problem]


@settings(deadline=None)
@given(problem=problems, slack=st.integers(0, 100))
def test_it_fits_the_budget_and_no_single_change_that_fits_is_better(
    problem: list[list[tuple[int, float]]], slack: int
) -> None:
    items = items_of(problem)
    budget = cheapest(items).cost + slack
    found = allocate(items, budget)
    assert found.cost <= budget
    assert found.cost == sum(c[i].cost for c, i in zip(items, found.chosen, strict=True))
    for at, choices in enumerate(items):
        now = choices[found.chosen[at]]
        for other in choices:
            extra = other.cost - now.cost
            assert other.loss >= now.loss or extra < 0 or found.cost + extra > budget


def test_it_finds_the_best_of_all_where_every_step_costs_the_same() -> None:
    losses = [[0.9, 0.3, 0.1], [0.5, 0.4, 0.35], [0.2, 0.05, 0.01]]
    items = [[Choice(str(i), 10 * (i + 1), x) for i, x in enumerate(row)] for row in losses]
    for budget in range(30, 95, 5):
        best = min(
            sum(c[i].loss for c, i in zip(items, chosen, strict=True))
            for chosen in itertools.product(range(3), repeat=3)
            if sum(c[i].cost for c, i in zip(items, chosen, strict=True)) <= budget
        )
        assert allocate(items, budget).loss == pytest.approx(best)


def test_the_way_rises_in_cost_and_falls_in_loss() -> None:
    items = [[Choice("a", 1, 1.0), Choice("b", 2, 0.5), Choice("c", 4, 0.0)]] * 3
    way = steps(items)
    assert [one.cost for one in way] == sorted({one.cost for one in way})
    assert [one.loss for one in way] == sorted({one.loss for one in way}, reverse=True)
    assert way[-1].loss == 0


def test_a_budget_below_the_minimum_says_the_minimum() -> None:
    items = [[Choice("a", 232, 1.0), Choice("b", 360, 0.1)]] * 4
    with pytest.raises(UsageError, match="budget is below") as error:
        allocate(items, 4 * 231)
    assert error.value.found == "231 bytes"
    assert error.value.allowed is not None
    assert error.value.allowed.startswith("232 bytes")


@pytest.mark.parametrize(
    ("budget", "format_at_least"), [(232, "int2"), (300, "int3"), (400, "int4")]
)
def test_budgets_of_a_real_geometry(budget: int, format_at_least: str) -> None:
    """Rank 512, rope 64, 27 layers whose sensitivity falls; losses fall fourfold a bit."""
    names = ("int2", "int3", "int4", "int4-g32", "int8", "fp16")
    losses = (0.5, 0.12, 0.03, 0.02, 1e-4, 1e-6)
    sizes = [cache_record(name).bytes_per_token(512, 64) for name in names]
    items = [
        [Choice(n, c, x / (1 + layer)) for n, c, x in zip(names, sizes, losses, strict=True)]
        for layer in range(27)
    ]
    found = allocate(items, budget * 27)
    assert found.cost <= budget * 27
    uniform = names.index(format_at_least)
    assert found.loss <= sum(choices[uniform].loss for choices in items)
    if budget > 232:
        assert found.loss < sum(choices[uniform].loss for choices in items)
        assert len(set(found.chosen)) > 1


def test_what_is_measured_together_decides_among_what_fits() -> None:
    items = [[Choice("small", 2, 1.0), Choice("large", 4, 0.5)]] * 2
    losses = {(1, 0): 0.9, (0, 1): 0.9, (0, 0): 0.8, (1, 1): 0.1}

    def measure(allocations: Sequence[Sequence[int]]) -> list[float]:
        return [losses[tuple(one)] for one in allocations]

    chosen, points = decide(items, 6, 2, measure)
    assert chosen == (0, 0)  # not the sum's (1, 0), nor the best of all, which costs 8
    assert {(one.name, one.size) for one in points if one.is_measured} >= {
        ("small", 2),
        ("large", 4),
    }
    assert decide(items, 8, 2, measure)[0] == (1, 1)
