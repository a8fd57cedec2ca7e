"""Applies a released model of radial or spiral MRI: to images, scanned first, or to raw data of such scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor, nn

from wardround.imaging.readers.raw import KINDS, is_raw
from wardround.imaging.readers.volume import Volume
from wardround.runs.apply import slices_said
from wardround.runs.apply_ct import Done
from wardround.runs.apply_general import Given, RawReader, reconstruct_given
from wardround.runs.measured_along import read_measured_along
from wardround.study.acquisitions import AcquisitionSettings
from wardround.study.schema import Study


def reconstruct_noncartesian(
    network: nn.Module,
    study: Study,
    source: Path,
    output: Path,
    site: str | None,
    prompt: Tensor | None = None,
    dose: float | None = None,
    fallback: bool = False,
) -> Done:
    """As `wardround.runs.apply_general.reconstruct_general`, of raw data in every format that holds a trajectory."""
    return reconstruct_given(network, study, source, output, site, dose, fallback, _RAW)


def _measured(_: AcquisitionSettings, source: Path) -> Given:
    measured = read_measured_along(source)
    size = measured.raw.size
    like = Volume(np.zeros((0, 0, 0), np.float32), measured.spacing, measured.affine)
    said = f"Reconstructed {slices_said(size, len(measured.scans))} from {measured.said}"
    return Given(measured.scans, measured.scale, like, said, measured.facts)


_RAW = RawReader(is_raw, f"raw data with their trajectory: {KINDS}", _measured)
