"""Which format each part of a model gets under a budget of bytes.

Every item (the cache or the matrices of a layer) has choices with a cost and a loss, the KL
divergence that this choice alone causes. Losses are taken to add up, which small ones do to first
order. The allocation starts from the cheapest choice everywhere and takes, one after the other, the
upgrade that lowers the loss most for a byte, as long as it fits. `decide` then measures it against
the uniform formats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mla_deploy.errors import UsageError

GREEDY = "greedy"


@dataclass(frozen=True)
class Choice:
    """One way to store an item."""

    name: str
    cost: int
    """Bytes."""
    loss: float
    """KL divergence that it causes alone, in nats."""


@dataclass(frozen=True)
class Allocation:
    """A choice for every item: its index, and what they come to together."""

    chosen: tuple[int, ...]
    cost: int
    loss: float


@dataclass(frozen=True)
class Point:
    """An allocation, for the plot of size against divergence."""

    name: str
    """A format that all items have, or `greedy`."""
    size: float
    """On average, in the unit of the budget."""
    kl: float
    is_measured: bool
    """With all items at once; otherwise it is the sum of the items measured one by one."""


Measure = Callable[[Sequence[Sequence[int]]], Sequence[float]]
"""Allocations, a choice for every item each, to their KL divergence with all items at once."""


def decide(
    items: Sequence[Sequence[Choice]], budget: float, unit: float, measure: Measure
) -> tuple[tuple[int, ...], tuple[Point, ...]]:
    """The best of the greedy allocation and the uniform formats that fit the budget.

    Small losses add up, large ones do not quite: what is measured jointly has the last word.

    Args:
        items: the same formats in each, by name and in the same order.
        budget: bytes for all items together.
        unit: bytes in one unit of a point's size.

    Returns:
        The choice of every item, and all points for the plot.

    Raises:
        UsageError: as `allocate`.
    """
    candidates = {
        GREEDY: allocate(items, budget).chosen,
        **{one.name: (at,) * len(items) for at, one in enumerate(items[0])},
    }
    found = dict(zip(candidates, measure(list(candidates.values())), strict=True))
    costs = {name: _allocation(items, chosen).cost for name, chosen in candidates.items()}
    best = min((name for name in candidates if costs[name] <= budget), key=lambda n: found[n])
    points = [Point(name, costs[name] / unit, found[name], True) for name in candidates]
    points += [Point(GREEDY, one.cost / unit, one.loss, False) for one in steps(items)]
    return candidates[best], tuple(points)


def cheapest(items: Sequence[Sequence[Choice]]) -> Allocation:
    """The allocation of the least bytes, and among equals of the least loss."""
    return _allocation(
        items,
        [
            min(range(len(choices)), key=lambda i: (choices[i].cost, choices[i].loss))
            for choices in items
        ],
    )


def allocate(items: Sequence[Sequence[Choice]], budget: float) -> Allocation:
    """The greedy allocation.

    Args:
        items: the choices of each.
        budget: bytes for all items together.

    Raises:
        UsageError: even the cheapest choices are above it; says what they need.
    """
    return steps(items, budget)[-1]


def steps(items: Sequence[Sequence[Choice]], budget: float = float("inf")) -> list[Allocation]:
    """All allocations on the way from the cheapest to the budget, in rising order of cost.

    Raises:
        UsageError: as `allocate`.
    """
    current = cheapest(items)
    if current.cost > budget:
        raise UsageError(
            "the budget is below what the smallest formats take",
            found=f"{budget / len(items):g} bytes",
            allowed=f"{current.cost / len(items):g} bytes or more, on average",
        )
    found = [current]
    while (better := _best_upgrade(items, current, budget)) is not None:
        current = better
        found.append(current)
    return found


def _best_upgrade(
    items: Sequence[Sequence[Choice]], current: Allocation, budget: float
) -> Allocation | None:
    best: tuple[float, int, int] | None = None
    for item, choices in enumerate(items):
        now = choices[current.chosen[item]]
        for index, choice in enumerate(choices):
            extra, gain = choice.cost - now.cost, now.loss - choice.loss
            if gain <= 0 or extra < 0 or current.cost + extra > budget:
                continue
            slope = gain / extra if extra else float("inf")
            if best is None or slope > best[0]:
                best = slope, item, index
    if best is None:
        return None
    chosen = list(current.chosen)
    chosen[best[1]] = best[2]
    return _allocation(items, chosen)


def _allocation(items: Sequence[Sequence[Choice]], chosen: Sequence[int]) -> Allocation:
    picked = [choices[index] for choices, index in zip(items, chosen, strict=True)]
    return Allocation(
        tuple(chosen), sum(choice.cost for choice in picked), sum(choice.loss for choice in picked)
    )
