"""Raw data that a scanner measured, as what networks and total variation reconstruct."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wardround.imaging.acquisition.mri.coils import estimate_maps
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.readers.raw import RawSlices, open_raw
from wardround.imaging.readers.volume import Volume
from wardround.runs.depth import Scan
from wardround.runs.protocols import Facts
from wardround.study.acquisitions import AcquisitionSettings

# How coil maps of measured data can be estimated: those of the simulated scanner (`true`) are of no real one.
Maps = Literal["estimated", "espirit"]


@dataclass(frozen=True, eq=False)
class Measured:
    """The scans of a file of raw data on one scale, and the scale: networks learn volumes whose maximum is 1.

    facts: what is compared with the scanners of training.
    """

    raw: RawSlices
    scans: tuple[Scan, ...]
    scale: float
    facts: Facts

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Size of a voxel in mm between rows, columns and slices; 1 where the header does not say it."""
        return self.raw.facts.spacing or (1.0, 1.0, 1.0)

    @property
    def affine(self) -> NDArray[np.float64]:
        """From indices to mm; where the patient lies, raw data do not say here."""
        return np.diag([*self.spacing, 1.0])

    @property
    def place(self) -> Volume:
        """Where its images lie, without any."""
        return Volume(np.zeros((0, 0, 0), np.float32), self.spacing, self.affine)

    @property
    def said(self) -> str:
        """Of which coils, and how large a voxel is."""
        path = "" if self.raw.cartesian else f", {self.raw.shape[2]} readouts of {self.raw.shape[3]} samples"
        coils = f"k-space of {self.raw.coils} coil{'s' if self.raw.coils != 1 else ''} ({self.raw.kind}{path})"
        if self.raw.facts.spacing is None:
            return f"{coils}; it holds no voxel size, so 1 mm is written."
        return f"{coils}, voxels of {' x '.join(f'{side:.3g}' for side in self.spacing)} mm by its header."


def estimated_by(scanner: AcquisitionSettings) -> Maps:
    """How coil maps of measured data are estimated for a model of this scanner: as in training, where they were."""
    return "espirit" if getattr(scanner, "maps", None) == "espirit" else "estimated"


def read_measured(source: Path, maps: Maps = "estimated") -> Measured:
    """Open a file of Cartesian raw data, of whichever format; `maps` says how coil maps are estimated.

    The scale is the zero-filled peak of the volume. Raises DataError where the file cannot be read, GeometryError where
    the middle of k-space was not measured, and MissingExtra where a package is needed.
    """
    raw = open_raw(source)
    raw.require_cartesian()
    return measured_scans(raw, maps)


@torch.no_grad()
def measured_scans(raw: RawSlices, maps: Maps = "estimated") -> Measured:
    """The scans of a file's slices, read again when they are asked for."""
    peaks, shares = [], []
    for number in range(len(raw)):
        operator, data = _scan(raw, number, 1.0, maps)
        peaks.append(float(operator.A_adjoint(data).abs().amax()))
        shares.append(float(operator.mask.mean()))
    # An empty volume stays what it is.
    scale = max(peaks) or 1.0
    scans = tuple(partial(_scan, raw, number, scale, maps) for number in range(len(raw)))
    acceleration = 1.0 / max(sum(shares) / len(shares), 1e-9)
    return Measured(raw, scans, scale, {"acceleration": acceleration, "coils": float(raw.coils)})


@torch.no_grad()
def _scan(raw: RawSlices, number: int, scale: float, maps: Maps) -> tuple[CartesianMRI, Tensor]:
    kspace = raw.kspace(number)
    data, mask = torch.from_numpy(kspace)[None], torch.from_numpy(raw.mask(number, kspace))[None]
    return CartesianMRI(estimate_maps(data, mask, maps), mask), data / scale


def scanned_again(scan: tuple[LinearOperator, Tensor], image: Tensor, random: np.random.Generator) -> Tensor:
    """Data of an image (1, H, W) measured as a scan was, with as much noise as total variation found in that.

    What the image leaves unexplained of the scan counts as noise: independent in coils, real and imaginary parts.
    """
    operator, data = scan
    clean = operator.A(image.to(data.dtype))
    on = data != 0
    power = (clean - data)[on].abs().square().mean() if bool(on.any()) else data.abs().sum()
    drawn = random.standard_normal((*data.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    return clean + on * torch.from_numpy(drawn) * torch.sqrt(power / 2)
