"""A simulated multi-coil acquisition of a magnitude image: k = M (F(S x e^{i phi}) + n)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.coils import birdcage_maps, estimate_maps
from wardround.imaging.acquisition.mri.masks import sampling_mask
from wardround.imaging.acquisition.mri.operator import fft2c
from wardround.imaging.acquisition.noise import coil_noise, ring_covariance
from wardround.study import MRIAcquisition
from wardround.study.acquisition import CoilAcquisition

_JITTER = 0.25  # of the spacing between coils: no two scans have their coils in quite the same place
_ORDER = 4  # cosines per axis of the phase: at most 1.5 periods over the field of view


@dataclass(frozen=True)
class SimulatedScan:
    """What a scanner hands to reconstruction: one slice, without a batch axis.

    kspace: complex64 (C, H, W), 0 where not measured. mask: float32 (H, W). maps: complex64 (C, H, W),
    estimated from the calibration lines or true, as the acquisition says.
    """

    kspace: Tensor
    mask: Tensor
    maps: Tensor


def simulate(
    image: NDArray[np.float32],
    acquisition: MRIAcquisition,
    random: np.random.Generator,
    mask: NDArray[np.float32] | None = None,
) -> SimulatedScan:
    """Simulate a scan of a magnitude image (H, W), peak 1.

    Coil positions, receiver phases, image phase, mask (unless given) and noise are drawn from `random`. Noise
    has standard deviation `acquisition.noise` in the real and in the imaginary part of each coil, relative to
    an image peak of 1 (the transform is orthonormal, so the same in k-space and image); coils stay correlated
    as configured, see `imaging.acquisition.noise.whiten`. Raises GeometryError where image or mask do not fit.
    """
    if image.ndim != 2 or (mask is not None and mask.shape != image.shape):
        raise GeometryError(
            f"simulate takes one image (H, W) and a mask of the same shape, got {image.shape} and "
            f"{None if mask is None else mask.shape}"
        )
    shape = (image.shape[0], image.shape[1])
    true_maps, seen = coil_images(image, acquisition, random)
    if mask is None:
        mask = sampling_mask(acquisition.mask, shape, random)
    measured = torch.from_numpy(mask != 0)
    kspace = fft2c(seen)
    samples = kspace[:, measured]
    if acquisition.noise > 0:
        covariance = ring_covariance(acquisition.coils, acquisition.noise_correlation)
        samples += torch.from_numpy(coil_noise(covariance, samples.shape[1], acquisition.noise, random))
    kspace.zero_()
    kspace[:, measured] = samples
    weights = measured.float()
    if acquisition.maps == "true":
        known = true_maps
    else:
        known = estimate_maps(kspace[None], weights[None], acquisition.maps)[0]
    return SimulatedScan(kspace=kspace, mask=weights, maps=known)


def coil_images(
    image: NDArray[np.float32], acquisition: CoilAcquisition, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Maps (C, H, W) of coils somewhere around an image (H, W), and what they see of it with a phase of its own."""
    shape = (image.shape[0], image.shape[1])
    maps = torch.from_numpy(_random_maps(acquisition, shape, random))
    phase = smooth_phase(shape, acquisition.phase, random)
    return maps, maps * torch.from_numpy(np.asarray(image, np.float32) * np.exp(1j * phase))


def smooth_phase(shape: tuple[int, int], strength: float, random: np.random.Generator) -> NDArray[np.float32]:
    """Draw a smooth phase map (H, W) in radians whose largest absolute value is `strength`.

    A sum of low-order cosines whose random amplitudes fall with the order, like the field of imperfect shims.
    """
    amplitudes = random.standard_normal((_ORDER, _ORDER)).astype(np.float32)
    order = np.arange(_ORDER, dtype=np.float32)
    amplitudes /= 1 + order[:, None] ** 2 + order**2
    amplitudes[0, 0] = 0
    rows, columns = (np.cos(np.pi * np.outer(order, (np.arange(n) + 0.5) / n)) for n in shape)
    field = rows.T @ amplitudes @ columns
    phase: NDArray[np.float32] = (strength * field / np.abs(field).max()).astype(np.float32)
    return phase


def _random_maps(
    acquisition: CoilAcquisition, shape: tuple[int, int], random: np.random.Generator
) -> NDArray[np.complex64]:
    coils = acquisition.coils
    jitter = random.uniform(-_JITTER, _JITTER, coils)
    angles = 2 * np.pi * (np.arange(coils) + random.random() + jitter) / coils
    phases = random.uniform(0, 2 * np.pi, coils)
    return birdcage_maps(coils, shape, acquisition.coil_radius, angles=angles, phases=phases)
