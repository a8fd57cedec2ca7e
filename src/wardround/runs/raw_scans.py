"""Raw data of MRI as what a chain from raw data to the diagnosis sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.solvers import zero_filled
from wardround.imaging.readers.labelled import LabelledImage, VoxelSpace
from wardround.runs.inputs import Input, Opened
from wardround.runs.measured import Maps, estimated_by, read_measured
from wardround.study.acquisitions import AcquisitionSettings
from wardround.tasks.mri import MRIBatch


def raw_input(source: Path, coils: tuple[int, ...], scanner: AcquisitionSettings) -> Input:
    """The raw data of one patient in a file, which is read when it is asked for.

    `coils` are those of training; `scanner` is the study's, or that of the site whose model it is.
    """
    return Input(source.stem, "", source, lambda: _opened(source, coils, estimated_by(scanner)))


def _opened(source: Path, coils: tuple[int, ...], maps: Maps) -> Opened:
    measured = read_measured(source, maps)
    batches = []
    for part in measured.scans:
        operator, data = part()
        assert isinstance(operator, CartesianMRI)
        batches.append(MRIBatch.measured(operator, data))
    scans = MRIBatch.joined(batches)
    with torch.no_grad():
        seen = np.moveaxis(zero_filled(scans.operator, scans.kspace).abs().numpy(), 0, -1)
    # Where the patient lies, is not read of raw data.
    image = LabelledImage(np.float32(measured.scale) * seen[None], None, VoxelSpace(measured.raw.facts.spacing))
    found = measured.raw.coils
    unlike = f"Mind: the raw data are of {found} coils, and the model was trained with {_said(coils)}. Untested there."
    return Opened(image, scans=scans, scale=measured.scale, minds=(unlike,) if coils and found not in coils else ())


def _said(coils: tuple[int, ...]) -> str:
    """Numbers of coils in words: 4 or 8, and 1 to 12 where a study varies them."""
    every = len(coils) > 2 and coils == tuple(range(coils[0], coils[-1] + 1))
    return f"{coils[0]} to {coils[-1]}" if every else " or ".join(map(str, coils))
