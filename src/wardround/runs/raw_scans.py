"""Raw data of MRI as what a chain from raw data to the diagnosis sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.solvers import zero_filled
from wardround.imaging.readers.labelled import LabelledImage, VoxelSpace
from wardround.runs.apply import measured_scans, read_kspace
from wardround.runs.inputs import Input, Opened
from wardround.study.acquisition import Maps, MRIAcquisition
from wardround.study.acquisitions import AcquisitionSettings
from wardround.tasks.mri import MRIBatch


def raw_input(source: Path, coils: tuple[int, ...], scanner: AcquisitionSettings) -> Input:
    """The k-space of one patient in a .npy file, which is read when it is asked for.

    `coils` are those of training; `scanner` is the study's, or that of the site whose model it is.
    """
    assert isinstance(scanner, MRIAcquisition)
    return Input(source.stem, "", source, lambda: _opened(source, coils, scanner.maps))


def _opened(source: Path, coils: tuple[int, ...], maps: Maps) -> Opened:
    parts, scale = measured_scans(read_kspace(source, coils), maps)
    batches = []
    for part in parts:
        operator, data = part()
        assert isinstance(operator, CartesianMRI)
        unknown = torch.zeros(1, *data.shape[-2:])
        batches.append(MRIBatch(data, operator.maps, operator.mask, unknown, unknown))
    scans = MRIBatch.joined(batches)
    with torch.no_grad():
        seen = np.moveaxis(zero_filled(scans.operator, scans.kspace).abs().numpy(), 0, -1)
    # Raw data in .npy say neither where the patient lies nor how large a voxel is.
    image = LabelledImage(np.float32(scale) * seen[None], None, VoxelSpace(None))
    return Opened(image, scans=scans, scale=scale)
