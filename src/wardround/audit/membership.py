"""Membership inference: can it be told from the model who was in the training?

Scores are higher for likelier members. What counts is how many members are found with hardly any false alarm
(Carlini et al., "Membership inference attacks from first principles", S&P 2022), never accuracy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import beta

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
LEVELS = (0.01, 0.001)
LOSS = "loss threshold"
# An attack that does not reach this AUC on models whose training is known does not work.
CONTROL_AUC = 0.6


@dataclass(frozen=True)
class Found:
    """The true-positive rate at one false-positive rate, with a 95 % Clopper-Pearson interval.

    `resolved` is false where there are fewer than 1 / fpr outsiders: then it is the rate without any false alarm.
    """

    fpr: float
    tpr: float
    low: float
    high: float
    resolved: bool


@dataclass(frozen=True)
class Membership:
    """One membership attack on `members` and `outsiders` examples; `curve` are the points (fpr, tpr) of its ROC.

    `control` is its mean AUC on the reference models, whose training is known; nothing where it was not tried.
    """

    attack: str
    members: int
    outsiders: int
    auc: float
    at: tuple[Found, ...]
    curve: tuple[tuple[float, float], ...]
    control: float | None = None

    @property
    def works(self) -> bool:
        """Whether it finds members where they are known; one that does not shows nothing by finding none."""
        return self.control is not None and self.control >= CONTROL_AUC

    def to_json(self) -> dict[str, Any]:
        """As audit.json holds it."""
        return {**asdict(self), "works": self.works}


def infer_membership(losses: Floats, inside: Bools, references: Floats, knows: Bools) -> tuple[Membership, ...]:
    """All attacks on the losses (n,) of examples, of which `inside` were trained on, by R references.

    Shapes as in `lira_scores`; R may be 0: then only the loss is looked at. Each attack is also tried on every
    reference in turn, with the others as references, where there are at least four: two pairs that share nothing.
    """
    count = len(references)
    found = []
    for name, scores in _scores(losses, inside, references, knows).items():
        label = name if name == LOSS or not count else f"{name}, {count} references"
        found.append(judge(label, scores[inside], scores[~inside]))
    if count < 4:
        return tuple(found)
    controls: dict[str, list[float]] = {}
    for number in range(count):
        known, others = knows[number], np.arange(count) != number
        for name, scores in _scores(references[number], known, references[others], knows[others]).items():
            controls.setdefault(name, []).append(auc(scores[known], scores[~known]))
    return tuple(replace(f, control=float(np.mean(c))) for f, c in zip(found, controls.values(), strict=True))


def _scores(losses: Floats, inside: Bools, references: Floats, knows: Bools) -> dict[str, Floats]:
    scores = {LOSS: loss_scores(losses)}
    if len(references):
        scores["LiRA"] = lira_scores(losses, references, knows)
        scores["RMIA"] = rmia_scores(losses, references, knows, ~inside)
    return scores


def judge(attack: str, members: Floats, outsiders: Floats) -> Membership:
    """Sum up an attack from its scores of members (n,) and of outsiders (m,). Raises ValueError where one is empty."""
    if not len(members) or not len(outsiders):
        raise ValueError("membership needs members and outsiders")
    curve = roc(members, outsiders)
    at = tuple(_found(members, outsiders, fpr) for fpr in LEVELS)
    return Membership(attack, len(members), len(outsiders), auc(members, outsiders), at, curve)


def roc(members: Floats, outsiders: Floats) -> tuple[tuple[float, float], ...]:
    """The points (fpr, tpr) of all thresholds, from the strictest."""
    thresholds = np.unique(np.concatenate([members, outsiders]))[::-1]
    return tuple((float((outsiders >= t).mean()), float((members >= t).mean())) for t in thresholds)


def auc(positive: Floats, negative: Floats) -> float:
    """The probability that a positive scores above a negative, ties counting half (Mann-Whitney)."""
    higher = (positive[:, None] > negative[None, :]).mean()
    return float(higher + 0.5 * (positive[:, None] == negative[None, :]).mean())


def _found(members: Floats, outsiders: Floats, fpr: float) -> Found:
    allowed = int(np.floor(fpr * len(outsiders) + 1e-9))
    # Everything above the first outsider that may no longer raise an alarm.
    threshold = np.sort(outsiders)[::-1][allowed] if allowed < len(outsiders) else -np.inf
    hits = int((members > threshold).sum())
    low, high = clopper_pearson(hits, len(members))
    return Found(fpr, hits / len(members), low, high, resolved=len(outsiders) * fpr >= 1.0)


def clopper_pearson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact interval of a rate."""
    tail = (1.0 - level) / 2.0
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1.0 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


def loss_scores(losses: Floats) -> Floats:
    """Members have lower losses (Yeom et al., CSF 2018): (n,) -> (n,)."""
    return -losses


def lira_scores(losses: Floats, references: Floats, knows: npt.NDArray[np.bool_]) -> Floats:
    """How far a loss lies below those of reference models that never saw the example, in their standard deviations.

    The offline likelihood ratio (Carlini et al. 2022) with one spread for all examples, as there are few references.
    losses: (n,); references: (R, n); knows: (R, n), whether a reference was trained on the example. -> (n,).
    """
    strange = np.where(knows, np.nan, references)
    mean = _mean_for_unseen(strange)
    residual = strange - mean
    spread = float(np.sqrt(np.nanmean(residual**2))) if np.isfinite(residual).any() else 1.0
    return (mean - losses) / max(spread, 1e-12)


def rmia_scores(
    losses: Floats, references: Floats, knows: npt.NDArray[np.bool_], population: npt.NDArray[np.bool_]
) -> Floats:
    """The share of population examples z that x dominates: [p(x|model)/p(x)] / [p(z|model)/p(z)] >= 1.

    RMIA (Zarifzadeh, Liu & Shokri, ICML 2024), with likelihoods exp(-loss / mean loss) and p(x) the mean over
    references that never saw x. Shapes as in `lira_scores`; population: (n,), which examples serve as z; x is never
    compared with itself. -> (n,) in [0, 1], ties broken by the ratio.
    """
    scale = max(float(np.abs(losses).mean()), 1e-12)
    strange = np.where(knows, np.nan, np.exp(-references / scale))
    ratio = np.exp(-losses / scale) / np.maximum(_mean_for_unseen(strange), 1e-12)
    beaten = ratio[:, None] >= ratio[None, :]
    np.fill_diagonal(beaten, False)
    share: Floats = beaten[:, population].sum(axis=1) / np.maximum(population.sum() - population, 1)
    return share + 1e-9 * ratio


def _mean_for_unseen(values: Floats) -> Floats:
    """Mean over the references that never saw an example; over all examples where every one saw it."""
    count = np.isfinite(values).sum(axis=0)
    total = np.nansum(values, axis=0)
    overall = float(np.nanmean(values)) if np.isfinite(values).any() else 0.0
    return np.where(count > 0, total / np.maximum(count, 1), overall)
