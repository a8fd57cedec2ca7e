"""Parallel- and fan-beam CT in two dimensions: y = A x by sparse matrices."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from scipy import sparse
from torch import Tensor

from wardround.errors import GeometryError, StudyError
from wardround.imaging.acquisition.ct.cache import MatrixCache
from wardround.imaging.acquisition.ct.geometry import check_geometry, symmetry
from wardround.imaging.acquisition.ct.projector import (
    BYTES_PER_WEIGHT,
    Model,
    estimate_bytes,
    weight_blocks,
    weight_matrix,
)
from wardround.imaging.acquisition.operator import LinearOperator, full_precision, self_adjoint
from wardround.study.ct import CTGeometry
from wardround.wire.host import on_host

_LOG = logging.getLogger(__name__)
_MOST_WEIGHTS = 2**31 - 1  # what 32-bit indices address
Uses = Literal["both", "forward", "adjoint"]
#: Names the most memory, in GB, that one matrix may take on this machine.
VARIABLE = "WARDROUND_CT_MATRIX_GB"


def matrix_limit() -> float:
    """The most bytes that one projector's matrices may take: $WARDROUND_CT_MATRIX_GB, or 4 GiB.

    Raises StudyError where the variable is no positive number.
    """
    stated = os.environ.get(VARIABLE, "")
    if not stated:
        return 4.0 * 2**30
    try:
        limit = float(stated) * 1e9
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise StudyError(f"the environment variable {VARIABLE} is no positive number of GB; set it to one, or unset it")
    return limit


@dataclass(frozen=True)
class MatrixPlan:
    """How the weights of a projector will be kept: the bytes they take, within 5 %, and how many they may take."""

    nbytes: int
    limit: float

    @property
    def stored(self) -> bool:
        """Whether they are built once and kept, not computed anew for every product."""
        return self.nbytes <= self.limit


def plan_matrix(
    geometry: CTGeometry, model: Model, uses: Uses = "both", memory_limit: float | None = None
) -> MatrixPlan:
    """Say how `CTProjector` would keep the weights of a geometry, without building them."""
    both = uses == "both"
    limit = matrix_limit() if memory_limit is None else memory_limit
    addressed = _MOST_WEIGHTS * BYTES_PER_WEIGHT * (2 if both else 1)
    return MatrixPlan(estimate_bytes(geometry, model, adjoint=both), min(limit, addressed))


class Weights(Protocol):
    """A projector's matrix: its rows are the rays of the independent views, its columns pixels."""

    def forward(self, pixels: Tensor) -> Tensor:
        """(pixels, N) to (rays, N)."""

    def adjoint(self, rays: Tensor) -> Tensor:
        """(rays, N) to (pixels, N)."""


class StoredWeights:
    """The matrix and its transpose, both stored: multiplying by a transposed view is tens of times slower.

    Where only one of them is of `uses`, the other and copies in other dtypes and on other devices are made when first
    needed, and kept.
    """

    def __init__(self, weights: sparse.csr_matrix, uses: Uses = "both") -> None:
        self._uses = uses
        self._transposed = uses == "adjoint"
        self._base = _transpose(weights) if self._transposed else weights
        self._copies: dict[tuple[bool, torch.dtype, torch.device], Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes in float32 of the matrix, or its transpose, or both, whatever is of use."""
        matrix = self._base
        if self._uses != "both":
            return int(matrix.nnz * 8 + matrix.indptr.nbytes)
        pointers = sum(matrix.shape) + 2
        return int(2 * matrix.nnz * 8 + pointers * matrix.indptr.itemsize)

    def forward(self, pixels: Tensor) -> Tensor:
        return _product(self._copy(False, pixels), pixels)

    def adjoint(self, rays: Tensor) -> Tensor:
        return _product(self._copy(True, rays), rays)

    def _copy(self, transposed: bool, like: Tensor) -> Tensor:
        key = (transposed, like.dtype, like.device)
        if key not in self._copies:
            self._copies[key] = self._make(*key)
        return self._copies[key]

    def _make(self, transposed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
        plain = (transposed, torch.float32, torch.device("cpu"))
        if (transposed, dtype, device) == plain:
            return _torch_csr(self._base if transposed == self._transposed else _transpose(self._base))
        base = self._copies.get(plain)
        if base is None:
            base = self._make(*plain)
        return base.to(device=device, dtype=dtype)


class WeightsOnTheFly:
    """The matrix computed anew for every product, a few views at a time: slow, but nothing is stored."""

    def __init__(self, geometry: CTGeometry, model: Model) -> None:
        self._geometry = geometry
        self._model: Model = model

    def forward(self, pixels: Tensor) -> Tensor:
        blocks = weight_blocks(self._geometry, self._model)
        return torch.cat([_product(_torch_csr(block).to(pixels), pixels) for _, block in blocks])

    def adjoint(self, rays: Tensor) -> Tensor:
        pixels = rays.new_zeros(math.prod(self._geometry.size), rays.shape[1])
        bins = self._geometry.bins
        for views, block in weight_blocks(self._geometry, self._model):
            part = rays[views.start * bins : views.stop * bins]
            pixels += _product(_torch_csr(_transpose(block)).to(rays), part)
        return pixels


class CTProjector(LinearOperator):
    """Line integrals of attenuation images.

    Images are real (B, rows, columns) in 1/mm, data real (B, views, bins), float32 or float64; the weights follow
    the input's dtype and device. model: `joseph` for reconstruction, `strip` for simulation, see
    `wardround.imaging.acquisition.ct.projector`.
    storage: `stored` keeps the matrix and its transpose, `on_the_fly` computes weights for every product, `auto`
    stores what stays within `memory_limit` bytes, by default `matrix_limit()`. uses: what the projector is for; without
    `both`, the other product and derivatives take a second matrix, built when first asked for. cache: where matrices
    are kept between runs, if anywhere.
    Raises GeometryError where the detector misses the patient, or where `stored` exceeds the limit.
    """

    def __init__(
        self,
        geometry: CTGeometry,
        *,
        model: Model = "joseph",
        storage: Literal["auto", "stored", "on_the_fly"] = "auto",
        memory_limit: float | None = None,
        uses: Uses = "both",
        cache: MatrixCache | None = None,
    ) -> None:
        check_geometry(geometry)
        self.geometry = geometry
        self.model: Model = model
        self.weights: Weights = _weights(geometry, model, storage, memory_limit, uses, cache)
        self._turns = symmetry(geometry)
        self._norms: dict[int, float] = {}

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.geometry.size

    @property
    def data_shape(self) -> tuple[int, ...]:
        return (self.geometry.views, self.geometry.bins)

    def A(self, x: Tensor) -> Tensor:
        _check("images", x, self.image_shape)
        return _linear(self._project, self._back_project, x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        _check("sinograms", y, self.data_shape)
        return _linear(self._back_project, self._project, y)

    def normal(self, x: Tensor) -> Tensor:
        """Apply A* A without putting the views in order in between."""
        _check("images", x, self.image_shape)
        return self_adjoint(self._normal, x)

    def norm(self, like: Tensor, *, iterations: int = 10) -> Tensor:
        """Estimate the largest singular value: (B,), computed once.

        Weights are not negative, so the power iteration starts at a constant image and is there in a few steps.
        """
        if iterations not in self._norms:
            x = torch.ones(1, *self.image_shape, dtype=like.real.dtype, device=like.device)
            square = 0.0
            with torch.no_grad():
                for _ in range(iterations):
                    x = self.normal(x / x.norm().clamp_min(torch.finfo(x.dtype).tiny))
                    square = float(on_host(x.norm()))
            self._norms[iterations] = math.sqrt(square)
        return torch.full((like.shape[0],), self._norms[iterations], dtype=like.real.dtype, device=like.device)

    # Quarter turns of the images stand in for the views that have no rows of their own: they become columns of the
    # product, and sparse products cost little more for several columns than for one.

    def _project(self, x: Tensor) -> Tensor:
        return self._in_order(self.weights.forward(self._turned(x)), len(x))

    def _back_project(self, y: Tensor) -> Tensor:
        parts = y.reshape(len(y), self._turns, -1)
        return self._turned_back(self.weights.adjoint(parts.permute(2, 0, 1).flatten(1).contiguous()), len(y))

    def _normal(self, x: Tensor) -> Tensor:
        return self._turned_back(self.weights.adjoint(self.weights.forward(self._turned(x))), len(x))

    def _turned(self, x: Tensor) -> Tensor:
        """Images (B, H, W) to columns (H W, B turns)."""
        turned = torch.stack([x.rot90(-turn, (1, 2)) for turn in range(self._turns)], 1)
        return turned.flatten(2).permute(2, 0, 1).flatten(1).contiguous()

    def _turned_back(self, columns: Tensor, batch: int) -> Tensor:
        images = columns.T.reshape(batch, self._turns, *self.image_shape)
        return torch.stack([images[:, turn].rot90(turn, (1, 2)) for turn in range(self._turns)]).sum(0)

    def _in_order(self, columns: Tensor, batch: int) -> Tensor:
        return columns.T.reshape(batch, self.geometry.views, self.geometry.bins)


def _weights(
    geometry: CTGeometry,
    model: Model,
    storage: str,
    memory_limit: float | None,
    uses: Uses,
    cache: MatrixCache | None,
) -> Weights:
    if storage == "on_the_fly":
        return WeightsOnTheFly(geometry, model)
    limit = matrix_limit() if memory_limit is None else memory_limit
    if cache is not None:
        # An estimate takes a part of what building takes: what is in the cache has a size.
        copies = 2 if uses == "both" else 1
        found = cache.find(geometry, model, min(limit / copies, _MOST_WEIGHTS * BYTES_PER_WEIGHT))
        if found is not None:
            return StoredWeights(found, uses)
    plan = plan_matrix(geometry, model, uses, limit)
    if not plan.stored:
        what = "the weights and their transpose" if uses == "both" else "the weights"
        sizes = f"{what} take {plan.nbytes / 1e9:.1f} GB, above the limit of {plan.limit / 1e9:.1f} GB"
        if storage == "stored":
            raise GeometryError(f"{sizes}; raise memory_limit, take fewer views, or use storage on_the_fly")
        _LOG.warning("%s: they are computed for every product instead, which is much slower", sizes)
        return WeightsOnTheFly(geometry, model)
    return StoredWeights(weight_matrix(geometry, model) if cache is None else cache.weights(geometry, model), uses)


def _product(matrix: Tensor, columns: Tensor) -> Tensor:
    """A sparse matrix times columns, in the dtype of both."""
    if columns.is_cuda and torch.are_deterministic_algorithms_enabled():
        # cuSPARSE promises the same bits again for none of the algorithms that torch takes, and torch does not say so.
        raise RuntimeError("the sparse product of CT has no deterministic kernel on CUDA")
    with full_precision(columns):
        return matrix @ columns


def _check(what: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.ndim != 3 or tuple(x.shape[1:]) != shape or not x.is_floating_point():
        raise GeometryError(
            f"{what} must be real floating point of shape (B, {shape[0]}, {shape[1]}), got {x.dtype} {tuple(x.shape)}"
        )


def _transpose(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    columns = matrix.tocsc()
    return sparse.csr_matrix((columns.data, columns.indices, columns.indptr), matrix.shape[::-1])


def _torch_csr(matrix: sparse.csr_matrix) -> Tensor:
    """Share the memory of a scipy matrix with torch."""
    pointers, columns, values = (torch.from_numpy(part) for part in (matrix.indptr, matrix.indices, matrix.data))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(pointers, columns, values, size=matrix.shape, check_invariants=False)


def _linear(function: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a linear `function` whose derivative is `adjoint`, and the other way round, to any order."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return function(x)
    return cast(Tensor, _Linear.apply(x, function, adjoint))  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.functions = (function, adjoint)
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        function, adjoint = ctx.functions
        return _linear(adjoint, function, gradients[0]), None, None
