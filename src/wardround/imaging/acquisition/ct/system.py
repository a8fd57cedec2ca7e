"""A CT scanner as a network sees it: well scaled, with its filtered back projection and its protocol."""

from __future__ import annotations

import torch
from torch import Tensor

from wardround.imaging.acquisition.ct.beam_hardening import tube_spectrum
from wardround.imaging.acquisition.ct.cache import MatrixCache
from wardround.imaging.acquisition.ct.fbp import FBP
from wardround.imaging.acquisition.ct.noise import variance
from wardround.imaging.acquisition.ct.operator import CTProjector
from wardround.imaging.acquisition.ct.scanners import protocol_features
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.study.ct import CTAcquisition


class CTSystem(LinearOperator):
    """The projector of an acquisition in units that suit networks.

    Images (B, rows, columns) are attenuation relative to water: HU = 1000 (x - 1). Data are line integrals divided by
    `data_scale`, which makes |A| = 1. Build one a scanner and keep it: its matrices are made here.
    Raises GeometryError where the detector misses the patient.
    """

    def __init__(self, acquisition: CTAcquisition, *, cache: MatrixCache | None = None) -> None:
        self.acquisition = acquisition
        self._projector = CTProjector(acquisition.geometry, cache=cache)
        self._fbp = FBP(acquisition.geometry, "hann", cache=cache)
        self._water = acquisition.mu_water
        like = torch.zeros(1, *acquisition.geometry.size)
        self.data_scale = float(self._projector.norm(like)) * self._water
        self._spectrum = tube_spectrum(acquisition.kvp) if acquisition.beam_hardening else None
        self._protocol = torch.from_numpy(protocol_features(acquisition))

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self._projector.image_shape

    @property
    def data_shape(self) -> tuple[int, ...]:
        return self._projector.data_shape

    @property
    def protocol(self) -> Tensor:
        return self._protocol

    def to(self, device: torch.device) -> CTSystem:
        """Itself: matrices are copied once to each device that data come from, and batches of one scanner share it."""
        return self

    def scaled(self, sinogram: Tensor) -> Tensor:
        """Line integrals (B, views, bins) as the data of this operator."""
        return sinogram / self.data_scale

    def A(self, x: Tensor) -> Tensor:
        return self._projector.A(x) * (self._water / self.data_scale)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self._projector.A_adjoint(y) * (self._water / self.data_scale)

    def normal(self, x: Tensor) -> Tensor:
        return self._projector.normal(x) * (self._water / self.data_scale) ** 2

    def norm(self, like: Tensor, *, iterations: int = 10) -> Tensor:
        return torch.ones(like.shape[0], dtype=like.real.dtype, device=like.device)

    def initial(self, y: Tensor) -> Tensor:
        """Filtered back projection with a Hann window, in the units of the images."""
        return self._fbp(y * self.data_scale) / self._water

    def uncertainty(self, y: Tensor) -> Tensor:
        """The variance of each line integral to first order, (s_N / N)^2 of the N photons behind its ray.

        With beam hardening p is what the water correction made of a measured M(p): the variance of M over M'(p)^2.
        """
        path = (y * self.data_scale).clamp_min(0.0)
        photons, noise = self.acquisition.photons, self.acquisition.electronic_noise
        if self._spectrum is None:
            return variance(path, photons, noise)
        measured, slope = self._spectrum.in_water(path)
        return variance(measured, photons, noise) / slope.square()
