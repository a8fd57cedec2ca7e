"""The contract of every acquisition: a linear operator with an exact adjoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any, Self, cast

import torch
from torch import Tensor

from wardround.wire.host import on_host


class LinearOperator(ABC):
    """y = A x, batched on the first axis; `A_adjoint` is exact.

    Images have shape (B, *image_shape), data (B, *data_shape). Results follow the input's dtype and device.
    Everything is differentiable by autograd, twice where an optimiser needs it.
    """

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, without the batch axis."""

    @property
    @abstractmethod
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one measurement, without the batch axis."""

    @abstractmethod
    def A(self, x: Tensor) -> Tensor:
        """Measure: images (B, *image_shape) to data (B, *data_shape)."""

    @abstractmethod
    def A_adjoint(self, y: Tensor) -> Tensor:
        """Apply the exact adjoint: data (B, *data_shape) to images (B, *image_shape)."""

    @property
    def protocol(self) -> Tensor | None:
        """What tells a network which scanner this is: features (F,) in [0, 1], where there are any."""
        return None

    @property
    def prompt(self) -> Tensor | None:
        """The patients' embeddings, for a network that takes them: (B, tokens, dimension), where a site has them."""
        return None

    def to(self, device: torch.device) -> Self:
        """The same operator for images and data on a device: its tensors, and those of operators in it, are there.

        One that follows its input and is slow to build returns itself instead.
        """
        moved = copy(self)
        for name, part in vars(self).items():
            if isinstance(part, Tensor | LinearOperator):
                moved.__dict__[name] = part.to(device)
        return moved

    def initial(self, y: Tensor) -> Tensor:
        """A first image from data (B, *data_shape), where a network starts: A* y unless something better is known."""
        return self.A_adjoint(y)

    def uncertainty(self, y: Tensor) -> Tensor | None:
        """How little data (B, *data_shape) can be trusted: the noise's variance over the square of what was counted.

        Without a unit, same shape; to first order, from the data themselves. None where the noise is alike everywhere.
        """
        return None

    def normal(self, x: Tensor) -> Tensor:
        """Apply A* A to images (B, *image_shape); overridden where a shortcut exists."""
        return self.A_adjoint(self.A(x))

    def solve(
        self,
        rhs: Tensor,
        weight: Tensor | float,
        *,
        iterations: int,
        start: Tensor | None = None,
        tolerance: float = 0.0,
    ) -> Tensor:
        """Solve (A* A + weight I) x = rhs by `conjugate_gradients`; weight >= 0, one or (B,), may be learned."""
        return conjugate_gradients(self.normal, rhs, weight, iterations=iterations, start=start, tolerance=tolerance)

    def norm(self, like: Tensor, *, iterations: int = 30) -> Tensor:
        """Estimate the largest singular value of A by power iteration on A* A.

        like: any images (B, *image_shape); only shape, dtype and device matter. Returns (B,) real. Power
        iteration approaches from below: leave a margin of a few percent where a bound is needed.
        """
        random = torch.Generator().manual_seed(0)
        x = torch.randn(like.shape, generator=random, dtype=like.dtype).to(like.device)
        with torch.no_grad():
            for _ in range(iterations):
                length = _length(x)
                x = self.normal(x / length.clamp_min(torch.finfo(length.dtype).tiny))
            return _length(x).flatten().sqrt()


def trust(uncertainty: Tensor, tolerance: Tensor | float) -> Tensor:
    """Weights in (0, 1] of data: 1 while the uncertainty u is small, and v / u, as in least squares, above v."""
    return tolerance / (tolerance + uncertainty)


def conjugate_gradients(
    normal: Callable[[Tensor], Tensor],
    rhs: Tensor,
    weight: Tensor | float,
    *,
    iterations: int,
    start: Tensor | None = None,
    tolerance: float = 0.0,
) -> Tensor:
    """Solve (N + weight I) x = rhs for a self-adjoint, positive semidefinite N, each batch item on its own.

    rhs, start and the result: (B, ...), real or complex. weight: a number, a 0-d tensor or one of each item (B,); it
    may require grad. An item stops changing once its residual is below `tolerance` times the norm of its rhs (or below
    what its dtype can resolve), so a result does not depend on what else is in the batch; with a tolerance
    the loop ends when all items have stopped. Autograd differentiates the iterations as they were run.
    Hestenes and Stiefel, J. Res. NBS 49 (1952), 409.
    """
    with full_precision(rhs):
        return _iterated(normal, rhs, weight, iterations, start, tolerance)


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Physics computes in the dtype of what it is given, also where a network's layers compute in 16 bits."""
    kind = like.device.type
    reduced = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if reduced else nullcontext()


def _iterated(
    normal: Callable[[Tensor], Tensor],
    rhs: Tensor,
    weight: Tensor | float,
    iterations: int,
    start: Tensor | None,
    tolerance: float,
) -> Tensor:
    of_image = weight
    if isinstance(weight, Tensor) and weight.dim():
        weight, of_image = weight.reshape(-1, 1), beside(weight, rhs)
    if start is None:
        x, r = None, _real(rhs)
    else:
        x = _real(start)
        r = _real(rhs - normal(start) - of_image * start)
    p = r
    residual = _dot(r, r)
    resolution = max(tolerance, torch.finfo(r.dtype).eps) ** 2
    floor = resolution * _dot(_real(rhs), _real(rhs)).detach()
    for iteration in range(iterations):
        active = residual > floor
        if tolerance > 0 and not on_host(active.any()):
            break
        q = _real(normal(_image(p, rhs)))
        q = q.add(p, alpha=weight) if isinstance(weight, float | int) else torch.addcmul(q, p, weight)
        curvature = _dot(p, q)
        alpha = _ratio(residual, curvature, active & (curvature > 0))
        x = alpha * p if x is None else torch.addcmul(x, alpha, p)
        if iteration == iterations - 1:
            break
        r = torch.addcmul(r, alpha, q, value=-1)
        previous, residual = residual, _dot(r, r)
        p = torch.addcmul(r, _ratio(residual, previous, active), p)
    return torch.zeros_like(rhs) if x is None else _image(x, rhs)


def self_adjoint(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a self-adjoint linear `function` whose derivative is itself: backward stores no intermediates.

    `function` runs without autograd, so it may work in place on its own temporaries; derivatives of any order
    with respect to `x` are exact, derivatives with respect to what `function` closes over are not taken.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return function(x)
    return cast(Tensor, _SelfAdjoint.apply(x, function))  # type: ignore[no-untyped-call]


class _SelfAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return self_adjoint(ctx.function, gradients[0]), None


# Conjugate gradients run on real views (B, N): operations with real factors are faster than complex ones.


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()).flatten(1) if x.is_complex() else x.flatten(1)


def _image(x: Tensor, like: Tensor) -> Tensor:
    return torch.view_as_complex(x.view(*like.shape, 2)) if like.is_complex() else x.view(like.shape)


def _length(x: Tensor) -> Tensor:
    """Norm of each item, shaped to divide images."""
    return beside(_dot(_real(x), _real(x)).sqrt(), x)


def beside(each: Tensor, like: Tensor) -> Tensor:
    """One number of each item (B,), shaped to multiply or divide data or images (B, ...)."""
    return each.reshape(-1, *(1 for _ in like.shape[1:]))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    dot: Tensor = torch.linalg.vecdot(a, b)
    return dot.unsqueeze(1)


def _ratio(numerator: Tensor, denominator: Tensor, active: Tensor) -> Tensor:
    """Divide where `active`, else 0; the inner `where` keeps 0/0 out of the gradient, too."""
    return torch.where(active, numerator, 0.0) / torch.where(active, denominator, 1.0)
