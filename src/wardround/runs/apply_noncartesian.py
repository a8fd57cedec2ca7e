"""Applies a released model of radial or spiral MRI: to images, scanned first, or to raw data of such scans."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from wardround.imaging.readers.raw import KINDS, is_raw
from wardround.runs.apply import slices_said
from wardround.runs.apply_general import Given, RawReader, reconstruct_general
from wardround.runs.measured_along import read_measured_along
from wardround.study.acquisitions import AcquisitionSettings


def _measured(_: AcquisitionSettings, source: Path) -> Given:
    measured = read_measured_along(source)
    said = f"Reconstructed {slices_said(measured.raw.size, len(measured.scans))} from {measured.said}"
    return Given(measured.scans, measured.scale, measured.place, said, measured.facts)


#: As `reconstruct_general`, of raw data in every format that holds a trajectory.
reconstruct_noncartesian = partial(
    reconstruct_general, raw=RawReader(is_raw, f"raw data with their trajectory: {KINDS}", _measured)
)
