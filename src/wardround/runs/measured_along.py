"""Raw data that a scanner measured along radial or spiral lines, as what networks and total variation reconstruct."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.noncartesian import NonCartesianMRI, gridded_maps
from wardround.imaging.acquisition.mri.nufft import EVALUATION, finufft
from wardround.imaging.acquisition.mri.trajectories import cell_areas, even_weights
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.readers.raw import RawSlices, open_raw
from wardround.imaging.readers.raw.trajectory import course_of
from wardround.runs.measured import Measured
from wardround.runs.protocols import Facts

# What readouts are called, in the settings of the scanners that are simulated.
_COUNTED = {"radial": "spokes", "spiral": "interleaves"}


def read_measured_along(source: Path) -> Measured:
    """Open a file of raw data with its trajectory, of whichever format that holds one.

    The scale is the peak of the volume's gridded images. Raises DataError where the file cannot be read or holds
    Cartesian lines, or where the centre of its k-space is too thin for coil maps, and MissingExtra where a package is
    needed.
    """
    raw = open_raw(source)
    raw.require_trajectory()
    # Said before anything is read.
    finufft()
    try:
        return _measured(raw)
    except GeometryError as error:
        raise raw.error(str(error)) from error


@torch.no_grad()
def _measured(raw: RawSlices) -> Measured:
    firsts = (operator.initial(data) for operator, data in (_scan(raw, number, 1.0) for number in range(len(raw))))
    # As in training, where 1 is the maximum of the volume; an empty volume stays what it is.
    scale = max(float(first.abs().amax()) for first in firsts) or 1.0
    scans = tuple(partial(_scan, raw, number, scale) for number in range(len(raw)))
    return Measured(raw, scans, scale, _facts(raw))


@torch.no_grad()
def _scan(raw: RawSlices, number: int, scale: float) -> tuple[LinearOperator, torch.Tensor]:
    """The operator and the weighted data of a slice, as in training but for the areas, which any trajectory has."""
    assert raw.trajectory is not None
    samples = torch.from_numpy(raw.kspace(number)).flatten(1)[None]
    points = raw.trajectory(number).reshape(-1, 2)
    exact = points.astype(np.float64)
    parts = (points, even_weights(exact, raw.size), cell_areas(exact, raw.size))
    trajectory, weights, areas = (torch.from_numpy(part.astype(np.float32))[None] for part in parts)
    maps = gridded_maps(samples, trajectory, areas, raw.size)
    operator = NonCartesianMRI(maps, trajectory, weights, areas=areas, tolerance=EVALUATION)
    return operator, operator.weighed(samples / scale)


def _facts(raw: RawSlices) -> Facts:
    assert raw.trajectory is not None
    course = course_of(raw.trajectory(0))
    counted = {_COUNTED[course]: float(raw.shape[2])} if course in _COUNTED else {}
    return {"trajectory": course, **counted, "coils": float(raw.coils)}
