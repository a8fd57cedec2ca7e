"""Robust means: known answers, what they stand, and that no site's place in the list matters."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from pydantic import ValidationError

from tests.examples import examples
from wardround.errors import Rejected, StudyError
from wardround.protection import robust
from wardround.protection.robust import Defence, Floats, aggregate, combine, gram, plan_of
from wardround.study.protection import Robust

RULES: tuple[robust.Rule, ...] = (*robust.LINEAR, *robust.COORDINATE)
ROBUST = tuple(rule for rule in RULES if rule != "mean")
MIXING: tuple[robust.Mixing, ...] = ("nearest_neighbour", "none")


def updates(seed: int, n: int = 11, d: int = 7) -> Floats:
    return np.random.default_rng(seed).standard_normal((n, d))


def gram_of(x: Floats) -> Floats:
    return gram([x], len(x))


def test_distances_are_those_of_the_definition() -> None:
    x = updates(0)
    expected = np.array([[((a - b) ** 2).sum() for b in x] for a in x])
    assert_allclose(robust.squared_distances(gram_of(x)), expected, atol=1e-12)


def test_a_gram_matrix_adds_up_over_chunks() -> None:
    x = updates(1, d=20)
    assert_allclose(gram([x[:, :3], x[:, 3:4], x[:, 4:]], len(x)), x @ x.T, atol=1e-12)


def test_nearest_neighbours_are_averaged() -> None:
    x = np.array([[0.0], [1.0], [3.0], [100.0]])
    mixed = robust.nearest_neighbour_mixing(gram_of(x), 1) @ x
    assert_allclose(mixed[:3], np.full((3, 1), 4.0 / 3.0))
    assert_allclose(mixed[3], (1.0 + 3.0 + 100.0) / 3.0)


def test_trimmed_mean_and_median_are_those_of_a_sorted_column() -> None:
    x = updates(2)
    middle = np.sort(x, axis=0)
    for f in range(6):
        value, shares = robust.trimmed_mean(x, f)
        assert_allclose(value, middle[f : 11 - f].mean(axis=0))
        assert_allclose(shares.sum(), 1.0)
    assert_allclose(robust.median(x)[0], np.median(x, axis=0))
    assert_allclose(robust.median(x[:10])[0], np.median(x[:10], axis=0))
    with pytest.raises(StudyError, match="at least 13"):
        robust.trimmed_mean(x, 6)


def test_krum_picks_what_brute_force_picks() -> None:
    x, f = updates(3), 3

    def score(i: int) -> float:
        return sum(sorted(((x[i] - x[j]) ** 2).sum() for j in range(11) if j != i)[: 11 - f - 2])

    ranked = sorted(range(11), key=score)
    assert int(robust.krum(gram_of(x), f).argmax()) == ranked[0]
    assert set(np.flatnonzero(robust.multi_krum(gram_of(x), f, keep=4))) == set(ranked[:4])
    with pytest.raises(StudyError, match="at least 13"):
        robust.krum(gram_of(x), 5)


def test_geometric_median_of_a_triangle_is_its_fermat_point() -> None:
    angles = np.array([0.0, 2.0, 4.0]) * np.pi / 3.0
    triangle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert_allclose(robust.geometric_median(gram_of(triangle)) @ triangle, 0.0, atol=1e-9)
    # On a line it is the median, wherever the far point lies.
    for far in (3.0, 1e6):
        line = np.array([[0.0], [1.0], [1.0], [2.0], [far]])
        assert_allclose(robust.geometric_median(gram_of(line)) @ line, 1.0, atol=0.1)


def test_geometric_median_is_lower_than_any_neighbour() -> None:
    x = updates(4, n=9, d=3)
    v = robust.geometric_median(gram_of(x)) @ x
    cost = np.linalg.norm(x - v, axis=1).sum()
    for step in itertools.product((-0.05, 0.05), repeat=3):
        assert cost < np.linalg.norm(x - v - np.array(step), axis=1).sum()


def test_dnc_finds_the_direction_of_the_singular_vector() -> None:
    x = updates(5)
    x[:2] += 4.0
    centred = x - x.mean(axis=0)
    direction = np.linalg.svd(centred)[2][0]
    out = np.argsort((centred @ direction) ** 2)[-3:]
    weights = robust.dnc(gram_of(x), 2)
    assert set(np.flatnonzero(weights == 0.0)) == set(out) >= {0, 1}


def test_centred_clipping_is_the_plain_mean_where_nothing_is_far() -> None:
    corners = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert_allclose(robust.centred_clipping(gram_of(corners)), 0.25)
    # One far point moves it by a step of the median distance over n, not by its own length.
    x = np.vstack([corners, [[1e6, 0.0]]])
    moved = robust.centred_clipping(gram_of(x)) @ x
    assert 0.0 < moved[0] < 1.0


@pytest.mark.parametrize("mixing", MIXING)
@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None, max_examples=examples(25))
@given(seed=st.integers(0, 2**32 - 1))
def test_the_order_of_sites_does_not_matter(rule: robust.Rule, mixing: robust.Mixing, seed: int) -> None:
    x = updates(seed)
    order = np.random.default_rng(seed).permutation(len(x))
    one, other = (aggregate(rows, Defence(rule, 3, mixing)) for rows in (x, x[order]))
    # Distances come from a Gram matrix: near 0 they are known to the root of a rounding error, and so are weights. A
    # weighted mean differs by what its weights do, and no more.
    assert_allclose(other.weights, one.weights[order], atol=float(np.sqrt(np.finfo(np.float64).eps)))
    moved = (other.weights - one.weights[order]) @ x[order] if rule in robust.LINEAR else 0.0
    assert_allclose(other.value - one.value, moved, atol=1e-9)
    assert_allclose(one.weights.sum(), 1.0)
    if rule in robust.LINEAR:
        assert_allclose(one.weights @ x, one.value, atol=1e-9)


@pytest.mark.parametrize("mixing", MIXING)
@pytest.mark.parametrize("rule", ROBUST)
@settings(deadline=None, max_examples=examples(40))
@given(
    seed=st.integers(0, 2**32 - 1),
    f=st.integers(1, 4),
    far=st.sampled_from([-1e9, -100.0, -3.0, 3.0, 100.0, 1e9]),
    gate=st.booleans(),
)
def test_a_minority_cannot_drag_the_mean_away(
    rule: robust.Rule, mixing: robust.Mixing, seed: int, f: int, far: float, gate: bool
) -> None:
    honest = updates(seed, n=11 - f)
    bad = far * (1.0 + np.abs(updates(seed + 1, n=f)))
    outcome = aggregate(np.vstack([bad, honest]), Defence(rule, f, mixing, gate or rule == "dnc"))
    spread = np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    assert np.linalg.norm(outcome.value - honest.mean(axis=0)) <= 3.0 * spread


def test_without_the_gate_dnc_keeps_a_lie_that_a_larger_one_hides() -> None:
    honest = updates(12, n=8)
    # The mean of all lies where the first one is, so that every honest update is farther from it.
    bad = np.vstack([np.full((1, 7), 1e6), np.full((1, 7), 9e6)])
    everything = np.vstack([bad, honest])
    without, gated = (aggregate(everything, Defence("dnc", 2, "none", gate)).value for gate in (False, True))
    assert np.abs(without).max() > 1e4
    assert np.abs(gated).max() < 10.0
    with pytest.raises(ValidationError, match="needs gate: true"):
        Robust(rule="dnc", gate=False)


def test_the_plain_mean_is_dragged_away() -> None:
    x = np.vstack([np.full((1, 7), 1e6), updates(6, n=10)])
    assert np.abs(aggregate(x, Defence("mean", 0, "none", gate=False)).value).min() > 1e4


@pytest.mark.parametrize("rule", ROBUST)
def test_numbers_that_are_none_never_get_in(rule: robust.Rule) -> None:
    x = updates(7)
    x[1], x[4, 2], x[5] = np.nan, np.inf, 1e200
    outcome, fewer = aggregate(x, Defence(rule, 3)), Defence(rule, min(3, robust.stands(rule, 8)))
    assert np.isfinite(outcome.value).all()
    assert list(np.flatnonzero(~outcome.kept)) == [1, 4, 5]
    assert_allclose(outcome.weights[[1, 4, 5]], 0.0)
    assert_allclose(outcome.value, aggregate(np.delete(x, [1, 4, 5], axis=0), fewer).value)


def test_the_gate_lets_short_updates_and_quiet_rounds_pass() -> None:
    assert list(robust.norm_gate(np.array([1.0, 0.0, 2.0, 3.9, 8.1, np.inf, np.nan]))) == [1, 1, 1, 1, 0, 0, 0]
    assert list(robust.norm_gate(np.array([0.0, 0.0, 0.0, 1.0]))) == [1, 1, 1, 1]


def test_too_few_updates_are_refused() -> None:
    with pytest.raises(Rejected, match="too few"):
        aggregate(updates(8, n=4), Defence("trimmed_mean", 2))
    with pytest.raises(Rejected, match="too few"):
        aggregate(np.full((3, 2), np.nan), Defence("median", 1))
    # Two of five are gated: what is left may hold none of the two malicious sites.
    x = updates(9, n=5)
    x[:2] *= 1e6
    assert aggregate(x, Defence("trimmed_mean", 2)).kept.sum() == 3


@pytest.mark.parametrize("rule", RULES)
def test_chunks_give_what_all_columns_give(rule: robust.Rule) -> None:
    x = updates(10, d=30)
    whole = aggregate(x, Defence(rule, 3))
    plan = plan_of(gram([x[:, :11], x[:, 11:]], len(x)), Defence(rule, 3))
    parts = [combine(plan, x[plan.kept][:, a:b]) for a, b in ((0, 11), (11, 30))]
    assert_allclose(np.concatenate([value for value, _ in parts]), whole.value, atol=1e-12)
    assert_allclose((parts[0][1] * 11 + parts[1][1] * 19) / 30, whole.weights[plan.kept], atol=1e-12)
