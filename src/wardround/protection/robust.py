"""Robust means: aggregates that a minority of sites cannot move far, whatever it sends.

Updates are the rows of an (n, d) array, one a site. What a rule needs to know of them is small: the n x n Gram matrix
G = X X^T holds every norm and distance. So each rule takes two passes over the updates in chunks of columns, one for
G and one for the aggregate, and d never has to fit in memory:

    plan_of(gram(chunks), defence)   who is kept, how updates are mixed, and each site's weight where the rule is linear
    combine(plan, chunk)             the aggregate of one chunk of columns, and how much of each site is in it

`f` is the number of malicious sites a rule stands. Every function is equivariant: permuted sites give permuted weights
and the same aggregate. Sums run in the order of the rows, so the same rows give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from wardround.errors import Rejected, StudyError

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Rule = Literal["mean", "trimmed_mean", "median", "geometric_median", "krum", "multi_krum", "dnc", "centred_clipping"]
Mixing = Literal["nearest_neighbour", "none"]

# A site is gated when its update is this many times as long as the median one. Honest sites of the benchmark, with few
# cases and another mix of labels each, stay under three.
GATE = 4.0
WEISZFELD_STEPS = 32
CLIPPING_STEPS = 3
# Times the median distance. An update loses half its weight at twice that: hospitals of an unusual size or case mix
# stay within (benchmarks/robust.py), while f sites move the mean by no more than f / n of that radius in a step.
CLIP = 2.0
# Relative to the median distance: where an update lies on the geometric median itself, its weight would be infinite.
SMOOTHING = 1e-6
DNC_FACTOR = 1.5
TIE = 1e-12
# Beyond this a value is as good as infinite: the square of its update's norm might be.
LARGEST = 1e100


@dataclass(frozen=True)
class Defence:
    """A rule, the number of malicious sites it stands, and what comes before it."""

    rule: Rule = "centred_clipping"
    f: int = 1
    mixing: Mixing = "none"
    gate: bool = True


@dataclass(frozen=True)
class RobustPlan:
    """What the Gram matrix decides: `kept` (n,) the sites that pass the gate, `mixing` (m, m) over those m.

    `weights` (m,) of the mixed updates for a linear rule; `None` for a rule that looks at every coordinate.
    """

    defence: Defence
    f: int
    kept: Mask
    mixing: Floats
    weights: Floats | None


@dataclass(frozen=True)
class Outcome:
    """The aggregate (d,), each site's share in it (n,) summing to one, and who passed the gate (n,)."""

    value: Floats
    weights: Floats
    kept: Mask


def stands(rule: Rule, sites: int) -> int:
    """The largest f with which a rule of so many sites is defined: n >= 2f + 1, and n >= 2f + 3 for Krum."""
    return max(0, (sites - (3 if rule in ("krum", "multi_krum") else 1)) // 2)


# What comes before a rule --------------------------------------------------------------------------------------------


def gram(chunks: Iterable[Floats], sites: int) -> Floats:
    """G = X X^T (n, n) from chunks of columns (n, k)."""
    total = np.zeros((sites, sites))
    for chunk in chunks:
        total += chunk @ chunk.T
    return total


def squared_distances(g: Floats) -> Floats:
    """|x_i - x_j|^2 = G_ii + G_jj - 2 G_ij, (n, n); never negative, zero on the diagonal."""
    norms = np.diag(g)
    distances = np.maximum(norms[:, None] + norms[None, :] - 2.0 * g, 0.0)
    np.fill_diagonal(distances, 0.0)
    return distances


def norm_gate(norms: Floats, factor: float = GATE) -> Mask:
    """Keep finite updates of at most `factor` times the median norm, (n,); where that is zero, all finite ones.

    Only too long is suspicious: a short update does no harm, and a site with little to learn is no attacker.
    """
    finite = np.isfinite(norms)
    middle = float(np.median(norms[finite])) if finite.any() else 0.0
    return finite & (norms <= factor * middle) if middle > 0.0 else finite


def nearest_neighbour_mixing(g: Floats, f: int) -> Floats:
    """The (n, n) matrix that replaces x_i by the mean of its n - f nearest updates, itself included.

    It takes differences between honest sites out before a rule can mistake them for an attack (Allouah et al., *Fixing
    by mixing*, AISTATS 2023, algorithm 1).
    """
    n = len(g)
    nearest = np.argsort(squared_distances(g), axis=1, kind="stable")[:, : n - f]
    mixing = np.zeros((n, n))
    np.put_along_axis(mixing, nearest, 1.0 / (n - f), axis=1)
    return mixing


# Rules that weigh whole updates: Gram matrix -> weights (n,) that sum to one -----------------------------------------


def multi_krum(g: Floats, f: int, keep: int | None = None) -> Floats:
    """The mean of the `keep` (default n - f) updates with the lowest scores.

    A score is the sum of the n - f - 2 smallest squared distances to others (Blanchard et al., NeurIPS 2017, sec. 4).
    Raises `StudyError` unless n >= 2f + 3.
    """
    n = len(g)
    if n < 2 * f + 3:
        raise StudyError(f"Krum stands {f} malicious sites among at least {2 * f + 3}, not among {n}")
    others = np.sort(squared_distances(g), axis=1)[:, 1 : n - f - 1]
    keep = n - f if keep is None else keep
    best = np.argsort(others.sum(axis=1), kind="stable")[:keep]
    weights = np.zeros(n)
    weights[best] = 1.0 / keep
    return weights


def krum(g: Floats, f: int) -> Floats:
    """All weight on the update of lowest score (Blanchard et al., NeurIPS 2017, section 4)."""
    return multi_krum(g, f, keep=1)


def geometric_median(g: Floats, f: int = 0) -> Floats:
    """The v that minimises sum |v - x_i|, by smoothed Weiszfeld steps: w_i = 1 / max(nu, |v - x_i|).

    v stays a weighted mean of the updates, so its distances follow from G (RFA: Pillutla et al., IEEE TSP 2022,
    algorithm 2). f is not used: it stands any minority.
    """
    # Not from the mean: that may be anywhere. An update counts by how close a majority is to it.
    radius = np.sort(squared_distances(g), axis=1)[:, len(g) // 2]
    closeness: Floats = 1.0 / radius if radius.min() > 0.0 else (radius == 0.0).astype(np.float64)
    weights: Floats = closeness / closeness.sum()
    for _ in range(WEISZFELD_STEPS):
        distance = _distances_to(g, weights)
        floor = SMOOTHING * float(np.median(distance))
        if floor == 0.0:
            # Most updates are the same, and that is the answer.
            same = (distance == 0.0).astype(np.float64)
            weights = same / same.sum()
            break
        inverse = 1.0 / np.maximum(distance, floor)
        weights = inverse / inverse.sum()
    return weights


def dnc(g: Floats, f: int) -> Floats:
    """The mean without the 1.5 f updates of largest squared projection on the main direction of their differences.

    The direction is the top right-singular vector of the centred updates; the projections are the top eigenvector of
    the centred Gram matrix, so all coordinates count, not a random sample of them, and one pass does (after Shejwalkar
    and Houmansadr, NDSS 2021, algorithm 2).
    """
    n = len(g)
    centring = np.eye(n) - 1.0 / n
    _, vectors = np.linalg.eigh(centring @ g @ centring)
    scores = vectors[:, -1] ** 2
    kept = np.argsort(scores, kind="stable")[: max(1, n - math.floor(DNC_FACTOR * f))]
    weights = np.zeros(n)
    weights[kept] = 1.0 / len(kept)
    return weights


def centred_clipping(g: Floats, f: int = 0) -> Floats:
    """v <- v + 1/n sum (x_i - v) min(1, tau / |x_i - v|), with tau twice the median distance.

    v starts at the geometric median. Karimireddy et al. (ICML 2021, eq. 3) start from the last round's aggregate and
    take tau from the user; starting afresh keeps no state that a resumed run could lack. f is not used.
    """
    n = len(g)
    weights = geometric_median(g)
    for _ in range(CLIPPING_STEPS):
        distance = _distances_to(g, weights)
        radius = CLIP * float(np.median(distance))
        clip = np.minimum(1.0, radius / np.maximum(distance, np.finfo(np.float64).tiny))
        weights = weights * (1.0 - clip.mean()) + clip / n
    return weights


def _distances_to(g: Floats, weights: Floats) -> Floats:
    """|x_i - sum_j w_j x_j| for every i."""
    across = g @ weights
    return np.asarray(np.sqrt(np.maximum(np.diag(g) - 2.0 * across + float(weights @ across), 0.0)))


# Rules that look at every coordinate: (n, k) -> aggregate (k,), share of each site (n,) ------------------------------


def trimmed_mean(values: Floats, f: int) -> tuple[Floats, Floats]:
    """Per coordinate, the mean without the f smallest and the f largest values (Yin et al., ICML 2018, definition 2).

    Raises `StudyError` unless n >= 2f + 1.
    """
    n = len(values)
    if n < 2 * f + 1:
        raise StudyError(f"a trimmed mean stands {f} malicious sites among at least {2 * f + 1}, not among {n}")
    if f == 0:
        return values.mean(axis=0), np.full(n, 1.0 / n)
    columns = np.ascontiguousarray(values.T)
    columns = np.partition(columns, (f, n - f - 1), axis=1)
    low, high = columns[:, f], columns[:, n - f - 1]
    # Mixed updates are often the same but for the last bit.
    slack = TIE * (np.abs(low) + np.abs(high))
    return columns[:, f : n - f].mean(axis=1), _shares((values >= low - slack) & (values <= high + slack))


def median(values: Floats, f: int = 0) -> tuple[Floats, Floats]:
    """Per coordinate, the middle value, or the mean of the two in the middle (Yin et al., ICML 2018, definition 1)."""
    return trimmed_mean(values, (len(values) - 1) // 2)


def _shares(inside: Mask) -> Floats:
    """How much of the aggregate is each site's; values that tie share alike."""
    counts: Floats = (inside / inside.sum(axis=0)).mean(axis=1)
    return counts


LINEAR: dict[Rule, Callable[[Floats, int], Floats]] = {
    "mean": lambda g, f: np.full(len(g), 1.0 / len(g)),
    "geometric_median": geometric_median,
    "krum": krum,
    "multi_krum": multi_krum,
    "dnc": dnc,
    "centred_clipping": centred_clipping,
}
COORDINATE: dict[Rule, Callable[[Floats, int], tuple[Floats, Floats]]] = {
    "trimmed_mean": trimmed_mean,
    "median": median,
}


# All together --------------------------------------------------------------------------------------------------------


def plan_of(g: Floats, defence: Defence, kept: Mask | None = None) -> RobustPlan:
    """What a defence does with updates of this Gram matrix; `kept` says who passed the gate if somebody else decided.

    After the gate f stays what it was, as far as the rule is defined: an honest site may be among the gated ones.
    Raises `Rejected` when fewer sites are left than f and the gated ones allow.
    """
    if kept is None:
        norms = np.sqrt(np.diag(g))
        kept = norm_gate(norms) if defence.gate else np.ones(len(g), dtype=np.bool_)
    left, gated = int(kept.sum()), int(len(kept) - kept.sum())
    f = min(defence.f, stands(defence.rule, left))
    if left == 0 or f < defence.f - gated:
        raise Rejected(f"{left} updates are too few for protection.robust to stand {defence.f} malicious sites")
    g = g[np.ix_(kept, kept)]
    mixed = defence.mixing == "nearest_neighbour" and defence.rule != "mean"
    mixing = nearest_neighbour_mixing(g, f) if mixed else np.eye(left)
    linear = LINEAR.get(defence.rule)
    weights = None if linear is None else linear(mixing @ g @ mixing.T, f)
    return RobustPlan(defence, f, kept, mixing, weights)


def combine(plan: RobustPlan, values: Floats) -> tuple[Floats, Floats]:
    """The aggregate (k,) of a chunk (m, k) of the kept sites' updates, and each kept site's share in it (m,)."""
    if plan.weights is not None:
        shares = plan.weights @ plan.mixing
        return shares @ values, shares
    mixed = plan.mixing @ values
    value, shares = COORDINATE[plan.defence.rule](mixed, plan.f)
    return value, shares @ plan.mixing


def aggregate(updates: npt.NDArray[np.floating], defence: Defence) -> Outcome:
    """Gate, mix and aggregate the rows of (n, d) at once; raises `Rejected` when too few of them are usable."""
    values = np.asarray(updates, dtype=np.float64)
    # A row that is not finite counts as too long, and may not spoil the others' distances.
    usable: Mask = np.asarray((np.abs(values) <= LARGEST).all(axis=1))
    clean = values if usable.all() else np.where(usable[:, None], values, 0.0)
    g = gram([clean], len(clean))
    norms = np.where(usable, np.sqrt(np.diag(g)), np.inf)
    plan = plan_of(g, defence, norm_gate(norms) if defence.gate else usable)
    value, shares = combine(plan, clean if plan.kept.all() else clean[plan.kept])
    weights = np.zeros(len(values))
    weights[plan.kept] = shares
    return Outcome(value, weights, plan.kept)
