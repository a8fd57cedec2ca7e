"""What summed histograms of scores say: AUROC, average precision, calibration error and a reliability diagram.

All take counts (..., classes, 2, bins): of every class the examples without (0) and with it (1), by the bin of [0, 1]
that their score lies in. They are exact for scores rounded to their bins: scores within one bin are ties. Torch-free.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def auroc(counts: Floats) -> Floats:
    """The area under the ROC curve of each class: (..., classes, 2, bins) -> (..., classes).

    The share of pairs of an example with and one without the class in which the former scores higher; a tie counts
    half, which is the trapezoid within a bin (Hanley and McNeil, Radiology 143, 1982). NaN where either is missing.
    """
    negative, positive = counts[..., 0, :], counts[..., 1, :]
    below = np.cumsum(negative, axis=-1) - negative
    won = (positive * (below + 0.5 * negative)).sum(axis=-1)
    return _divided(won, positive.sum(axis=-1) * negative.sum(axis=-1))


def average_precision(counts: Floats) -> Floats:
    """The area under the precision-recall curve of each class: (..., classes, 2, bins) -> (..., classes).

    sum (R_k - R_(k-1)) P_k over thresholds from high to low, a bin at once, as in scikit-learn: straight lines between
    the points would be too good (Davis and Goadrich, ICML 2006). NaN where no example has the class.
    """
    positive, every = counts[..., 1, ::-1], counts.sum(axis=-2)[..., ::-1]
    found, called = np.cumsum(positive, axis=-1), np.cumsum(every, axis=-1)
    precision = found / np.maximum(called, 1.0)
    return _divided((positive * precision).sum(axis=-1), positive.sum(axis=-1))


class Reliability(NamedTuple):
    """A reliability diagram, each (..., classes, groups): mean score, share with the class, number of examples."""

    confidence: Floats
    frequency: Floats
    examples: Floats


def reliability(counts: Floats, groups: int = 10) -> Reliability:
    """Scores against what came true, in `groups` of equally wide bins; NaN in empty groups.

    A score counts as the centre of its bin. Raises ValueError where the bins do not divide into the groups.
    """
    expected, true, count = grouped(counts, groups)
    return Reliability(_divided(expected, count), _divided(true, count), count)


def calibration_error(counts: Floats, groups: int = 10) -> Floats:
    """The expected calibration error of each class: (..., classes, 2, bins) -> (..., classes).

    sum n_g / N |frequency_g - confidence_g| (Naeini et al., AAAI 2015), within 1 / (2 bins) of the error of the scores
    themselves. NaN without examples. Raises ValueError as `reliability` does.
    """
    expected, true, count = grouped(counts, groups)
    return _divided(np.abs(true - expected).sum(axis=-1), count.sum(axis=-1))


def grouped(counts: Floats, groups: int) -> tuple[Floats, Floats, Floats]:
    """Of a reliability diagram the sums that add over sites, each (..., classes, groups): of scores (a score counts as
    the centre of its bin), of examples with the class, and of all examples.

    Raises ValueError where the bins do not divide into the groups.
    """
    bins = counts.shape[-1]
    if groups < 1 or bins % groups:
        raise ValueError(f"{bins} bins do not divide into {groups} groups of equal width")
    centres = (np.arange(bins) + 0.5) / bins
    every = counts.sum(axis=-2)

    def summed(values: Floats) -> Floats:
        return np.asarray(values.reshape(*values.shape[:-1], groups, bins // groups).sum(axis=-1))

    return summed(every * centres), summed(counts[..., 1, :]), summed(every)


def _divided(above: Floats, below: Floats) -> Floats:
    return np.asarray(np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0))
