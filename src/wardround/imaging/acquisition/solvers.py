"""Reconstructions without learning, on any operator: the baselines a network has to beat.

All take data (B, *data_shape) and return images (B, *image_shape), each item on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wardround.imaging.acquisition.operator import LinearOperator, conjugate_gradients, trust
from wardround.imaging.acquisition.wrapped import Weighted

_CG_STEPS = 4  # per iteration of `tv`, warm-started; measured: fewer cost more iterations, more cost more time
# Of the penalty, which decides `tv`'s speed. 0.4 suits CT, whose singular values fall with the frequency, and MRI: with
# 8 coils anything up to 1.6 does; with one, where folds move slowly, 1.6 leaves the image some tenths of a decibel
# short of the minimum's.
_PENALTY = 0.4
_RELAXATION = 1.6  # over-relaxation in [1.5, 1.8], Boyd et al., section 3.4.3


def zero_filled(operator: LinearOperator, data: Tensor) -> Tensor:
    """Return A* y, for MRI the coil-combined image of k-space filled with zeros."""
    return operator.A_adjoint(data)


def cg_sense(operator: LinearOperator, data: Tensor, weight: float, iterations: int = 30) -> Tensor:
    """Minimise |A x - y|^2 + weight |x|^2 by conjugate gradients.

    Pruessmann et al., Magn. Reson. Med. 46 (2001), 638.
    """
    return operator.solve(operator.A_adjoint(data), weight, iterations=iterations)


def tv(operator: LinearOperator, data: Tensor, weight: float, iterations: int = 40) -> Tensor:
    """Minimise |A x - y|^2 / 2 + weight TV(x), with the isotropic total variation of real or complex images.

    Images (B, H, W). weight: in units of the image times |A|^2; 0.001 to 0.02 for MRI images of peak 1.
    Alternating directions (ADMM: Boyd et al., Found. Trends Mach. Learn. 3 (2011), 1; for TV: Goldstein and
    Osher, SIAM J. Imaging Sci. 2 (2009), 323) with `iterations` outer steps: 40 come within 1 % of the least
    objective. Takes no derivatives.
    """
    with torch.no_grad():
        rhs = operator.A_adjoint(data)
        scale = operator.norm(rhs).square()[:, None, None]
        scale = scale.clamp_min(torch.finfo(scale.dtype).tiny ** 0.5)  # an empty slice has empty maps
        penalty = _PENALTY * _penalty(scale, rhs, weight)
        x = rhs / scale
        split = gradient(x)
        dual = torch.zeros_like(split)  # scaled by 1 / penalty
        threshold = (weight / penalty)[:, None]

        def normal(z: Tensor) -> Tensor:
            return operator.normal(z).addcmul_(penalty, gradient_adjoint(gradient(z)))

        for _ in range(iterations):
            target = rhs + penalty * gradient_adjoint(split - dual)
            x = conjugate_gradients(normal, target, 0.0, iterations=_CG_STEPS, start=x)
            moved = gradient(x).mul_(_RELAXATION).add_(split, alpha=1 - _RELAXATION).add_(dual)
            dual = _project(moved, threshold)
            split = moved.sub_(dual)
        return x


def weighted_tv(
    operator: LinearOperator, data: Tensor, weight: float, iterations: int = 60, *, tolerance: float = 0.005
) -> Tensor:
    """Minimise (A x - y)* W (A x - y) / 2 + weight TV(x): as `tv`, with data weighted by `trust` in them.

    The same as `tv` for an operator whose noise is alike everywhere. tolerance: the v of `trust`; measured for CT, the
    inverse variance itself (v near 0) is worse, as it leaves nearly all of the image to a few bright rays.
    """
    uncertainty = operator.uncertainty(data)
    if uncertainty is None:
        return tv(operator, data, weight, iterations)
    weighted = Weighted(operator, trust(uncertainty, tolerance))
    return tv(weighted, weighted.weighed(data), weight, iterations)


def tv_objective(operator: LinearOperator, data: Tensor, weight: float, x: Tensor) -> Tensor:
    """Return what `tv` minimises, |A x - y|^2 / 2 + weight TV(x), per item: (B,)."""
    misfit = (operator.A(x) - data).abs().square().flatten(1).sum(1) / 2
    return misfit + weight * total_variation(x)


def total_variation(x: Tensor) -> Tensor:
    """Return the isotropic total variation of images (B, H, W), per item: the sum of |gradient|."""
    return _squared_length(gradient(x)).sqrt().flatten(1).sum(1)


def gradient(x: Tensor) -> Tensor:
    """Forward differences along H and W of images (B, H, W), 0 at the far edges: (B, 2, H, W)."""
    g = torch.zeros(x.shape[0], 2, *x.shape[1:], dtype=x.dtype, device=x.device)
    torch.sub(x[:, 1:], x[:, :-1], out=g[:, 0, :-1])
    torch.sub(x[:, :, 1:], x[:, :, :-1], out=g[:, 1, :, :-1])
    return g


def gradient_adjoint(g: Tensor) -> Tensor:
    """Exact adjoint of `gradient`, minus the divergence: (B, 2, H, W) to (B, H, W)."""
    x = torch.zeros_like(g[:, 0])
    x[:, 1:] += g[:, 0, :-1]
    x[:, :-1] -= g[:, 0, :-1]
    x[:, :, 1:] += g[:, 1, :, :-1]
    x[:, :, :-1] -= g[:, 1, :, :-1]
    return x


def _penalty(scale: Tensor, rhs: Tensor, weight: float) -> Tensor:
    """Penalty of the split per item, (B, 1, 1), up to a factor, given scale = |A|^2: `tv`'s speed depends on it.

    Scales as |A|^2 and with the root of the weight relative to the peak, so that nothing depends on units.
    """
    peak = rhs.abs().amax((-2, -1), keepdim=True)
    tiny = torch.finfo(peak.dtype).tiny
    relative = (weight / peak.clamp_min(tiny)).clamp(1e-8, 1.0)
    return scale * relative.sqrt()


def _project(g: Tensor, radius: Tensor) -> Tensor:
    """Project gradients (B, 2, H, W) to length `radius` (B, 1, 1, 1) at most, pixel by pixel."""
    length = _squared_length(g).sqrt_()
    return g * (radius / torch.maximum(length, radius.clamp_min(torch.finfo(length.dtype).tiny)))


def _squared_length(g: Tensor) -> Tensor:
    parts = torch.view_as_real(g) if g.is_complex() else g.unsqueeze(-1)
    return parts.square().sum((1, -1)).unsqueeze(1)
