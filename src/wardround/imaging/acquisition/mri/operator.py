"""Cartesian multi-coil MRI: y = M F S x."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from wardround.errors import GeometryError
from wardround.imaging.acquisition.operator import LinearOperator, self_adjoint
from wardround.wire.host import on_host

# Complex numbers (8 coils of 128 x 128) that one pass of `normal` holds: larger temporaries fall out of the
# processor's cache and are mapped afresh by the allocator at every call, four times slower.
_CHUNK = 2**17
_PLANE = (-2, -1)


def fft2c(x: Tensor) -> Tensor:
    """Centred orthonormal Fourier transform of the last two axes: fftshift(fft2(ifftshift(x)))."""
    k: Tensor = torch.fft.fftshift(torch.fft.fft2(torch.fft.ifftshift(x, _PLANE), norm="ortho"), _PLANE)
    return k


def ifft2c(k: Tensor) -> Tensor:
    """Inverse, and adjoint, of `fft2c`."""
    x: Tensor = torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(k, _PLANE), norm="ortho"), _PLANE)
    return x


class CartesianMRI(LinearOperator):
    """Sensitivity encoding with a Cartesian mask: A x = mask * F(maps * x).

    maps: complex (B, C, H, W). mask: real, broadcastable to (B, H, W); usually 0 and 1. Images are complex
    (B, H, W), data complex (B, C, H, W). A maps batch of 1 serves any batch of images.
    Raises GeometryError where the shapes do not fit. Pruessmann et al., Magn. Reson. Med. 42 (1999), 952.
    """

    def __init__(self, maps: Tensor, mask: Tensor) -> None:
        if maps.ndim != 4 or not maps.is_complex():
            raise GeometryError(
                f"coil maps must be complex (B, C, H, W), got {maps.dtype} with {maps.ndim} axes; "
                "add the batch axis with maps[None]"
            )
        if mask.is_complex() or mask.dtype == torch.bool:
            raise GeometryError(f"the mask must be real floating point, got {mask.dtype}; convert with mask.float()")
        batch, _, height, width = maps.shape
        mask = mask[(None,) * (3 - mask.ndim)]
        fits = mask.ndim == 3 and mask.shape[1] in (1, height) and mask.shape[2] in (1, width)
        if not fits or (mask.shape[0] != batch and 1 not in (mask.shape[0], batch)):
            raise GeometryError(
                f"mask of shape {tuple(mask.shape)} does not fit maps of shape {tuple(maps.shape)}; "
                f"it must broadcast to {(batch, height, width)}"
            )
        self.maps = maps
        self.mask = mask.to(maps.real.dtype)

    @property
    def image_shape(self) -> tuple[int, ...]:
        return tuple(self.maps.shape[2:])

    @property
    def data_shape(self) -> tuple[int, ...]:
        return tuple(self.maps.shape[1:])

    def A(self, x: Tensor) -> Tensor:
        return self.mask[:, None] * fft2c(self.maps * x[:, None])

    def A_adjoint(self, y: Tensor) -> Tensor:
        return (self._conjugate_maps * ifft2c(self.mask[:, None] * y)).sum(1)

    def normal(self, x: Tensor) -> Tensor:
        """Apply A* A; three times faster than `A_adjoint(A(x))`, and backward stores no intermediates.

        The shifts of the centred transform cancel once the mask is shifted to the transform's own order, and
        a mask that varies along W only needs no transform along H.
        """
        if self.maps.requires_grad or self.mask.requires_grad:
            return super().normal(x)
        return self_adjoint(self._normal, x)

    def norm(self, like: Tensor, *, iterations: int = 30) -> Tensor:
        """Bound the largest singular value by max(mask) * max(root sum of squares of the maps): (B,).

        Never too small, exact for a fully sampled scan, and without iterations.
        """
        coils: Tensor = torch.linalg.vector_norm(self.maps.detach(), dim=1).flatten(1).amax(1)
        bound = coils * self.mask.detach().abs().flatten(1).amax(1)
        return bound.expand(like.shape[0])

    @cached_property
    def _conjugate_maps(self) -> Tensor:
        return self.maps.conj().resolve_conj()

    @cached_property
    def _weights(self) -> Tensor:
        """Squared mask in the transform's order, (B or 1, H or 1, W), with the inverse transform's 1/N."""
        mask = self.mask.detach()
        if mask.shape[1] > 1 and on_host((mask == mask[:, :1]).all()):
            mask = mask[:, :1]
        if mask.shape[1] > 1:
            mask = mask.expand(-1, *self.image_shape)
            samples = mask.shape[1] * mask.shape[2]
        else:
            samples = self.image_shape[1]
        weights: Tensor = torch.fft.ifftshift(mask.square() / samples, _PLANE)
        return weights

    def _normal(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        items = batch if x.is_cuda else max(1, _CHUNK // self.maps[0].numel())
        if items >= batch:
            return _normal(x, self.maps, self._conjugate_maps, self._weights)
        parts = (slice(i, i + items) for i in range(0, batch, items))
        arguments = (self.maps, self._conjugate_maps, self._weights)
        return torch.cat([_normal(x[part], *(a if a.shape[0] == 1 else a[part] for a in arguments)) for part in parts])


def _normal(x: Tensor, maps: Tensor, conjugate_maps: Tensor, weights: Tensor) -> Tensor:
    axes = _PLANE if weights.shape[1] > 1 else _PLANE[1:]
    k = torch.fft.fftn(maps * x.unsqueeze(1), dim=axes).mul_(weights.unsqueeze(1))
    images: Tensor = torch.fft.ifftn(k, dim=axes, norm="forward").mul_(conjugate_maps)
    return images.sum(1)
