"""What a report draws of a classification: a confusion matrix and reliability diagrams. Sums over patients; torch-free.

They stay in the site's own folder. A matrix has a cell for every pair of classes, and most of them hold a handful of
patients: suppressing small cells does not help, because the sums of its rows and columns, or the matrix of a second
model, give them back (see docs/protection-details.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.study.base import Config
from wardround.tasks.histograms import grouped

Floats = npt.NDArray[np.float64]
GROUPS = 10


class Confusion(Config):
    """How many patients of each class (a row) were called each class (a column)."""

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    def __add__(self, other: Confusion) -> Confusion:
        total = np.array(self.counts) + np.array(other.counts)
        return Confusion(classes=self.classes, counts=tuple(tuple(map(int, row)) for row in total))


class Reliability(Config):
    """Probabilities in `GROUPS` of equal width: their sum, how many came true, how many there are; and the error."""

    expected: tuple[float, ...]
    true: tuple[float, ...]
    examples: tuple[float, ...]

    def __add__(self, other: Reliability) -> Reliability:
        def added(name: str) -> tuple[float, ...]:
            return tuple(map(float, np.add(getattr(self, name), getattr(other, name))))

        return Reliability(expected=added("expected"), true=added("true"), examples=added("examples"))

    @property
    def error(self) -> float | None:
        """The expected calibration error; None without patients."""
        apart, count = np.abs(np.subtract(self.true, self.expected)).sum(), sum(self.examples)
        return float(apart / count) if count else None


class Charts(Config):
    """The charts of one model at one site, or of several sites by `+`; None where there is nothing to draw."""

    confusion: Confusion | None = None
    before: Reliability | None = None
    after: Reliability | None = None

    def __add__(self, other: Charts) -> Charts:
        def added(mine: Any, its: Any) -> Any:
            return its if mine is None else mine if its is None else mine + its

        names = ("confusion", "before", "after")
        return Charts(**{name: added(getattr(self, name), getattr(other, name)) for name in names})


def confusion(called: Floats, classes: Sequence[str]) -> Confusion:
    """From each patient's counts (n, classes, 2, 2): of every class whether the patient has it, and was called it."""
    true, found = called[:, :, 1, :].sum(axis=-1), called[:, :, :, 1].sum(axis=-1)
    counts = np.rint(true.T @ found).astype(int)
    return Confusion(classes=tuple(classes), counts=tuple(tuple(map(int, row)) for row in counts))


def reliability(counts: Floats) -> Reliability | None:
    """From summed counts (classes, 2, bins), the classes together; None without an example."""
    expected, true, examples = (part.sum(axis=0) for part in grouped(counts, GROUPS))
    if not examples.any():
        return None
    return Reliability(expected=tuple(map(float, expected)), true=tuple(map(float, true)),
                       examples=tuple(map(float, examples)))  # fmt: skip
