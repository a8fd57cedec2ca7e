"""A simulated multi-coil acquisition of a magnitude image: k = M (F(S x e^{i phi}) + n)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.coils import birdcage_maps, estimate_maps
from wardround.imaging.acquisition.mri.masks import sampling_mask
from wardround.imaging.acquisition.mri.operator import fft2c, ifft2c
from wardround.imaging.acquisition.noise import coil_noise, ring_covariance
from wardround.study import MRIAcquisition
from wardround.study.acquisition import CoilAcquisition

_JITTER = 0.25  # of the spacing between coils: no two scans have their coils in quite the same place
_ORDER = 4  # cosines per axis of the phase: at most 1.5 periods over the field of view


@dataclass(frozen=True)
class SimulatedScan:
    """What a scanner hands to reconstruction: one slice, without a batch axis.

    kspace: complex64 (C, H, W), 0 where not measured. mask: float32 (H, W). maps: complex64 (C, H, W),
    estimated from the calibration lines or true, as the acquisition says. reference: float32 (H, W), the magnitude of
    the scan with all lines and their noise, where the acquisition says so.
    """

    kspace: Tensor
    mask: Tensor
    maps: Tensor
    reference: Tensor | None = None


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
    as configured, see `imaging.acquisition.noise.whiten`. Local phase (`anatomical_phase`), unlike coils and the noise
    of lines that are not measured are drawn only where the acquisition has them. Raises GeometryError where image or
    mask do not fit.
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
    covariance = ring_covariance(acquisition.coils, acquisition.noise_correlation)

    def noisy(samples: Tensor) -> Tensor:
        if acquisition.noise > 0:
            samples += torch.from_numpy(coil_noise(covariance, samples.shape[1], acquisition.noise, random))
        return samples

    samples = noisy(samples)
    reference = None
    if acquisition.reference == "scan":
        kspace[:, measured] = samples
        kspace[:, ~measured] = noisy(kspace[:, ~measured])
        reference = (true_maps.conj() * ifft2c(kspace)).sum(0).abs()
    kspace.zero_()
    kspace[:, measured] = samples
    weights = measured.float()
    if acquisition.maps == "true":
        known = true_maps
    else:
        known = estimate_maps(kspace[None], weights[None], acquisition.maps)[0]
    return SimulatedScan(kspace=kspace, mask=weights, maps=known, reference=reference)


def coil_images(
    image: NDArray[np.float32], acquisition: CoilAcquisition, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Maps (C, H, W) of coils somewhere around an image (H, W), and what they see of it with a phase of its own."""
    shape = (image.shape[0], image.shape[1])
    maps = torch.from_numpy(_random_maps(acquisition, shape, random))
    phase = smooth_phase(shape, acquisition.phase, random)
    if acquisition.phase_detail > 0:
        phase = phase + anatomical_phase(image, acquisition.phase_detail, random)
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


def anatomical_phase(image: NDArray[np.float32], strength: float, random: np.random.Generator) -> NDArray[np.float32]:
    """Draw phase (H, W) in radians that follows an image (H, W) of peak 1, each of its three parts up to `strength`.

    Tissues differ (chemical shift, susceptibility): a random share of the intensity. Edges of tissue: the difference of
    two blurred images. Vessels and air cavities: two to six round objects in the head with the field of a cylinder
    across the main field, (a / r)^2 cos 2 theta outside and none inside (Haacke et al., Magnetic Resonance Imaging,
    1999, chapter 25).
    """
    shape = image.shape
    unit = max(shape) / 128
    levels = ndimage.gaussian_filter(image, unit * random.uniform(0.3, 1.0))
    tissue = levels / max(float(levels.max()), 1e-6)
    edges = levels - ndimage.gaussian_filter(image, unit * random.uniform(2.0, 6.0))
    edges = edges / max(float(np.abs(edges).max()), 1e-6)
    phase = random.uniform(-1, 1) * tissue + random.uniform(-1, 1) * edges
    inside = np.argwhere(image > 0.1)
    for _ in range(int(random.integers(2, 7)) if len(inside) else 0):
        row, column = inside[random.integers(len(inside))]
        radius, angle = unit * random.uniform(1.5, 5.0), random.uniform(0, np.pi)
        field = dipole_field((shape[0], shape[1]), (float(row), float(column)), radius, angle)
        phase = phase + random.uniform(-1, 1) * field
    return np.asarray(strength * phase, dtype=np.float32)


def dipole_field(
    shape: tuple[int, int], centre: tuple[float, float], radius: float, angle: float
) -> NDArray[np.float32]:
    """Field (H, W) of a cylinder through the image at `centre` (row, column), of at most 1: (a / r)^2 cos 2 theta.

    None inside its `radius` a. theta is the angle at the centre to a main field at `angle` to the rows.
    """
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    z = (x - centre[1] + 1j * (y - centre[0])) * np.exp(-1j * angle)
    square = np.abs(z) ** 2
    field = np.where(square > radius**2, radius**2 * (z**2).real / np.maximum(square, 1.0) ** 2, 0.0)
    return np.asarray(field, dtype=np.float32)


def _random_maps(
    acquisition: CoilAcquisition, shape: tuple[int, int], random: np.random.Generator
) -> NDArray[np.complex64]:
    coils = acquisition.coils
    jitter = random.uniform(-_JITTER, _JITTER, coils)
    angles = 2 * np.pi * (np.arange(coils) + random.random() + jitter) / coils
    phases = random.uniform(0, 2 * np.pi, coils)
    variety = acquisition.coil_variety
    if variety == 0:
        return birdcage_maps(coils, shape, acquisition.coil_radius, angles=angles, phases=phases)
    radii = 1 + (acquisition.coil_radius - 1) * np.exp(variety * random.uniform(-1, 1, coils))
    maps = birdcage_maps(coils, shape, radii, angles=angles, phases=phases)
    for each in maps:
        # Loading by the body and neighbouring coils: a gain, and a field that deviates smoothly from a wire's.
        change = smooth_phase(shape, variety, random) + 1j * smooth_phase(shape, variety, random)
        each *= np.exp(variety * random.standard_normal() + change).astype(np.complex64)
    power = (maps.real**2 + maps.imag**2).sum(0)
    result: NDArray[np.complex64] = maps / np.sqrt(np.maximum(power, np.finfo(np.float32).tiny))
    return result
