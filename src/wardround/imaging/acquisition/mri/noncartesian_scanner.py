"""A site's simulated scanner that goes through k-space along radial lines or spirals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.noncartesian import NonCartesianMRI, gridded_maps
from wardround.imaging.acquisition.mri.nufft import EVALUATION, transform_of
from wardround.imaging.acquisition.mri.simulate import coil_images
from wardround.imaging.acquisition.mri.trajectories import (
    dense_radius,
    even_weights,
    radial,
    radial_areas,
    spiral,
    spiral_areas,
    spoke_angles,
    spoke_radii,
)
from wardround.imaging.acquisition.noise import coil_noise, ring_covariance
from wardround.study.noncartesian import NonCartesianAcquisition, Radial, Spiral
from wardround.wire.random import public_generator


@dataclass(frozen=True, eq=False)
class Path:
    """A trajectory (S, 2), the weights (S,) of its samples and the areas (S,) that they stand for, float32.

    Coil maps are estimated from its centre up to `radius`; `None` where they are known.
    """

    trajectory: Tensor
    weights: Tensor
    areas: Tensor
    radius: float | None


@dataclass(frozen=True, eq=False)
class PathScan:
    """Samples (C, S) as measured along a path, and maps (C, H, W) where they cannot be estimated again."""

    samples: Tensor
    path: Path
    shape: tuple[int, int]
    maps: Tensor | None

    @property
    def nbytes(self) -> int:
        """Its size in memory; paths are shared."""
        return self.samples.nbytes + (0 if self.maps is None else self.maps.nbytes)

    def known_maps(self) -> Tensor:
        """The maps (C, H, W) that reconstruction has."""
        if self.maps is not None:
            return self.maps
        path = self.path
        known = self.samples[None], path.trajectory[None], path.areas[None]
        return gridded_maps(*known, self.shape, radius=path.radius)[0]


@dataclass(frozen=True)
class NonCartesianScanner:
    """The scanner of a site: where its trajectory starts is drawn for a patient, unless it is `fixed`."""

    site: str
    acquisition: NonCartesianAcquisition
    seed: int

    def scan(self, image: NDArray[np.float32], patient: int, random: np.random.Generator) -> PathScan:
        """A scan of a slice (H, W) of a patient, peak 1; coils, phase and noise come from `random`."""
        whose = () if self.acquisition.fixed else (patient,)
        turned = public_generator(self.seed, self.site, "trajectory", *whose)
        return simulated(image, self.acquisition, path_of(self.acquisition, _shape(image), turned), random)

    def random(self, patient: int, *which: str | int) -> np.random.Generator:
        """Public randomness of one scan of a patient: every arm of a study sees the same."""
        return public_generator(self.seed, self.site, "scan", patient, *which)


def path_of(
    acquisition: NonCartesianAcquisition, shape: tuple[int, int], random: np.random.Generator | None = None
) -> Path:
    """The trajectory of a scan of images of `shape`, turned by an angle from `random`.

    Weights and the dense centre are those of the trajectory that is not turned. Raises GeometryError where coil maps
    are to be estimated and that centre is too thin.
    """
    start = 0.0 if random is None else float(random.uniform(0.0, 2 * np.pi))
    unturned, areas = _points(acquisition.trajectory, shape, 0.0)
    radius = None if acquisition.maps == "true" else dense_radius(unturned, shape)
    parts = (_points(acquisition.trajectory, shape, start)[0], even_weights(unturned, shape), areas)
    trajectory, weights, stood_for = (torch.from_numpy(part.astype(np.float32)) for part in parts)
    return Path(trajectory, weights, stood_for, radius)


def require_dense_centre(acquisition: NonCartesianAcquisition, shape: tuple[int, int]) -> None:
    """Raise GeometryError where coil maps are to be estimated from a trajectory whose centre is too thin."""
    if acquisition.maps != "true":
        dense_radius(_points(acquisition.trajectory, shape, 0.0)[0], shape)


def simulated(
    image: NDArray[np.float32], acquisition: NonCartesianAcquisition, path: Path, random: np.random.Generator
) -> PathScan:
    """Simulate a scan of a magnitude image (H, W), peak 1, along a path: F(S x e^{i phi}) + n, as `simulate` does.

    Noise has standard deviation `acquisition.noise` in both parts of every sample. Raises GeometryError for what is no
    image.
    """
    if image.ndim != 2:
        raise GeometryError(f"simulated takes one image (H, W), got shape {image.shape}")
    maps, seen = coil_images(image, acquisition, random)
    samples = transform_of(path.trajectory, _shape(image), EVALUATION).forward(seen)
    if acquisition.noise > 0:
        covariance = ring_covariance(acquisition.coils, acquisition.noise_correlation)
        samples += torch.from_numpy(coil_noise(covariance, samples.shape[1], acquisition.noise, random))
    return PathScan(samples, path, _shape(image), maps if acquisition.maps == "true" else None)


def scanned(
    acquisition: NonCartesianAcquisition, image: Tensor, of_path: np.random.Generator, of_scan: np.random.Generator
) -> tuple[NonCartesianMRI, Tensor]:
    """The operator and the data of one scan of an image (1, H, W), as networks see them."""
    slice_ = image[0].numpy()
    scan = simulated(slice_, acquisition, path_of(acquisition, _shape(slice_), of_path), of_scan)
    trajectory, weights, areas = scan.path.trajectory[None], scan.path.weights[None], scan.path.areas[None]
    operator = NonCartesianMRI(scan.known_maps()[None], trajectory, weights, areas=areas, tolerance=EVALUATION)
    return operator, operator.weighed(scan.samples[None])


def _points(
    trajectory: Radial | Spiral, shape: tuple[int, int], start: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points and areas."""
    if isinstance(trajectory, Radial):
        angles = spoke_angles(trajectory.spokes, trajectory.angles == "golden", start)
        samples = round(trajectory.oversampling * max(shape))
        return radial(angles, samples), radial_areas(angles, spoke_radii(samples), shape)
    points = spiral(
        trajectory.interleaves,
        trajectory.turns,
        max(shape),
        exponent=trajectory.exponent,
        oversampling=trajectory.oversampling,
        start=start,
    )
    return points, spiral_areas(points, trajectory.interleaves, shape)


def _shape(image: NDArray[np.float32]) -> tuple[int, int]:
    return image.shape[0], image.shape[1]
