"""How a slice must be turned to be shown as radiologists look at it; what is stored and trained on stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, TypeVar

import nibabel
import numpy as np
from numpy.typing import NDArray

ArrayT = TypeVar("ArrayT", bound=np.generic)
# Where rows go down to and columns go right to, by the axis along which slices follow each other: the patient's left is
# on the right of the picture, the front or the head on top; seen from the side, the face looks to the left.
_SHOWN = {"S": ("P", "L"), "A": ("I", "L"), "R": ("I", "P")}
_OPPOSITE = {"R": "L", "L": "R", "A": "P", "P": "A", "S": "I", "I": "S"}
_AXIS = {"R": "R", "L": "R", "A": "A", "P": "A", "S": "S", "I": "S"}


class Turn(NamedTuple):
    """Rows and columns swapped or not, then each in reverse or not."""

    swap: bool
    rows: bool
    columns: bool

    def __call__(self, image: NDArray[ArrayT]) -> NDArray[ArrayT]:
        """A slice (H, W) as it is to be shown."""
        turned = image.T if self.swap else image
        return turned[:: -1 if self.rows else 1, :: -1 if self.columns else 1]


def turn_for(affine: NDArray[np.float64]) -> Turn:
    """How slices along the third axis of a volume are shown: radiological convention, to the nearest axes.

    affine: (4, 4), voxel indices to mm to the right, the front and the head of the patient (RAS), as in NIfTI.
    """
    down, right, between = nibabel.orientations.aff2axcodes(affine)
    wanted_down, wanted_right = _SHOWN[_AXIS[between]]
    swap = _AXIS[down] != _AXIS[wanted_down]
    if swap:
        down, right = right, down
    return Turn(swap, down == _OPPOSITE[wanted_down], right == _OPPOSITE[wanted_right])


def turn_of(path: Path) -> Turn | None:
    """How the slices of a NIfTI file are shown; None where it does not say how its patient lies.

    Says nothing: a file without a transform, and one with the identity, which is what programs write that know none.
    """
    try:
        image = nibabel.load(path)
        header, affine = image.header, np.asarray(image.affine, np.float64)
        stated = bool(header["sform_code"]) or bool(header["qform_code"])
        if not stated or np.array_equal(affine, np.eye(4)) or not np.isfinite(affine).all():
            return None
        return turn_for(affine)
    except Exception:  # a picture as it is stored is better than none
        return None
