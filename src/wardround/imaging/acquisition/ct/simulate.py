"""A simulated CT scan of a slice in Hounsfield units.

Projections come from a finer grid and from areas (the strip model), reconstruction works on the geometry's grid
with lines (Joseph): no network can learn to invert the simulator instead of the scanner (the inverse crime).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from wardround.errors import GeometryError
from wardround.imaging.acquisition.ct.beam_hardening import bone_share, tube_spectrum
from wardround.imaging.acquisition.ct.cache import MatrixCache
from wardround.imaging.acquisition.ct.noise import hu_to_mu, measure
from wardround.imaging.acquisition.ct.operator import CTProjector
from wardround.study.ct import CTAcquisition, CTGeometry

FloatArray = NDArray[np.float32]
REFINEMENT = 2


@dataclass(frozen=True)
class CTMeasurement:
    """What a scanner hands to reconstruction, and the truth: one slice, float32, without a batch axis.

    sinogram: measured line integrals (views, bins), corrected for water where the beam hardens; their variance is what
    `CTSystem.uncertainty` says. reference: attenuation in 1/mm on the geometry's grid (rows, columns), the area average
    of what was scanned.
    """

    sinogram: Tensor
    reference: Tensor


class CTSimulator:
    """Scans slices with one acquisition; the projector is built once, here.

    refinement: how many times finer than the image the simulation's grid is, at least 2.
    Raises GeometryError where the acquisition's field of view misses the patient.
    """

    def __init__(
        self,
        acquisition: CTAcquisition,
        *,
        refinement: int = REFINEMENT,
        memory_limit: float | None = None,
        cache: MatrixCache | None = None,
    ) -> None:
        if refinement < 2:
            raise GeometryError(f"a simulation needs a grid at least twice as fine as the image, got {refinement}")
        self.acquisition = acquisition
        self.refinement = refinement
        fine = refined(acquisition.geometry, refinement)
        self._projector = CTProjector(fine, model="strip", memory_limit=memory_limit, uses="forward", cache=cache)
        self._spectrum = tube_spectrum(acquisition.kvp) if acquisition.beam_hardening else None
        self._correction = self._spectrum.water_correction(acquisition.mu_water) if self._spectrum else None

    def __call__(self, image: FloatArray, random: np.random.Generator) -> CTMeasurement:
        """Scan an image in HU, (rows, columns) of the geometry or of the finer grid; noise is drawn from `random`.

        A coarse image is refined by linear interpolation. Raises GeometryError where the shape is neither.
        """
        acquisition = self.acquisition
        hu = self._on_fine_grid(np.asarray(image, np.float32))
        mu = hu_to_mu(hu, acquisition.mu_water)
        path = self._attenuation(hu, mu)
        measured = measure(path, acquisition.photons, acquisition.electronic_noise, random)
        if self._correction is not None:
            measured = np.asarray(self._correction(measured), np.float32)
        rows, columns = acquisition.geometry.size
        reference = mu.reshape(rows, self.refinement, columns, self.refinement).mean((1, 3))
        return CTMeasurement(*(torch.from_numpy(part) for part in (measured, reference)))

    def _on_fine_grid(self, image: FloatArray) -> FloatArray:
        coarse, fine = self.acquisition.geometry.size, self._projector.image_shape
        if image.shape == fine:
            return image
        if image.shape == coarse:
            return np.asarray(ndimage.zoom(image, self.refinement, order=1, mode="nearest", grid_mode=True), np.float32)
        raise GeometryError(
            f"the image is {'x'.join(map(str, image.shape))}, the geometry's grid {coarse[0]}x{coarse[1]} and the "
            f"simulation's {fine[0]}x{fine[1]}; resample the image to one of the two"
        )

    def _attenuation(self, hu: FloatArray, mu: FloatArray) -> FloatArray:
        if self._spectrum is None:
            return np.asarray(self._project(mu)[0])
        bone = mu * bone_share(hu.astype(np.float64)).astype(np.float32)
        soft_path, bone_path = self._project(mu - bone, bone).astype(np.float64)
        return self._spectrum.measure(soft_path, bone_path).astype(np.float32)

    def _project(self, *images: FloatArray) -> FloatArray:
        with torch.no_grad():
            paths: FloatArray = self._projector.A(torch.from_numpy(np.stack(images))).numpy()
        return paths


def simulate_ct(image: FloatArray, acquisition: CTAcquisition, random: np.random.Generator) -> CTMeasurement:
    """Scan one image in HU, given on the geometry's grid or on one finer by a whole number of times.

    Build a `CTSimulator` for more than one slice of the same acquisition. Raises GeometryError as it does.
    """
    times = [n // m for n, m in zip(image.shape, acquisition.geometry.size, strict=False)] or [1]
    return CTSimulator(acquisition, refinement=max(REFINEMENT, times[0]))(image, random)


def refined(geometry: CTGeometry, times: int = REFINEMENT) -> CTGeometry:
    """The same scanner with a grid so many times finer, on which its scans are simulated."""
    rows, columns = geometry.size
    body = geometry.body_radius or min(rows, columns) * geometry.pixel / 2
    finer = {"size": (rows * times, columns * times), "pixel": geometry.pixel / times, "body_radius": body}
    return geometry.model_copy(update=finer)
