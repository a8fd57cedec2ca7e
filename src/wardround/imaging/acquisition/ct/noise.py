"""Hounsfield units, photon statistics and dose.

N ~ Poisson(I0 exp(-p)) + Normal(0, s^2) photons reach a bin, and y = -ln(max(N, 1) / I0): counts below one photon,
which electronic noise can make zero or negative, are raised to one, as scanners do before the logarithm. To first
order Var(y) = exp(p) / I0 + s^2 exp(2 p) / I0^2 (Thibault et al., Med. Phys. 33 (2006), in the limit of many
photons).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wardround.errors import GeometryError
from wardround.study.ct import MU_WATER

FloatArray = NDArray[np.float32]
ArrayOrTensor = TypeVar("ArrayOrTensor", NDArray[np.float32], NDArray[np.float64], Tensor)
_FEWEST_PHOTONS = 1.0


def hu_to_mu(hu: ArrayOrTensor, mu_water: float = MU_WATER) -> ArrayOrTensor:
    """Attenuation in 1/mm of Hounsfield units; below -1000 HU, as in the padding of some vendors, it is 0."""
    return ((hu / 1000 + 1) * mu_water).clip(min=0)


def mu_to_hu(mu: ArrayOrTensor, mu_water: float = MU_WATER) -> ArrayOrTensor:
    """Hounsfield units of attenuation in 1/mm."""
    return (mu / mu_water - 1) * 1000


def measure(
    line_integrals: NDArray[np.float32] | NDArray[np.float64],
    photons: float,
    electronic_noise: float,
    random: np.random.Generator,
) -> FloatArray:
    """Draw noisy line integrals for `photons` through air in each bin and read-out noise in photons."""
    counts = random.poisson(photons * np.exp(-line_integrals.astype(np.float64))).astype(np.float64)
    if electronic_noise > 0:
        counts += electronic_noise * random.standard_normal(counts.shape)
    return line_integrals_of(counts, photons)


def line_integrals_of(counts: NDArray[np.float64], photons: float) -> FloatArray:
    """Line integrals of photon counts; counts below one photon are raised to one."""
    measured: FloatArray = np.log(photons / np.maximum(counts, _FEWEST_PHOTONS)).astype(np.float32)
    return measured


def variance(line_integrals: ArrayOrTensor, photons: float | ArrayOrTensor, electronic_noise: float) -> ArrayOrTensor:
    """Variance of measured line integrals, to first order; `photons` of arrays may be one number for each."""
    share = _exp(line_integrals) / photons  # one over the expected photons
    return share * (share * electronic_noise**2 + 1)


def insert_noise(
    line_integrals: FloatArray,
    fraction: float,
    photons: float | FloatArray,
    electronic_noise: float,
    random: np.random.Generator,
) -> FloatArray:
    """Turn measured line integrals into those of a scan with `fraction` of the dose, by adding what noise it lacks.

    photons: I0 of the existing scan, one number or an array that fits the line integrals, as detectors have one a bin.
    Afterwards I0 is fraction * photons, and counts below one photon are one.
    Yu et al., J. Comput. Assist. Tomogr. 36 (2012), 477. Raises GeometryError unless 0 < fraction <= 1.
    """
    if not 0 < fraction <= 1:
        raise GeometryError(f"a dose can only be lowered: fraction must be above 0 and at most 1, got {fraction:g}")
    full, before = line_integrals.astype(np.float64), np.asarray(photons, np.float64)
    lacking = variance(full, fraction * before, electronic_noise) - variance(full, before, electronic_noise)
    noise = np.sqrt(np.maximum(lacking, 0)) * random.standard_normal(full.shape)
    darkest = np.log(fraction * before / _FEWEST_PHOTONS)
    return np.asarray(np.minimum(full + noise, darkest), np.float32)


def _exp(x: ArrayOrTensor) -> ArrayOrTensor:
    return x.exp() if isinstance(x, Tensor) else np.exp(x)
