"""Property inference: does an update tell how its images were taken, or of whom?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.audit.membership import auc

Floats = npt.NDArray[np.float64]
_REPLICATES = 500


@dataclass(frozen=True)
class Property:
    """How well a linear probe on last-layer gradients tells a property; 0.5 is chance. The interval is of patients."""

    name: str
    auc: float
    low: float
    high: float
    examples: int
    patients: int

    def to_json(self) -> dict[str, Any]:
        """As audit.json holds it."""
        return asdict(self)


def probe(name: str, gradients: Floats, has: npt.NDArray[np.bool_], patients: npt.NDArray[np.int64]) -> Property | None:
    """A ridge probe, tested on patients that it was not fitted to (5 folds by patient); 95 % bootstrap over patients.

    gradients: (n, d), one update for each example; has: (n,), the property; patients: (n,), their numbers. None where
    there are fewer than 4 patients, or all have the property, or none.
    """
    known = np.unique(patients)
    if len(known) < 4 or has.all() or not has.any():
        return None
    scores = np.zeros(len(has))
    for fold in range(min(5, len(known))):
        tested = np.isin(patients, known[fold :: min(5, len(known))])
        if has[~tested].all() or not has[~tested].any():
            continue
        scores[tested] = _ridge(gradients[~tested], has[~tested], gradients[tested])
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(_REPLICATES):
        rows = np.concatenate([np.flatnonzero(patients == p) for p in random.choice(known, len(known))])
        if 0 < has[rows].sum() < len(rows):
            drawn.append(auc(scores[rows][has[rows]], scores[rows][~has[rows]]))
    low, high = np.quantile(drawn, [0.025, 0.975]) if drawn else (0.0, 1.0)
    return Property(name, auc(scores[has], scores[~has]), float(low), float(high), len(has), len(known))


def _ridge(train: Floats, has: npt.NDArray[np.bool_], test: Floats) -> Floats:
    """Standardised features, a penalty of their number; in the space of examples, as there are fewer of those."""
    mean, spread = train.mean(axis=0), train.std(axis=0)
    spread[spread < 1e-12] = np.inf
    fitted, asked = (train - mean) / spread, (test - mean) / spread
    target = np.where(has, 1.0, -1.0)
    target -= target.mean()
    weights = np.linalg.solve(fitted @ fitted.T + fitted.shape[1] * np.eye(len(fitted)), target)
    scores: Floats = asked @ fitted.T @ weights
    return scores
