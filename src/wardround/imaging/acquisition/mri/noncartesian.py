"""Multi-coil MRI along any trajectory, radial or spiral for example: y = W^(1/2) F S x."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.coils import over_root_sum_of_squares
from wardround.imaging.acquisition.mri.nufft import TRAINING, Kept, Transform, content, transform_of
from wardround.imaging.acquisition.mri.trajectories import dense_radius
from wardround.imaging.acquisition.operator import LinearOperator, self_adjoint
from wardround.wire.host import on_host

_PLANE = (-2, -1)
# Complex numbers on the doubled grid that one pass of `normal` holds, as in `CartesianMRI`.
_CHUNK = 2**18
# Error of the kernel of `normal`, which is made once.
_KERNEL = 1e-7
_KERNELS = Kept[Tensor]()
_NORMS = Kept[float](1024)


class NonCartesianMRI(LinearOperator):
    """Sensitivity encoding along a trajectory: A x = W^(1/2) F(maps * x), F of `Transform`.

    maps: complex (B, C, H, W). trajectory: real (B or 1, S, 2), cycles per pixel along H and W, from -0.5 to 0.5.
    weights: real (B or 1, S), at least 0, how much a sample counts in least squares; `weighed` says what data such an
    operator has. With `even_weights` A* A is 1 to 2 at most, nearly as with a Cartesian mask, and networks and solvers
    converge as fast; without weights noise is white, and the dense centre of k-space makes A* A large. Weights of 0
    are samples that are not there: scans of fewer are padded with them. areas: real (B or 1, S), what `initial` makes
    up for, the weights by default. Images are complex (B, H, W), data complex (B, C, S).

    `tolerance` is the relative error of F; `normal`, and so `solve`, uses a kernel that is exact to 1e-7 or better.
    Raises GeometryError where the shapes do not fit. Pruessmann et al., Magn. Reson. Med. 46 (2001), 638.
    """

    def __init__(
        self,
        maps: Tensor,
        trajectory: Tensor,
        weights: Tensor | None = None,
        *,
        areas: Tensor | None = None,
        tolerance: float = TRAINING,
    ) -> None:
        if maps.ndim != 4 or not maps.is_complex():
            raise GeometryError(
                f"coil maps must be complex (B, C, H, W), got {maps.dtype} with {maps.ndim} axes; "
                "add the batch axis with maps[None]"
            )
        if trajectory.ndim != 3 or trajectory.shape[2] != 2 or not trajectory.is_floating_point():
            raise GeometryError(
                f"a trajectory must be real (B or 1, samples, 2), got {trajectory.dtype} {tuple(trajectory.shape)}"
            )
        if trajectory.requires_grad:
            raise GeometryError("derivatives with respect to a trajectory are not taken; give trajectory.detach()")
        samples = trajectory.shape[:2]
        ones = trajectory.new_ones(1, samples[1])
        for name, each in (("weights", weights), ("areas", areas)):
            if each is not None and (each.ndim != 2 or each.shape[1] != samples[1] or not each.is_floating_point()):
                raise GeometryError(
                    f"{name} must be real (B or 1, samples) for {samples[1]} samples, got {each.dtype} "
                    f"{tuple(each.shape)}"
                )
        sizes = {maps.shape[0], samples[0], *(each.shape[0] for each in (weights, areas) if each is not None)}
        if len(sizes - {1}) > 1:
            raise GeometryError(f"maps, trajectory, weights and areas are of batches of {sorted(sizes)}; give all one")
        self.maps = maps
        self.trajectory = trajectory
        self.weights = ones if weights is None else weights
        self.areas = self.weights if areas is None else areas
        self.tolerance = tolerance
        self._transforms: tuple[Transform, ...] = ()
        self._spectrum: Tensor | None = None
        self._root = self.weights.sqrt().to(maps.real.dtype)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.maps.shape[2:])

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (self.maps.shape[1], self.trajectory.shape[1])

    def A(self, x: Tensor) -> Tensor:
        return self._root[:, None] * self._each(self.maps * x[:, None], False)

    def A_adjoint(self, y: Tensor) -> Tensor:
        return self._combined(self._root[:, None] * y)

    def weighed(self, y: Tensor) -> Tensor:
        """Samples (B, C, S) as they were measured, as data of this operator: times the root of their weights."""
        return self._root[:, None] * y

    def initial(self, y: Tensor) -> Tensor:
        """Gridding with density compensation: S* F* of the measured samples times their areas."""
        share = self.areas / self.weights.sqrt().clamp_min(1e-12)
        return self._combined(torch.where(self.weights > 0, share, 0.0).to(self._root.dtype)[:, None] * y)

    def normal(self, x: Tensor) -> Tensor:
        """Apply A* A by Fourier transforms of a grid twice as large, without the trajectory.

        F* W F is a convolution of the image with F* w (Wajer and Pruessmann, ISMRM 2001, 767; Fessler et al., IEEE
        Trans. Signal Process. 53 (2005), 3393). Backward stores no intermediates.
        """
        if self.maps.requires_grad or self.weights.requires_grad:
            return super().normal(x)
        return self_adjoint(self._normal, x)

    def norm(self, like: Tensor, *, iterations: int = 30) -> Tensor:
        """Bound the largest singular value by that of W^(1/2) F times the maps' root sum of squares: (B,).

        That of W^(1/2) F comes from power iteration on its kernel, once for a trajectory and its weights; it approaches
        from below, and a percent is added.
        """
        coils: Tensor = torch.linalg.vector_norm(self.maps.detach(), dim=1).flatten(1).amax(1)
        shape = self._image
        found = [norm_of(*pair, shape, iterations) for pair in self._pairs()]
        return (coils * torch.tensor(found, dtype=coils.dtype, device=coils.device)).expand(like.shape[0])

    @property
    def _image(self) -> tuple[int, int]:
        return self.maps.shape[2], self.maps.shape[3]

    def _each(self, x: Tensor, adjoint: bool) -> Tensor:
        """F or F* of each item along its own trajectory."""
        if not self._transforms:
            self._transforms = tuple(transform_of(own, self._image, self.tolerance) for own in self.trajectory)
        if len(self._transforms) == 1:
            return _run(self._transforms[0], x, adjoint)
        return torch.stack([_run(each, own, adjoint) for each, own in zip(self._transforms, x, strict=True)])

    def _combined(self, y: Tensor) -> Tensor:
        return (self.maps.conj() * self._each(y, True)).sum(1)

    def _pairs(self) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """The points and weights of each trajectory, in this process's memory."""
        items = max(self.trajectory.shape[0], self.weights.shape[0])
        points, weights = (on_host(each.expand(items, *each.shape[1:])) for each in (self.trajectory, self.weights))
        return list(zip(points, weights, strict=True))

    def _kernel(self, like: Tensor) -> Tensor:
        """`toeplitz_kernel` of each trajectory and its weights: real (B or 1, 2H, 2W)."""
        if self._spectrum is None or self._spectrum.device != like.device:
            found = torch.stack([kernel_of(*pair, self._image, self.tolerance) for pair in self._pairs()])
            self._spectrum = found.to(like.device, self.maps.real.dtype)
        return self._spectrum

    def _normal(self, x: Tensor) -> Tensor:
        batch, kernel = x.shape[0], self._kernel(x)
        items = batch if x.is_cuda else max(1, _CHUNK // (4 * self.maps[0].numel()))
        if items >= batch:
            return _normal(x, self.maps, kernel)
        parts = (slice(i, i + items) for i in range(0, batch, items))
        arguments = (self.maps, kernel)
        return torch.cat([_normal(x[part], *(a if a.shape[0] == 1 else a[part] for a in arguments)) for part in parts])


def _normal(x: Tensor, maps: Tensor, kernel: Tensor) -> Tensor:
    height, width = x.shape[1:]
    k = torch.fft.fftn(maps * x.unsqueeze(1), s=(2 * height, 2 * width), dim=_PLANE).mul_(kernel.unsqueeze(1))
    images: Tensor = torch.fft.ifftn(k, dim=_PLANE, norm="forward")[..., :height, :width]
    combined: Tensor = (images * maps.conj()).sum(1)
    return combined


def _run(transform: Transform, x: Tensor, adjoint: bool) -> Tensor:
    return transform.adjoint(x) if adjoint else transform.forward(x)


def kernel_of(points: NDArray[Any], weights: NDArray[Any], shape: tuple[int, int], tolerance: float) -> Tensor:
    """`toeplitz_kernel`, made once for the same points and weights."""
    tolerance = min(tolerance, _KERNEL)
    key = (content(points, weights), shape, tolerance)
    return _KERNELS.get(key, lambda: toeplitz_kernel(points, weights, shape, tolerance))


def norm_of(points: NDArray[Any], weights: NDArray[Any], shape: tuple[int, int], iterations: int = 30) -> float:
    """The largest singular value of W^(1/2) F and at most two percent more, by power iteration, made once."""

    def found() -> float:
        kernel = kernel_of(points, weights, shape, _KERNEL)[None]
        random = torch.Generator().manual_seed(0)
        x = torch.randn(1, *shape, generator=random, dtype=torch.complex128)
        one = torch.ones(1, 1, *shape, dtype=torch.complex128)
        for _ in range(iterations):
            x = _normal(x / x.norm().clamp_min(1e-300), one, kernel)
        return 1.01 * float(on_host(x.norm().sqrt()))

    return _NORMS.get((content(points, weights), shape, iterations), found)


def toeplitz_kernel(
    points: NDArray[Any], weights: NDArray[Any], shape: tuple[int, int], tolerance: float = _KERNEL
) -> Tensor:
    """The transform of the point spread F* w of points (S, 2) with weights (S,), real float64 (2H, 2W).

    In the order of the transform and divided by 4 HW, so that an unscaled inverse follows. Offsets of a whole field of
    view are no offsets between two pixels of an image; they are 0, which makes the spread Hermitian.
    """
    height, width = shape
    transform = Transform(points, (2 * height, 2 * width), tolerance)
    spread = transform.adjoint(torch.from_numpy(weights.astype(np.complex128))) * (2 / (height * width) ** 0.5)
    spread[0], spread[:, 0] = 0, 0
    kernel: Tensor = torch.fft.fft2(torch.fft.ifftshift(spread)).real / (4 * height * width)
    return kernel


def gridded_maps(
    kspace: Tensor,
    trajectory: Tensor,
    areas: Tensor,
    shape: tuple[int, int],
    *,
    radius: float | None = None,
    floor: float = 0.02,
) -> Tensor:
    """Estimate sensitivities (B, C, H, W) from the densely sampled centre, as `low_resolution_maps` does.

    kspace: samples (B, C, S) as measured. trajectory: (B, S, 2). areas: (B, S), 0 where there is no sample. The coil
    images are gridded with a Hann taper that ends at `radius`, in cycles per pixel, by default `dense_radius`.
    Raises GeometryError where the centre was sampled too thinly.
    """
    images = []
    for samples, points, area in zip(kspace, trajectory, areas, strict=True):
        measured = on_host(points).astype(np.float64)[on_host(area) > 0]
        edge = dense_radius(measured, shape) if radius is None else radius
        distance = torch.linalg.vector_norm(points, dim=-1)
        centre = (distance < edge) & (area > 0)
        taper = area[centre] * torch.cos(torch.pi / 2 * distance[centre] / edge).square()
        transform = transform_of(points[centre], shape, TRAINING)
        images.append(transform.adjoint(samples[:, centre] * taper.to(samples.real.dtype)))
    return over_root_sum_of_squares(torch.stack(images), floor)
