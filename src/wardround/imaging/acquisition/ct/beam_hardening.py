"""A tube's spectrum and its water correction.

Soft photons are absorbed first, so a ray through twice the tissue is attenuated less than twice. Scanners map every
measurement to what one energy would have given in water; bone stays wrong, which shows as cupping and dark bands.
The spectrum is Kramers' law behind aluminium, seen by a detector that sums energy (Kramers, Phil. Mag. 46 (1923),
836); attenuation is from NIST's tables (Hubbell and Seltzer, NISTIR 5632), interpolated on logarithmic axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]

# keV; then cm^2/g of water, cortical bone (ICRU-44) and aluminium, and their densities in g/cm^3.
_ENERGY = np.array([20, 30, 40, 50, 60, 80, 100, 150.0])
_WATER = np.array([0.8096, 0.3756, 0.2683, 0.2269, 0.2059, 0.1837, 0.1707, 0.1505])
_BONE = np.array([4.001, 1.331, 0.6655, 0.4242, 0.3148, 0.2229, 0.1855, 0.1480])
_ALUMINIUM = np.array([3.441, 1.128, 0.5685, 0.3681, 0.2778, 0.2018, 0.1704, 0.1378])
_BONE_DENSITY, _ALUMINIUM_DENSITY = 1.92, 2.699
_FILTER = 6.0  # mm of aluminium: tube window, filter and the thin end of a bowtie
_REFERENCE = 70.0  # keV at which attenuation images are given
_STEP = 2.0  # keV
_BONE_STARTS, _BONE_PURE = 150.0, 1500.0  # HU between which bone replaces soft tissue
_DEGREE = 6
_THICKEST = 500.0  # mm of water that the correction is fitted to


@dataclass(frozen=True)
class Spectrum:
    """Shares of the detector's signal by energy, (E,), and attenuation relative to that at 70 keV, each (E,)."""

    share: FloatArray
    water: FloatArray
    bone: FloatArray

    def measure(self, soft: FloatArray, bone: FloatArray) -> FloatArray:
        """Attenuation of the whole spectrum behind soft tissue and bone, given their line integrals at 70 keV."""
        transmitted = np.zeros_like(soft)
        for share, of_soft, of_bone in zip(self.share, self.water, self.bone, strict=True):
            transmitted += share * np.exp(-of_soft * soft - of_bone * bone)
        return np.asarray(-np.log(transmitted))

    def in_water(self, path: Tensor) -> tuple[Tensor, Tensor]:
        """Attenuation M(p) of the whole spectrum behind water whose line integral at 70 keV is p, and the slope M'(p).

        M(p) = -ln sum_E s_E exp(-w_E p); the water correction is its inverse, with the slope 1 / M'.
        """
        transmitted, absorbed = torch.zeros_like(path), torch.zeros_like(path)
        for share, of_water in zip(self.share.tolist(), self.water.tolist(), strict=True):
            part = share * torch.exp(-of_water * path)
            transmitted += part
            absorbed += of_water * part
        return -transmitted.log(), absorbed / transmitted

    def water_correction(self, mu_water: float) -> np.polynomial.Polynomial:
        """The polynomial from measured attenuation to the line integral at 70 keV, exact for water within 0.1 %."""
        path = np.linspace(0, _THICKEST * mu_water, 500)[1:]
        measured = self.measure(path, np.zeros_like(path))
        # Fitted to the ratio, so that the polynomial passes through 0 and thin objects count as much as thick ones.
        ratio = np.polynomial.Polynomial.fit(measured, path / measured, _DEGREE - 1)
        return ratio.convert() * np.polynomial.Polynomial([0.0, 1.0])


def tube_spectrum(kvp: float) -> Spectrum:
    """The spectrum of a tube at `kvp` kilovolts, 60 to 150."""
    energy = np.arange(_ENERGY[0], kvp, _STEP) + _STEP / 2
    photons = (kvp / energy - 1) * np.exp(-_FILTER * _attenuation(_ALUMINIUM, energy) * _ALUMINIUM_DENSITY / 10)
    share = photons * energy
    water, bone = (
        _attenuation(table, energy) / _attenuation(table, np.array([_REFERENCE])) for table in (_WATER, _BONE)
    )
    return Spectrum(share / share.sum(), water, bone)


def bone_share(hu: FloatArray) -> FloatArray:
    """Share of a pixel's attenuation that is bone: 0 up to 150 HU, 1 from 1500 HU."""
    return np.clip((hu - _BONE_STARTS) / (_BONE_PURE - _BONE_STARTS), 0.0, 1.0)


def _attenuation(table: FloatArray, energy: FloatArray) -> FloatArray:
    return np.asarray(np.exp(np.interp(np.log(energy), np.log(_ENERGY), np.log(table))))
