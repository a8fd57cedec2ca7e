"""Filtered back projection for parallel beams and for fan beams with flat and curved detectors.

Kak and Slaney, Principles of Computerized Tomographic Imaging (1988), chapter 3: equations 29 and 61 (parallel),
section 3.4.1 (curved detector, equiangular), section 3.4.2 (flat detector, equally spaced).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from wardround.errors import GeometryError
from wardround.imaging.acquisition.ct.cache import MatrixCache
from wardround.imaging.acquisition.ct.geometry import FloatArray, bin_positions, distances
from wardround.imaging.acquisition.ct.operator import CTProjector
from wardround.study.ct import CTGeometry

Window = Literal["ramp", "hann"]


def check_sweep(geometry: CTGeometry) -> None:
    """Raise GeometryError where the views do not make up a full circle (fans), or a half or full one (parallel)."""
    sweep = geometry.sweep_degrees
    if sweep != 360 and (geometry.kind != "parallel" or sweep > 180):
        raise GeometryError(
            f"filtered back projection of kind={geometry.kind} knows no weights for a sweep of {sweep:g} degrees; "
            "use 360, for parallel beams 180 or less, or an iterative reconstruction"
        )


class FBP:
    """Filtered back projection: sinograms (B, views, bins) to images (B, rows, columns) in 1/mm.

    Linear and differentiable. window: `ramp` is sharpest, `hann` smooths noise. The weights of the back projection
    are built once, here, and kept as `storage` says, see `CTProjector`.
    Raises GeometryError where the views do not make up a full circle (fans), or a half or full one (parallel).
    """

    def __init__(
        self,
        geometry: CTGeometry,
        window: Window = "ramp",
        *,
        storage: Literal["auto", "stored", "on_the_fly"] = "auto",
        cache: MatrixCache | None = None,
    ) -> None:
        check_sweep(geometry)
        self._back = CTProjector(geometry, model="fbp", storage=storage, uses="adjoint", cache=cache)
        self._response = torch.from_numpy(_response(geometry, window))
        self._scale = torch.from_numpy(_ray_weights(geometry))

    def __call__(self, sinograms: Tensor) -> Tensor:
        length = 2 * (len(self._response) - 1)
        spectrum = torch.fft.rfft(sinograms * self._scale.to(sinograms), length) * self._response.to(sinograms)
        filtered = torch.fft.irfft(spectrum, length)[..., : sinograms.shape[-1]]
        return self._back.A_adjoint(filtered.contiguous())


def fbp(sinograms: Tensor, geometry: CTGeometry, window: Window = "ramp") -> Tensor:
    """Reconstruct once; build an `FBP` for more than one call with the same geometry."""
    return FBP(geometry, window, storage="on_the_fly")(sinograms)


def _ray_weights(geometry: CTGeometry) -> FloatArray:
    """What data are multiplied with before the filter, (bins,): angle steps, redundancy and the fan's cosine."""
    step = math.radians(geometry.sweep_degrees) / geometry.views
    redundancy = 2 if geometry.sweep_degrees == 360 else 1
    if geometry.kind == "parallel":
        return np.full(geometry.bins, step / redundancy)
    source, detector = distances(geometry)
    u = bin_positions(geometry)
    if geometry.kind == "fan_flat":
        return np.asarray(step / redundancy * np.cos(np.arctan(u / detector)))
    return np.asarray(step / redundancy * source * np.cos(u / detector))


def _response(geometry: CTGeometry, window: Window) -> FloatArray:
    """Frequency response of the filter, from its exact band-limited samples, which keep the mean right."""
    spacing = geometry.bin
    if geometry.kind != "parallel":
        source, detector = distances(geometry)
        # Flat: the detector scaled down to the isocentre. Curved: radians.
        spacing = geometry.bin * source / detector if geometry.kind == "fan_flat" else geometry.bin / detector
    half = 2 ** math.ceil(math.log2(max(geometry.bins, 2)))  # padded to twice: no wrap-around
    n = np.arange(-half, half)
    odd = n % 2 == 1
    kernel = np.zeros(2 * half)
    distance = n[odd] * spacing
    if geometry.kind == "fan_arc":
        # Beyond the detector's own width the kernel meets zeros only; there the sine may vanish.
        within = np.abs(n[odd]) < geometry.bins
        distance = np.where(within, np.sin(np.where(within, distance, 1.0)), np.inf)
    kernel[odd] = -1 / (np.pi * distance) ** 2
    kernel[n == 0] = 1 / (4 * spacing**2)
    response = np.fft.rfft(np.fft.ifftshift(kernel)).real * spacing
    if window == "hann":
        response *= 0.5 * (1 + np.cos(np.linspace(0, np.pi, half + 1)))
    return np.asarray(response)
