"""Updates of several base rounds as one mean: exact within a round, weighed by age, in any order of arrival."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wardround.errors import Rejected
from wardround.wire.message import HeldBody
from wardround.wire.random import public_generator
from wardround.wire.ring import ExactSum, Ring, levels
from wardround.wire.staleness import FRESH, Mixed, Part, mixed, multiplier
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import WEIGHT_BITS, Aggregate, Group, Layout, Metric, encode

SIZE = 3


def layout_of(ring_bits: int) -> Layout:
    tensors = (TensorInfo("w", "float32", (SIZE,)),)
    return Layout((Group("model", tensors, ring_bits),), (Metric("loss", 0.0, 8.0, 0.5),), 8, 4.0)


@dataclass(frozen=True)
class Sent:
    """An update of a base round: what it says, and its bytes."""

    base: int
    weight: float
    body: bytes


def sent(layout: Layout, scale: float, base: int, site: int, weight: float) -> Sent:
    random = public_generator(3, base, site)
    change = random.uniform(-1.2 * scale, 1.2 * scale, SIZE).astype(np.float32)
    chunks = encode(layout, {"model/w": scale}, {"model": weight}, {"model": {"w": change}}, {"loss": 1.5}, random)
    return Sent(base, weight, HeldBody.of(chunks).data)


def summed(layout: Layout, scale: float, bodies: Sequence[bytes]) -> Aggregate:
    total = ExactSum(layout.segments)
    for body in bodies:
        total.add(body, 0)
    return Aggregate(layout, total, {"model/w": scale})


def integers(layout: Layout, body: bytes) -> tuple[list[int], int]:
    """The elements and the weight's integer in one update's bytes."""
    size, ring = layout.segments[0]
    elements = Ring(ring.bits).signed(ring.unpack(body[:size]))[:SIZE]
    digits = np.frombuffer(body[size:], "<u4")
    return [int(n) for n in elements], layout.from_digits(digits)[1]


@given(
    ring_bits=st.sampled_from([16, 24, 32]),
    exponent=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    ages=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
)
def test_the_mean_is_that_of_the_integers_times_the_public_multipliers(
    ring_bits: int, exponent: float, ages: list[int], order: object
) -> None:
    layout, newest = layout_of(ring_bits), 7
    scales = {base: 0.1 * 1.7**base for base in range(newest + 1)}
    updates = [sent(layout, scales[newest - age], newest - age, n, 0.5 + n / 4) for n, age in enumerate(ages)]

    def mean_of(arrived: Sequence[Sent]) -> tuple[np.ndarray, float]:
        parts = []
        for base in sorted({update.base for update in arrived}):
            bodies = [update.body for update in arrived if update.base == base]
            parts.append(Part(multiplier(newest - base, exponent), summed(layout, scales[base], bodies)))
        found = mixed(layout, parts, {"model/w": scales[newest]})
        assert found.contributors == len(ages)
        assert found.metrics["loss"][0] == 1.5 * len(ages)
        assert found.peak("model", "w") * (1 + 1e-12) >= np.abs(found.total("model", "w")).max()
        return found.mean("model", "w"), found.weight("model")

    mean, weight = mean_of(updates)
    shuffled = list(updates)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    again, _ = mean_of(shuffled)
    assert mean.tobytes() == again.tobytes()
    top = levels(layout.bits_of(layout.groups[0]))
    numerators, largest, denominator = [Fraction(0)] * SIZE, [Fraction(0)] * SIZE, Fraction(0)
    for update in updates:
        elements, steps = integers(layout, update.body)
        times = multiplier(newest - update.base, exponent)
        for i, element in enumerate(elements):
            term = times * element * Fraction(scales[update.base]) / top
            numerators[i] += term
            largest[i] += abs(term)
        denominator += times * Fraction(steps, 1 << WEIGHT_BITS)
    assert weight == pytest.approx(float(denominator / FRESH * 4), rel=1e-15)
    # Two roundings for each base round, one for every addition and the division, each of half a unit at most.
    roundings = Fraction(3 * len(set(ages)) + 2, 1 << 53)
    for i in range(SIZE):
        exact = numerators[i] / denominator
        assert abs(Fraction(mean[i]) - exact) <= roundings * largest[i] / denominator


def test_fresh_updates_alone_are_the_plain_sum() -> None:
    layout = layout_of(24)
    bodies = [sent(layout, 0.3, 1, n, 0.5 + n).body for n in range(3)]
    plain = summed(layout, 0.3, bodies)
    assert mixed(layout, [Part(FRESH, plain)], {"model/w": 9.0}) is plain
    # So are they where the sum is looked at as one of parts: the multiplier is a power of two.
    alone = Mixed(layout, [Part(FRESH, plain)], plain.scales)
    assert alone.mean("model", "w").tobytes() == plain.mean("model", "w").tobytes()
    assert alone.weight("model") == plain.weight("model")
    assert alone.peak("model", "w") == plain.peak("model", "w")


def test_two_sites_by_hand() -> None:
    """A fresh update of 0.5 and one three rounds old of -1, weighed alike: (1 x 0.5 + 0.5 x -1) / 1.5 = 0."""
    layout = layout_of(32)

    def of(change: float, scale: float) -> Aggregate:
        tensors = {"model": {"w": np.full(SIZE, change, np.float32)}}
        chunks = encode(layout, {"model/w": scale}, {"model": 4.0}, tensors, {}, public_generator(0))
        return summed(layout, scale, [HeldBody.of(chunks).data])

    old = Part(multiplier(3, 0.5), of(-1.0, 2.0))
    assert old.multiplier == FRESH // 2
    found = mixed(layout, [old, Part(FRESH, of(0.5, 1.0))], {"model/w": 1.0})
    np.testing.assert_allclose(found.mean("model", "w"), 0.0, atol=1e-7)
    # (1 x 0.5 + 1 x -1) / 2 without weights by age.
    equal = mixed(layout, [Part(FRESH, of(-1.0, 2.0)), Part(FRESH, of(0.5, 1.0))], {"model/w": 1.0})
    np.testing.assert_allclose(equal.mean("model", "w"), -0.25, atol=1e-7)
    assert found.weight("model") == 6.0
    assert equal.weight("model") == 8.0


@pytest.mark.parametrize(
    ("age", "exponent", "expected"),
    [(0, 0.5, 65536), (1, 1.0, 32768), (3, 0.5, 32768), (9, 0.0, 65536), (2, 1.0, 21845)],
)
def test_multipliers_by_hand(age: int, exponent: float, expected: int) -> None:
    assert multiplier(age, exponent) == expected


def test_updates_without_weight_have_no_mean() -> None:
    layout = layout_of(32)
    empty = [summed(layout, 1.0, [sent(layout, 1.0, base, 0, 0.0).body]) for base in (1, 2)]
    found = mixed(layout, [Part(multiplier(1, 0.5), empty[0]), Part(FRESH, empty[1])], {"model/w": 1.0})
    with pytest.raises(Rejected, match="sum to zero"):
        found.mean("model", "w")
