"""Straight lines between knots: how an image's histogram is brought onto a scale that all images share.

Nyul, Udupa and Zhang, *New variants of a method of MRI scale standardization*, IEEE TMI 19(2), 2000: percentiles of
what an image shows are its landmarks; those of the standard scale are the means over images, each image's ends first
brought to the scale's ends by a straight line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curve:
    """A piecewise linear function through the knots (`x`, `y`), both rising; beyond them its outer pieces go on."""

    x: Tensor
    y: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """The function of every value, float32 of the same shape."""
        piece = torch.bucketize(values, self.x[1:-1])
        slope = (self.y[1:] - self.y[:-1]) / (self.x[1:] - self.x[:-1])
        return self.y[piece] + slope[piece] * (values - self.x[piece])


def curve_through(found: Floats, wanted: Sequence[float]) -> Curve:
    """From an image's landmarks (L,) to those wanted. Equal landmarks are one knot, at the mean of what they become.

    An image whose landmarks are all equal is moved to the middle one.
    """
    known, which = np.unique(found, return_inverse=True)
    counts = np.bincount(which)
    values = np.bincount(which, np.asarray(wanted, np.float64)) / counts
    if len(known) == 1:
        known, values = known[0] + np.array([0.0, 1.0]), wanted[len(wanted) // 2] + np.array([0.0, 1.0])
    return Curve(torch.from_numpy(known.astype(np.float32)), torch.from_numpy(values.astype(np.float32)))


def standardised(found: Floats, ends: tuple[float, float]) -> Floats | None:
    """An image's landmarks (L,) with the first and the last one at `ends`; `None` where those two are equal."""
    low, high = found[0], found[-1]
    return None if high <= low else ends[0] + (found - low) * (ends[1] - ends[0]) / (high - low)
