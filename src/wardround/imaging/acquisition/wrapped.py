"""Operators around another one: in whatever they do not change, they are it."""

from __future__ import annotations

import torch
from torch import Tensor

from wardround.imaging.acquisition.operator import LinearOperator, self_adjoint


class Wrapped(LinearOperator):
    """All of an operator, for a subclass to change some of.

    Only `normal`, `solve` and `norm` follow from `A` and `A_adjoint`, as in any operator: the shortcuts of the one
    inside would not know what a subclass changed.
    """

    def __init__(self, operator: LinearOperator) -> None:
        self._operator = operator

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image, without the batch axis."""
        return self._operator.image_shape

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one measurement, without the batch axis."""
        return self._operator.data_shape

    @property
    def protocol(self) -> Tensor | None:
        """The scanner's features."""
        return self._operator.protocol

    @property
    def prompt(self) -> Tensor | None:
        """The prompts."""
        return self._operator.prompt

    def A(self, x: Tensor) -> Tensor:
        """Measure."""
        return self._operator.A(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Apply the exact adjoint."""
        return self._operator.A_adjoint(y)

    def initial(self, y: Tensor) -> Tensor:
        """The operator's first image."""
        return self._operator.initial(y)

    def uncertainty(self, y: Tensor) -> Tensor | None:
        """The operator's uncertainty of data."""
        return self._operator.uncertainty(y)


class Prompted(Wrapped):
    """An operator with a prompt for each image of a batch, (B, tokens, dimension); in all else it is the operator."""

    def __init__(self, operator: LinearOperator, prompt: Tensor) -> None:
        super().__init__(operator)
        self._prompt = prompt

    @property
    def prompt(self) -> Tensor:
        """The prompts."""
        return self._prompt

    def normal(self, x: Tensor) -> Tensor:
        """A* A x by the operator's shortcut."""
        return self._operator.normal(x)

    def norm(self, like: Tensor, *, iterations: int = 30) -> Tensor:
        """The operator's norm."""
        return self._operator.norm(like, iterations=iterations)


class RealImage(Wrapped):
    """An operator restricted to real images: A x for real x, with adjoint Re(A* y).

    A phase constraint: where coil maps estimated from the scan itself carry the image's smooth phase, what is left to
    find is real, which halves the unknowns (the idea of homodyne and phase-constrained parallel imaging: Noll et al.,
    IEEE TMI 1991; Willig-Onwuachi et al., J. Magn. Reson. 2005). Sharp phase, as near air, becomes an error.
    """

    def A(self, x: Tensor) -> Tensor:
        """Real images (B, *image_shape) to complex data (B, *data_shape)."""
        return self._operator.A(_as_complex(x))

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Complex data (B, *data_shape) to real images (B, *image_shape); adjoint for the inner product Re<., .>."""
        return _real_part(self._operator.A_adjoint(y))

    def initial(self, y: Tensor) -> Tensor:
        """The real part of the operator's first image."""
        return _real_part(self._operator.initial(y))

    def normal(self, x: Tensor) -> Tensor:
        """Re(A* A x)."""
        return self_adjoint(self._normal, x)

    def norm(self, like: Tensor, *, iterations: int = 30) -> Tensor:
        """A bound: the norm over complex images."""
        return self._operator.norm(_as_complex(like), iterations=iterations)

    def _normal(self, x: Tensor) -> Tensor:
        return _real_part(self._operator.normal(_as_complex(x)))


class Weighted(Wrapped):
    """An operator whose data count unequally: W^(1/2) A, with weights W (B, *data_shape) of a batch of data.

    A least-squares solver that is given it and W^(1/2) y minimises the weighted misfit.
    """

    def __init__(self, operator: LinearOperator, weights: Tensor) -> None:
        super().__init__(operator)
        self._root = weights.sqrt()

    def A(self, x: Tensor) -> Tensor:
        """Images (B, *image_shape) to weighted data (B, *data_shape)."""
        return self._root * self._operator.A(x)

    def A_adjoint(self, y: Tensor) -> Tensor:
        """Weighted data (B, *data_shape) to images (B, *image_shape)."""
        return self._operator.A_adjoint(self._root * y)

    def initial(self, y: Tensor) -> Tensor:
        """The operator's first image, of data whose weights are taken off again; those of no weight are zero."""
        return self._operator.initial(self._plain(y))

    def uncertainty(self, y: Tensor) -> Tensor | None:
        """The operator's, which grows with the weights: they scale the noise, and not what was counted."""
        uncertainty = self._operator.uncertainty(self._plain(y))
        return None if uncertainty is None else self._root.square() * uncertainty

    def weighed(self, y: Tensor) -> Tensor:
        """Data of the plain operator as data of this one."""
        return self._root * y

    def _plain(self, y: Tensor) -> Tensor:
        return y / self._root.clamp_min(torch.finfo(self._root.dtype).tiny)


def _as_complex(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)


def _real_part(x: Tensor) -> Tensor:
    return x.real.contiguous()
