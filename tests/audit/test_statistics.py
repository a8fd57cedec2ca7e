"""Membership, properties and epsilon on numbers whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from wardround.audit.epsilon import (
    Claim,
    audit_mechanism,
    gaussian_epsilon,
    gaussian_mechanism,
    one_run_bound,
)
from wardround.audit.membership import auc, clopper_pearson, infer_membership, judge, lira_scores, rmia_scores
from wardround.audit.properties import probe
from wardround.errors import StudyError


def test_membership_of_separated_scores_is_certain() -> None:
    found = judge("a", np.arange(200.0) + 1000, np.arange(200.0))
    assert found.auc == 1.0
    assert [(at.tpr, at.resolved) for at in found.at] == [(1.0, True), (1.0, False)]


def test_membership_of_equal_scores_is_chance() -> None:
    random = np.random.default_rng(0)
    found = judge("a", random.standard_normal(4000), random.standard_normal(4000))
    assert found.auc == pytest.approx(0.5, abs=0.02)
    for at in found.at:
        assert at.low <= at.fpr * 1.7
        assert at.resolved


def test_the_rate_at_a_false_alarm_is_that_of_gaussians() -> None:
    random = np.random.default_rng(1)
    found = judge("a", random.standard_normal(4000) + 1.0, random.standard_normal(4000))
    assert found.at[0].tpr == pytest.approx(norm.sf(norm.isf(0.01) - 1.0), abs=0.03)


def test_the_curve_rises_to_the_corner() -> None:
    found = judge("a", np.array([1.0, 2.0, 2.0]), np.array([0.0, 2.0]))
    assert found.curve == ((0.5, 2 / 3), (0.5, 1.0), (1.0, 1.0))


def test_references_see_through_hard_examples() -> None:
    """Losses vary more by example than by membership: the threshold is blind, and references are not."""
    random = np.random.default_rng(2)
    n = 400
    difficulty = random.uniform(1.0, 5.0, n)
    member = np.arange(n) < n // 2
    losses = difficulty - 0.3 * member + 0.02 * random.standard_normal(n)
    half = random.random((2, n)) < 0.5
    knows = np.concatenate([half, ~half])
    references = difficulty - 0.3 * knows + 0.02 * random.standard_normal((4, n))
    blind = auc(-losses[member], -losses[~member])
    assert blind < 0.65
    for scores in (lira_scores(losses, references, knows), rmia_scores(losses, references, knows, ~member)):
        assert auc(scores[member], scores[~member]) > 0.95


def test_the_exact_interval_covers() -> None:
    low, high = clopper_pearson(5, 10)
    assert (low, high) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert clopper_pearson(0, 10)[0] == 0.0
    assert clopper_pearson(10, 10)[1] == 1.0


def test_a_probe_finds_what_is_there_and_nothing_else() -> None:
    random = np.random.default_rng(3)
    patients = np.repeat(np.arange(20), 3)
    has = random.random(60) < 0.5
    gradients = random.standard_normal((60, 40))
    nothing = probe("p", gradients, has, patients)
    gradients[:, 7] += 4.0 * has
    found = probe("p", gradients, has, patients)
    assert nothing is not None
    assert found is not None
    assert nothing.low < 0.5 < nothing.high
    assert found.auc > 0.8
    assert found.low > 0.5
    assert probe("p", gradients, np.ones(60, bool), patients) is None


# Epsilon -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mu", "epsilon"), [(1.0, 4.3772), (0.5, 1.9931)])
def test_the_gaussian_mechanism_costs_what_is_published(mu: float, epsilon: float) -> None:
    assert gaussian_epsilon(mu, 1e-5) == pytest.approx(epsilon, abs=1e-3)


def test_a_bound_of_all_right_is_that_of_the_binomial() -> None:
    """Without delta, v = r right guesses refute epsilon while (e^eps / (1 + e^eps))^r < 0.05."""
    rate = 0.05 ** (1 / 100)
    assert one_run_bound(1000, 100, 100, 0.0) == pytest.approx(math.log(rate / (1 - rate)), abs=1e-6)
    assert one_run_bound(1000, 100, 50, 0.0) == 0.0


@given(st.integers(1, 300), st.data())
def test_more_right_guesses_never_lower_the_bound(guesses: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, guesses - 1))
    assert one_run_bound(400, guesses, right, 1e-6) <= one_run_bound(400, guesses, right + 1, 1e-6) + 1e-9


@pytest.mark.parametrize(
    "claim",
    [
        Claim(1.0),
        Claim(2.0, clip=0.3, steps=10),
        pytest.param(Claim(1.0, steps=5, sampling=0.5), marks=pytest.mark.slow),
    ],
)
def test_correct_privacy_keeps_its_claim(claim: Claim) -> None:
    gradients = 0.1 * np.random.default_rng(4).standard_normal((16, 2000))
    for seed in range(3):
        bound = audit_mechanism(claim, gaussian_mechanism(claim), gradients, canaries=500, seed=seed)
        assert bound.holds
        assert "<= claimed upper bound" in str(bound)
    assert bound.lower > 0.0


def test_a_clip_that_does_not_bind_is_caught() -> None:
    claim = Claim(4.0)

    def unclipped(contributions: np.ndarray, random: np.random.Generator) -> np.ndarray:
        noise = claim.noise_multiplier * claim.clip * random.standard_normal(contributions.shape[1])
        return np.asarray(contributions.sum(axis=0) + noise)

    bound = audit_mechanism(claim, unclipped, np.zeros((4, 2000)), canaries=500)
    assert not bound.holds
    assert bound.lower > bound.claimed
    assert " > claimed upper bound" in str(bound)


def test_claims_that_describe_nothing_are_refused() -> None:
    for wrong in ({"noise_multiplier": 0.0}, {"noise_multiplier": 1.0, "sampling": 2.0}):
        with pytest.raises(StudyError):
            Claim(**wrong)


@pytest.mark.parametrize(("learned", "works"), [(0.3, True), (0.0, False)])
def test_a_membership_attack_says_whether_it_works_on_models_that_are_known(learned: float, works: bool) -> None:
    """References that learned nothing make attacks that find nothing, and must not pass for safety."""
    random = np.random.default_rng(3)
    n = 200
    difficulty = random.uniform(1.0, 5.0, n)
    member = np.arange(n) < n // 2
    half = random.random((2, n)) < 0.5
    knows = np.concatenate([half, ~half])
    references = difficulty - learned * knows + 0.02 * random.standard_normal((4, n))
    losses = difficulty - learned * member + 0.02 * random.standard_normal(n)
    found = {each.attack: each for each in infer_membership(losses, member, references, knows)}
    assert list(found) == ["loss threshold", "LiRA, 4 references", "RMIA, 4 references"]
    for name in ("LiRA, 4 references", "RMIA, 4 references"):
        assert found[name].works is works
        assert found[name].to_json()["works"] is works
    assert not found["loss threshold"].works
    # Two references leave none to try the others on, and none leave the loss alone.
    assert [each.control for each in infer_membership(losses, member, references[:2], knows[:2])] == [None] * 3
    (alone,) = infer_membership(losses, member, references[:0], knows[:0])
    assert (alone.attack, alone.control, alone.works) == ("loss threshold", None, False)
