"""The Fourier transform of images at any points of k-space, by finufft, with derivatives of any order.

F x(k) = sum_n x(n) exp(-2 pi i k.n) / sqrt(HW), with n from -N // 2 as in `fft2c`: on a Cartesian grid it gives the
numbers of the centred orthonormal transform. Points k are in cycles per pixel, (along H, along W), within half a cycle.
Barnett, Magland and af Klinteberg, SIAM J. Sci. Comput. 41 (2019), C479; the adjoint of a plan is exact, as spreading
is the transpose of interpolation.

finufft is in the extra `nufft`; on a CUDA device its package cufinufft does the same.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wardround.errors import GeometryError, MissingExtra, StudyError
from wardround.wire.host import on_host

#: Relative errors of the transform: networks learn as well with the first, results are computed with the second.
TRAINING, EVALUATION = 1e-4, 1e-6
# In 32 bits 2 pi k has seven digits, and a wave of 128 periods over the image five: finer tolerances need 64.
_SINGLE = 1e-5
# The kernel on a grid 1.25 times as fine is five times faster than on one twice as fine, and ends at nine digits.
_SMALL_GRID, _LARGE_GRID, _SMALL_GRID_ENDS = 1.25, 2.0, 1e-8
_KEPT = 128
T = TypeVar("T")


class Transform:
    """F and its adjoint for one trajectory (S, 2), images of `shape` (H, W), to a relative `tolerance`.

    Plans are made when first needed, their points set once, and used again. One transform is one thread's: as many
    run at once as torch has threads, and the bits depend neither on that number nor on what else is in a batch.
    Raises GeometryError for a trajectory that is none, MissingExtra where finufft is not installed.
    """

    def __init__(self, trajectory: NDArray[np.floating[Any]], shape: tuple[int, int], tolerance: float) -> None:
        if trajectory.ndim != 2 or trajectory.shape[1] != 2 or not len(trajectory):
            raise GeometryError(f"a trajectory is real (samples, 2), got shape {trajectory.shape}")
        # Half a cycle and a little, for trajectories in 32 bits.
        if not np.isfinite(trajectory).all() or np.abs(trajectory).max() > 0.5001:
            raise GeometryError(
                "a trajectory is in cycles per pixel, from -0.5 to 0.5, and these points reach "
                f"{np.abs(trajectory).max():g}; divide numbers of the grid by the size of the image"
            )
        self.samples, self.shape, self.tolerance = len(trajectory), shape, tolerance
        self._scale = 1.0 / (shape[0] * shape[1]) ** 0.5
        self._points = np.ascontiguousarray(2 * np.pi * trajectory.T.astype(np.float64))
        self._free: dict[Hashable, list[Any]] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Complex images (..., H, W) to samples (..., S)."""
        return _applied(images, self, False)

    def adjoint(self, samples: Tensor) -> Tensor:
        """Complex samples (..., S) to images (..., H, W), the exact adjoint of `forward`."""
        return _applied(samples, self, True)

    def apply(self, x: Tensor, adjoint: bool) -> Tensor:
        """Either of the two, without derivatives."""
        given, made = ((self.samples,), self.shape) if adjoint else (self.shape, (self.samples,))
        if tuple(x.shape[-len(given) :]) != given or not x.is_complex():
            raise GeometryError(f"this transform takes complex (..., {given}), got {x.dtype} {tuple(x.shape)}")
        outer = x.shape[: x.ndim - len(given)]
        if x.is_meta:
            return x.new_empty(*outer, *made)
        double = x.dtype == torch.complex128 or self.tolerance < _SINGLE
        flat = x.detach().resolve_conj().reshape(-1, *given).to(torch.complex128 if double else torch.complex64)
        run = self._on_cpu if x.device.type == "cpu" else self._on_cuda
        return run(flat.contiguous(), adjoint, made).mul_(self._scale).to(x.dtype).reshape(*outer, *made)

    def _on_cpu(self, flat: Tensor, adjoint: bool, made: tuple[int, ...]) -> Tensor:
        result = torch.empty(flat.shape[0], *made, dtype=flat.dtype)
        source, target, double = flat.numpy(), result.numpy(), flat.dtype == torch.complex128

        def part(numbers: range) -> None:
            free = self._free.setdefault(double, [])
            plan = free.pop() if free else self._plan(double)
            try:
                run = plan.execute_adjoint if adjoint else plan.execute
                for i in numbers:
                    run(source[i], target[i])
            finally:
                free.append(plan)

        workers = min(torch.get_num_threads(), len(source))
        if workers <= 1:
            part(range(len(source)))
        else:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(part, [range(i, len(source), workers) for i in range(workers)]))
        return result

    def _plan(self, double: bool) -> Any:
        real = np.float64 if double else np.float32
        plan = finufft().Plan(
            2,
            self.shape,
            eps=self.tolerance,
            isign=-1,
            dtype="complex128" if double else "complex64",
            # Threads that spread into one grid add in another order each time.
            nthreads=1,
            upsampfac=self._upsampling,
        )
        plan.setpts(*self._points.astype(real))
        return plan

    def _on_cuda(self, flat: Tensor, adjoint: bool, made: tuple[int, ...]) -> Tensor:
        if flat.device.type != "cuda":
            raise StudyError(
                f"non-Cartesian MRI has no transform for {flat.device}; set `device: cpu` in the sites file"
            )
        if torch.are_deterministic_algorithms_enabled():
            # As torch says it of its own operations.
            raise RuntimeError("cufinufft does not have a deterministic implementation")
        stream = torch.cuda.current_stream(flat.device).cuda_stream
        key = (flat.device, flat.dtype, flat.shape[0], adjoint, stream)
        free = self._free.setdefault(key, [])
        plan = free.pop() if free else self._cuda_plan(flat, adjoint, stream)
        try:
            result = flat.new_empty(flat.shape[0], *made)
            plan.execute(flat, out=result)
        finally:
            free.append(plan)
        return result

    def _cuda_plan(self, flat: Tensor, adjoint: bool, stream: int) -> Any:
        plan = cufinufft().Plan(
            1 if adjoint else 2,
            self.shape,
            flat.shape[0],
            self.tolerance,
            1 if adjoint else -1,
            dtype="complex128" if flat.dtype == torch.complex128 else "complex64",
            # Both plans of a pair have the same kernel, so that one is the adjoint of the other.
            upsampfac=_LARGE_GRID,
            gpu_device_id=flat.device.index or 0,
            gpu_stream=stream,
        )
        points = torch.from_numpy(self._points).to(flat.device, flat.dtype.to_real())
        plan.setpts(points[0].contiguous(), points[1].contiguous())
        return plan

    @property
    def _upsampling(self) -> float:
        return _SMALL_GRID if self.tolerance >= _SMALL_GRID_ENDS else _LARGE_GRID


class _Applied(torch.autograd.Function):
    """One of the pair; its derivative is the other one, whose derivative is this one again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, transform: Transform, adjoint: bool) -> Tensor:
        ctx.transform, ctx.adjoint = transform, adjoint
        return transform.apply(x, adjoint)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _applied(gradients[0], ctx.transform, not ctx.adjoint), None, None


def _applied(x: Tensor, transform: Transform, adjoint: bool) -> Tensor:
    return cast(Tensor, _Applied.apply(x, transform, adjoint))  # type: ignore[no-untyped-call]


class Kept(Generic[T]):
    """The last few of what takes a while to make, by the content of what it is made of."""

    def __init__(self, most: int = _KEPT) -> None:
        self._most = most
        self._found: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is kept under a key, made where it is not there."""
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
        made = make()
        with self._lock:
            self._found[key] = made
            while len(self._found) > self._most:
                self._found.popitem(last=False)
        return made


_TRANSFORMS = Kept[Transform]()


def transform_of(trajectory: Tensor, shape: tuple[int, int], tolerance: float) -> Transform:
    """The `Transform` of a trajectory (S, 2): the same one for the same points, with its plans."""
    points = on_host(trajectory)
    key = (content(points), shape, tolerance)
    return _TRANSFORMS.get(key, lambda: Transform(points, shape, tolerance))


def content(*arrays: NDArray[Any]) -> bytes:
    """What tells arrays from others: a digest of their shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def finufft() -> Any:
    """The package, imported when first needed. Raises MissingExtra where it is not installed."""
    try:
        import finufft
    except ImportError as error:
        raise MissingExtra("non-Cartesian MRI", "nufft") from error
    return finufft


def cufinufft() -> Any:
    """Its package for CUDA. Raises StudyError where it is not installed."""
    try:
        import cufinufft
    except ImportError as error:
        raise StudyError(
            "non-Cartesian MRI on a CUDA device needs the package cufinufft: pip install cufinufft, or set "
            "`device: cpu` in the sites file"
        ) from error
    return cufinufft
