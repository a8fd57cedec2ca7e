"""Thermal noise of a coil array: correlated between coils, white over k-space.

The covariance Psi (C, C) has a unit diagonal and describes noise whose real and imaginary parts have standard
deviation 1 each, so E[n n*] = 2 sigma^2 Psi for noise of standard deviation sigma per component.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wardround.errors import GeometryError
from wardround.wire.host import on_host


def ring_covariance(coils: int, correlation: float) -> NDArray[np.float64]:
    """Noise covariance (C, C) of coils on a ring: correlation^d between coils d places apart, unit diagonal.

    Positive definite for 0 <= correlation < 1.
    """
    index = np.arange(coils)
    apart = np.abs(index[:, None] - index)
    return np.asarray(correlation ** np.minimum(apart, coils - apart).astype(np.float64))


def coil_noise(
    covariance: NDArray[np.float64], samples: int, std: float, random: np.random.Generator
) -> NDArray[np.complex64]:
    """Draw noise (C, samples); real and imaginary part of every coil have standard deviation `std` each."""
    coils = covariance.shape[0]
    white = random.standard_normal((coils, samples, 2), dtype=np.float32).view(np.complex64)[..., 0]
    if not np.any(covariance - np.diag(np.diag(covariance))):
        result: NDArray[np.complex64] = white * np.sqrt(np.diag(covariance))[:, None].astype(np.float32)
    else:
        result = _cholesky(covariance).astype(np.complex64) @ white
    result *= np.float32(std)
    return result


def estimate_covariance(noise: Tensor) -> Tensor:
    """Estimate E[n n*] / 2, complex Hermitian (C, C), from noise samples (C, ...) taken without excitation.

    With noise of standard deviation sigma per component this estimates sigma^2 Psi.
    """
    samples = noise.reshape(noise.shape[0], -1)
    return samples @ samples.conj().T / (2 * samples.shape[1])


def whiten(data: Tensor, covariance: Tensor) -> Tensor:
    """Decorrelate coils: L^-1 data with covariance = L L*, for k-space or maps (..., C, H, W).

    Applied to both k-space and maps it leaves the image unchanged and makes least squares the likeliest fit
    (Pruessmann et al., Magn. Reson. Med. 46 (2001), 638). covariance: (C, C), real or complex.
    Raises GeometryError where the covariance is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(covariance.to(data.dtype))
    if on_host(info).any():
        raise GeometryError(
            "the noise covariance is not positive definite; measure more noise samples than there are coils"
        )
    flat = data.flatten(-2)
    white: Tensor = torch.linalg.solve_triangular(factor, flat, upper=False)
    return white.reshape(data.shape)


def _cholesky(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    try:
        return np.asarray(np.linalg.cholesky(covariance), np.float64)
    except np.linalg.LinAlgError:
        raise GeometryError(
            "the noise covariance is not positive definite; lower the correlation between coils"
        ) from None
