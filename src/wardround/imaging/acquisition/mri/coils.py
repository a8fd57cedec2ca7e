"""Receive-coil sensitivities: simulated, and estimated from calibration lines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.espirit import espirit_maps
from wardround.imaging.acquisition.mri.masks import centred
from wardround.imaging.acquisition.mri.operator import ifft2c
from wardround.study.acquisition import Maps
from wardround.wire.host import on_host

#: What is said where maps have nothing to be estimated from.
NO_CENTRE = (
    "the centre of k-space was not measured, of which coil maps are estimated; measure some lines there (calibration), "
    "and store k-space with its centre in the middle"
)


def birdcage_maps(
    coils: int,
    shape: tuple[int, int],
    radius: float | ArrayLike = 1.5,
    *,
    angles: ArrayLike | None = None,
    phases: ArrayLike | None = None,
) -> NDArray[np.complex64]:
    """Sensitivities (C, H, W) of coils on a circle around the field of view, root sum of squares 1.

    radius: distance of the coils from the centre in half fields of view, one for all or (C,); corners are at sqrt(2).
    angles: (C,) positions in radians, evenly spaced by default. phases: (C,) receiver phases, default 0.
    By reciprocity a coil sees what its own field reaches; each rung is a long straight wire, whose field
    falls with the distance and turns with the angle around it: B_x - i B_y ~ 1 / (z - z_coil) for z = x + i y
    (Hoult and Richards, J. Magn. Reson. 24 (1976), 71).
    """
    if coils < 1:
        raise GeometryError(f"an acquisition needs at least one coil, got {coils}")
    even = 2 * np.pi * np.arange(coils) / coils
    positions = np.exp(1j * np.asarray(even if angles is None else angles, np.float64))
    gains = np.exp(1j * np.asarray(np.zeros(coils) if phases is None else phases, np.float64))
    height, width = shape
    y = (np.arange(height, dtype=np.float32) - height // 2) / (height / 2)
    x = (np.arange(width, dtype=np.float32) - width // 2) / (width / 2)
    z = (x[None, :] + 1j * y[:, None]).astype(np.complex64)
    # Half a voxel is the closest that a voxel's average comes to a wire.
    offset = z - (np.asarray(radius, np.float64) * positions).astype(np.complex64)[:, None, None]
    square = np.maximum(offset.real**2 + offset.imag**2, np.float32(1 / max(shape)) ** 2)
    maps = (np.conj(offset) / square) * (gains * positions).astype(np.complex64)[:, None, None]
    power = (maps.real**2 + maps.imag**2).sum(0)
    result: NDArray[np.complex64] = maps / np.sqrt(np.maximum(power, np.finfo(np.float32).tiny))
    return result


def low_resolution_maps(kspace: Tensor, mask: Tensor, *, floor: float = 0.02) -> Tensor:
    """Estimate sensitivities from the fully sampled centre of k-space.

    kspace: complex (B, C, H, W). mask: (B, H, W) or broadcastable. Returns (B, C, H, W): the tapered
    low-resolution coil images over their root sum of squares. Maps carry the image's low-resolution phase;
    their sum of squares is 1 in the object and falls to 0 where the signal is below `floor` times its peak.
    McKenzie et al., Magn. Reson. Med. 47 (2002), 529, with a Hann taper against ringing.
    Raises GeometryError where the centre of k-space was not measured.
    """
    batch, _, height, width = kspace.shape
    masks = mask[(None,) * (3 - mask.ndim)].expand(-1, height, width)
    windows = torch.stack([torch.from_numpy(_calibration_window(on_host(m))) for m in masks])
    window = windows.to(kspace.device, kspace.real.dtype).expand(batch, height, width)
    return over_root_sum_of_squares(ifft2c(kspace * window[:, None]), floor)


def over_root_sum_of_squares(images: Tensor, floor: float) -> Tensor:
    """Low-resolution coil images (B, C, H, W) as maps; where all are below `floor` times their peak they fall to 0."""
    power = torch.view_as_real(images).square().sum((1, -1), keepdim=True).squeeze(-1)
    lowest = floor**2 * power.amax((-2, -1), keepdim=True)
    return images * torch.maximum(power, lowest.clamp_min(torch.finfo(power.dtype).tiny)).rsqrt()


def estimate_maps(kspace: Tensor, mask: Tensor, how: Maps) -> Tensor:
    """Coil maps (B, C, H, W) of measured k-space (B, C, H, W), complex, and its mask, broadcastable to (B, H, W).

    how: `estimated` is `low_resolution_maps`, `espirit` is `espirit_maps`. The `true` maps of what was measured are
    not known: they are estimated as by `estimated`. Raises GeometryError where the centre was not measured, and for
    ESPIRiT of one coil or of fewer than 6 calibration lines.
    """
    if how != "espirit":
        return low_resolution_maps(kspace, mask)
    batch, _, height, width = kspace.shape
    masks = on_host(mask[(None,) * (3 - mask.ndim)].expand(batch, height, width))
    return torch.cat(
        [espirit_maps(one[None], calibration_region(measured)) for one, measured in zip(kspace, masks, strict=True)]
    )


def calibration_region(mask: NDArray[np.float32]) -> tuple[int, int]:
    """Size (rows, columns) of the largest fully sampled centred rectangle of a mask (H, W).

    Of all such rectangles the one whose shorter side, relative to its axis, is longest; then the largest. So
    a one-dimensional mask gives its central lines, and a disc a square rather than a strip.
    Raises GeometryError where the centre of k-space was not measured.
    """
    height, width = mask.shape
    sums = np.zeros((height + 1, width + 1), np.int64)
    sums[1:, 1:] = (mask != 0).cumsum(0).cumsum(1)
    rows, columns = np.arange(1, height + 1), np.arange(1, width + 1)
    top, left = height // 2 - rows // 2, width // 2 - columns // 2
    low, high = sums[top], sums[top + rows]
    inside = high[:, left + columns] - high[:, left] - low[:, left + columns] + low[:, left]
    area = rows[:, None] * columns
    full = inside == area
    if not full.any():
        raise GeometryError(NO_CENTRE)
    shorter = np.minimum(rows[:, None] / height, columns / width) * full
    best = np.argmax(np.where(shorter == shorter.max(), area * full, 0))
    return int(rows[best // width]), int(columns[best % width])


def _calibration_window(mask: NDArray[np.float32]) -> NDArray[np.float32]:
    sizes: Sequence[int] = calibration_region(mask)
    tapers = [_taper(count, size) for count, size in zip(sizes, mask.shape, strict=True)]
    return (tapers[0][:, None] * tapers[1][None, :]).astype(np.float32)


def _taper(count: int, size: int) -> NDArray[np.float64]:
    """Hann window over the central `count` of `size` samples; flat along an axis that is fully sampled."""
    taper = np.zeros(size)
    taper[centred(count, size)] = 1.0 if count == size else np.hanning(count + 2)[1:-1]
    return taper
