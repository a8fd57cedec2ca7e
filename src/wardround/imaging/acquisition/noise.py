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

    With noise of standard deviation sigma per component this estimates sigma^2 Psi, each entry to about
    sigma^2 / sqrt(samples). Sums are in double precision, as scanners' units may be tiny or huge.
    """
    samples = noise.reshape(noise.shape[0], -1).to(torch.complex128)
    covariance = samples @ samples.mH / (2 * samples.shape[1])
    return covariance.to(noise.dtype)


def corner_covariance(kspace: Tensor, mask: Tensor, share: float = 0.05) -> Tensor:
    """Estimate the noise's covariance (C, C) from a scan's own k-space, where no noise scan was measured.

    kspace: complex (..., C, H, W), the slices of one scan; mask: (H, W), 1 where measured. Taken are the `share` of the
    measured samples that lie farthest from the centre, each axis relative to its length, where the signal is weakest.
    What signal is left there counts as noise, so this never says too little; noise scans are better. K-space that was
    filled with zeros, filtered or interpolated has no noise in its corners: its mask must leave those out.
    Raises GeometryError where fewer samples than 10 for each coil are left.
    """
    coils, height, width = kspace.shape[-3:]
    rows = torch.arange(height, device=kspace.device, dtype=torch.float64) / height - (height // 2) / height
    columns = torch.arange(width, device=kspace.device, dtype=torch.float64) / width - (width // 2) / width
    distance = rows[:, None].square() + columns.square()
    measured = (mask != 0).to(kspace.device).expand(height, width)
    far = distance[measured].sort(descending=True).values
    count = int(share * len(far))
    slices = kspace[..., 0, 0, 0].numel()
    if count * slices < 10 * coils:
        raise GeometryError(
            f"the outer {share:.0%} of k-space hold {count * slices} samples, too few for the covariance of {coils} "
            "coils; give a larger share, or measure noise"
        )
    outer = measured & (distance >= far[count - 1])
    return estimate_covariance(kspace.movedim(-3, 0)[..., outer])


def whiten(data: Tensor, covariance: Tensor, axis: int = -3) -> Tensor:
    """Decorrelate coils: L^-1 data with covariance = L L*; `axis` is that of the coils.

    data: complex k-space or maps (..., C, H, W), or readouts (C, samples) with `axis=0`. What had this covariance has
    afterwards the identity (real and imaginary parts of standard deviation 1). Applied to both k-space and maps it
    leaves the image unchanged, and least squares is then the fit of least variance, the best signal-to-noise ratio that
    a linear combination of the coils can have (Pruessmann et al., Magn. Reson. Med. 46 (2001), 638; Roemer et al.,
    Magn. Reson. Med. 16 (1990), 192). Maps estimated from whitened k-space are those of the whitened coils.
    covariance: (C, C), real or complex; factored in double precision. Raises GeometryError where it does not fit the
    data, or is not positive definite.
    """
    coils = data.shape[axis]
    if covariance.shape != (coils, coils):
        raise GeometryError(
            f"the noise covariance has shape {tuple(covariance.shape)}, but the data have {coils} coils on axis "
            f"{axis}; it must be {(coils, coils)}"
        )
    factor, info = torch.linalg.cholesky_ex(covariance.to(torch.complex128))
    if on_host(info).any():
        raise GeometryError(
            "the noise covariance is not positive definite; measure more noise samples than there are coils"
        )
    identity = torch.eye(coils, dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False).to(data.dtype)
    white: Tensor = torch.tensordot(inverse, data.movedim(axis, 0), dims=1)
    return white.movedim(0, axis)


def _cholesky(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    try:
        return np.asarray(np.linalg.cholesky(covariance), np.float64)
    except np.linalg.LinAlgError:
        raise GeometryError(
            "the noise covariance is not positive definite; lower the correlation between coils"
        ) from None
