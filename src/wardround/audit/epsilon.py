"""A lower bound of the privacy loss from one run, by canaries: what an attack measured against what was claimed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import brentq
from scipy.stats import binom, norm

from wardround.errors import MissingExtra, StudyError
from wardround.learning.private_training import clipped

Floats = npt.NDArray[np.float64]
# (contributions (n, d) of one step, random) -> what the step lets out (d,)
Mechanism = Callable[[Floats, np.random.Generator], Floats]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Claim:
    """What a site claims: DP-SGD with a clip, noise of `noise_multiplier * clip`, steps and Poisson sampling.

    `epsilon` is the claimed upper bound at `delta`; without one it is computed from the rest. Raises StudyError for
    values that describe no such mechanism.
    """

    noise_multiplier: float
    clip: float = 1.0
    steps: int = 1
    sampling: float = 1.0
    delta: float = 1e-5
    epsilon: float | None = None

    def __post_init__(self) -> None:
        if self.noise_multiplier <= 0 or self.clip <= 0 or self.steps < 1:
            raise StudyError("privacy needs a noise multiplier and a clip above 0 and at least one step")
        if not 0 < self.sampling <= 1 or not 0 < self.delta < 1:
            raise StudyError("privacy needs a sampling rate in (0, 1] and a delta between 0 and 1")

    @property
    def upper(self) -> float:
        """The claimed epsilon."""
        if self.epsilon is not None:
            return self.epsilon
        if self.sampling == 1.0:
            return gaussian_epsilon(math.sqrt(self.steps) / self.noise_multiplier, self.delta)
        return _sampled_epsilon(self)


def claim_of(noise_multiplier: float | None, options: Mapping[str, Any]) -> Claim | None:
    """A claim from the options of the command, by their names; None stands for one that was not given.

    Nothing where nothing is claimed; raises StudyError for half a claim, which no attack could refute.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if noise_multiplier is not None:
        return Claim(noise_multiplier, **{name.removeprefix("dp-"): value for name, value in given.items()})
    if given:
        name = next(iter(given))
        raise StudyError(f"--{name}: a claim needs --noise-multiplier; give it too, or leave --{name} out")
    return None


@dataclass(frozen=True)
class Bound:
    """What was measured: `correct` of `guesses` right about `canaries`, so epsilon is at least `lower` (95 %)."""

    claimed: float
    lower: float
    delta: float
    canaries: int
    guesses: int
    correct: int

    @property
    def holds(self) -> bool:
        """Whether the claim survived the attack."""
        return self.lower <= self.claimed

    def __str__(self) -> str:
        sign = "<=" if self.holds else ">"
        return (
            f"lower bound {self.lower:.3f} (this attack, 95 %) {sign} claimed upper bound {self.claimed:.3f} "
            f"(delta {self.delta:g}; {self.correct} of {self.guesses} guesses right, {self.canaries} canaries)"
        )

    def to_json(self) -> dict[str, Any]:
        """As audit.json holds it."""
        return {**asdict(self), "holds": self.holds, "sentence": str(self)}


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon of a Gaussian mechanism of sensitivity `mu` times its noise (Balle & Wang, ICML 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        tail = norm.logcdf(-mu / 2 - epsilon / mu) + epsilon
        return float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(tail)) - delta

    if excess(0.0) <= 0:
        return 0.0
    top = 1.0
    while excess(top) > 0:
        top *= 2
    return float(brentq(excess, 0.0, top, xtol=1e-9))


def _sampled_epsilon(claim: Claim) -> float:
    try:
        import dp_accounting
        from dp_accounting.pld import PLDAccountant
    except ImportError:
        raise MissingExtra("the epsilon of Poisson sampling", "privacy") from None
    step = dp_accounting.PoissonSampledDpEvent(claim.sampling, dp_accounting.GaussianDpEvent(claim.noise_multiplier))
    return float(PLDAccountant().compose(step, claim.steps).get_epsilon(claim.delta))


def one_run_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest epsilon that so many right guesses refute (Steinke, Nasr & Jagielski, NeurIPS 2023, theorem 5.2).

    Each of `canaries` was included by a fair coin; the attack guessed `guesses` of the coins and abstained on the
    rest. Returns 0 where nothing is refuted.
    """
    if not refuted(canaries, guesses, correct, 0.0, delta, confidence):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(canaries, guesses, correct, high, delta, confidence) and high < 64:
        low, high = high, 2 * high
    for _ in range(50):
        middle = 0.5 * (low + high)
        if refuted(canaries, guesses, correct, middle, delta, confidence):
            low = middle
        else:
            high = middle
    return low


def refuted(canaries: int, guesses: int, correct: int, epsilon: float, delta: float, confidence: float) -> bool:
    """Whether (epsilon, delta) makes so many right guesses less likely than 1 - confidence."""
    rate = 1.0 / (1.0 + math.exp(-epsilon))
    likely = float(binom.sf(correct - 1, guesses, rate))
    # The delta term: at most 2 m delta max_i P[correct - i <= W < correct] / i.
    window = np.cumsum(binom.pmf(correct - np.arange(1, correct + 1), guesses, rate))
    extra = float((window / np.arange(1, correct + 1)).max(initial=0.0))
    return likely + 2.0 * canaries * delta * extra < 1.0 - confidence


def gaussian_mechanism(claim: Claim) -> Mechanism:
    """DP-SGD as claimed: every contribution clipped as training clips it, summed, noise on the sum."""

    def step(contributions: Floats, random: np.random.Generator) -> Floats:
        total = np.zeros(contributions.shape[1])
        for contribution in contributions:
            total += clipped(torch.from_numpy(contribution), claim.clip).numpy()
        total += claim.noise_multiplier * claim.clip * random.standard_normal(contributions.shape[1])
        return total

    return step


def audit_mechanism(
    claim: Claim, mechanism: Mechanism, gradients: Floats, *, canaries: int = 1000, seed: int = 0
) -> Bound:
    """Plant canaries in every step of a mechanism, look at all it lets out, and guess which were there.

    gradients: (n, d), the real contributions beside them. Canaries are random directions of ten times the clip's norm,
    as many as the dimension allows to tell apart: a clip that does not bind shows. The surest sixth is guessed in, the
    least sure sixth out. Randomness is a simulation's, from `seed`.
    """
    random = np.random.default_rng(seed)
    dimension = gradients.shape[1]
    canaries = min(canaries, max(10, dimension // 4))
    planted = random.choice([-1.0, 1.0], (canaries, dimension)) / math.sqrt(dimension)
    included = random.random(canaries) < 0.5
    people = np.concatenate([gradients, 10.0 * claim.clip * planted[included]])
    total = np.zeros(dimension)
    for _ in range(claim.steps):
        sampled = people[random.random(len(people)) < claim.sampling]
        total += mechanism(sampled, random)
    scores = planted @ total
    order = np.argsort(scores)
    each = max(1, canaries // 6)
    correct = int(included[order[-each:]].sum() + (~included[order[:each]]).sum())
    lower = one_run_bound(canaries, 2 * each, correct, claim.delta)
    return Bound(claim.upper, lower, claim.delta, canaries, 2 * each, correct)
