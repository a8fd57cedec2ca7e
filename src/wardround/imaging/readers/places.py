"""Where the slices of a CT series lie, and what that says of slices that are not there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from wardround.errors import DataError
from wardround.imaging.readers.dicom_file import number

UNEVEN = 0.1  # of a step: more than any rounding of positions, less than any missing slice


@dataclass(frozen=True)
class Place:
    """A slice's place along its normal in mm, and what its header says of its neighbours.

    `number` is its InstanceNumber, `step` the distance of slices in mm (SpacingBetweenSlices); None where not said.
    """

    position: float
    number: int | None = None
    step: float | None = None

    @classmethod
    def of(cls, position: float, header: Dataset) -> Place:
        """The place of a slice with this header."""
        instance, step = _said(header, "InstanceNumber"), _said(header, "SpacingBetweenSlices")
        # Some vendors give the distance a direction, or write 0 for unknown.
        return cls(position, None if instance is None else int(instance), abs(step) if step else None)


def unevenness(places: Iterable[Place]) -> str:
    """What is wrong with the distances of a series' slices; empty where nothing is."""
    positions = np.sort([place.position for place in places])
    steps = np.diff(positions)
    if not len(steps):
        return ""
    doubled = int((steps < max(1e-3, UNEVEN * float(np.median(steps)))).sum())
    if doubled:
        return f"{doubled} of {len(positions)} slices of a series lie where another does (copies, or several phases)"
    # With few slices, a gap may be the median: the least step is one step for certain.
    least = float(steps.min())
    missing = np.rint(steps / least).astype(int) - 1
    if (np.abs(steps / least - missing - 1) > UNEVEN * (missing + 1)).any():
        return "slices of a series are unevenly spaced"
    if missing.any():
        count = int(missing.sum())
        return f"{count} of {count + len(positions)} slices of a series are missing"
    return ""


def regular_gaps(places: Iterable[Place]) -> str:
    """What in the headers speaks for slices missing at even steps, which `unevenness` cannot see; or nothing."""
    ordered = sorted(places, key=lambda place: place.position)
    if len(ordered) < 2:
        return ""
    step = float(np.median(np.diff([place.position for place in ordered])))
    stated = [place.step for place in ordered if place.step is not None]
    found = []
    if stated and abs(step - float(np.median(stated))) > UNEVEN * float(np.median(stated)):
        found.append(f"slices stand {step:.4g} mm apart where their headers say {np.median(stated):.4g} mm")
    if (counted := _counted(ordered)) > 1:
        found.append(f"their numbers rise by {counted}")
    return " and ".join(found)


def _counted(ordered: Sequence[Place]) -> int:
    """The least by which InstanceNumber changes from slice to slice; 0 where it is not said."""
    numbers = [place.number for place in ordered if place.number is not None]
    if len(numbers) < len(ordered):
        return 0
    steps: NDArray[np.int64] = np.abs(np.diff(numbers))
    return int(steps.min())


def _said(header: Dataset, keyword: str) -> float | None:
    try:
        return number(header, keyword)
    except DataError:
        return None  # a reason to ask, not one to refuse the image
