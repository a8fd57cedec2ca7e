"""Measured samples of a scan split in two: what a network sees, and what its image is measured against.

Self-supervision via data undersampling (SSDU; Yaman et al., Magn. Reson. Med. 84 (2020), 3172). The measured samples
Omega are split in Theta, of which the network makes an image x, and Lambda, of which it sees nothing. No true image is
needed: the loss is how well A_Lambda x predicts the data of Lambda.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.coils import calibration_region
from wardround.imaging.acquisition.mri.masks import centred
from wardround.study.supervision import Supervision

FloatArray = NDArray[np.float32]
# Deviations of the Gaussian in an axis: that of a quarter of it, as in the paper's code (`std_scale` 4).
_DEVIATIONS = 4.0


def held_out_samples(mask: NDArray[np.generic], how: Supervision, random: np.random.Generator) -> FloatArray:
    """Draw Lambda of a mask (H, W): float32, 1 where a measured sample is kept from the network.

    `how.share` is of the samples outside the fully sampled centre (`calibration_region`), at least one. The centre
    stays with the network whole, because coil maps are estimated there: so the maps of Theta are those of Omega, and
    nothing of Lambda is in them. (The paper keeps a block of 4 x 4 in Theta, and has its maps from elsewhere.) Samples
    are drawn one after the other without putting back, with a probability proportional to their density.
    With `how.held` of lines, whole lines (along H) are drawn so instead of samples.
    Raises GeometryError where nothing is measured outside the centre, and for lines of a mask that is none of lines.
    """
    free, lines = outside_centre(mask), how.held == "lines"
    if lines and not of_lines(mask):
        raise GeometryError(
            "a scan left out single samples, so whole lines cannot be held out of it; set `supervision.held: samples`"
        )
    drawn = free.any(0, keepdims=True) if lines else free
    places = np.flatnonzero(drawn)
    if not len(places):
        raise GeometryError(
            "all that was measured is the calibration centre, so no samples can be kept from the network; lower "
            "`calibration`, or set `supervision: {kind: full}`"
        )
    # An exponential race: who comes first, second, third is drawn as one by one without putting back.
    arrival = random.exponential(size=len(places)) / _density(drawn.shape, how)[places]
    held = np.zeros(drawn.size, np.float32)
    held[places[np.argsort(arrival, kind="stable")[: max(1, round(how.share * len(places)))]]] = 1
    return held.reshape(drawn.shape) * free.astype(np.float32)


def of_lines(mask: NDArray[np.generic]) -> bool:
    """Whether a mask (H, W) is of whole lines along H."""
    return bool((mask == mask[:1]).all())


def outside_centre(mask: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Which samples of a mask (H, W) were measured outside its fully sampled centre (`calibration_region`)."""
    return np.asarray((mask != 0) & (centre(mask) == 0))


def centre(mask: NDArray[np.generic]) -> FloatArray:
    """1 in the fully sampled centre of a mask (H, W), `calibration_region`: float32 (H, W)."""
    rows, columns = calibration_region(np.asarray(mask, np.float32))
    found = np.zeros(mask.shape, np.float32)
    found[centred(rows, mask.shape[0]), centred(columns, mask.shape[1])] = 1
    return found


def _density(shape: tuple[int, ...], how: Supervision) -> NDArray[np.float64]:
    """Relative density of all samples, flattened."""
    if how.density == "uniform":
        return np.ones(int(np.prod(shape)))
    axes = [(np.arange(n) - n // 2) * _DEVIATIONS / max(n - 1, 1) for n in shape]
    return np.exp(-0.5 * (axes[0][:, None] ** 2 + axes[1] ** 2)).ravel()


def kspace_loss(predicted: Tensor, measured: Tensor) -> Tensor:
    """|y - u|_2 / |y|_2 + |y - u|_1 / |y|_1 of each item, u predicted and y measured: complex (B, ...) -> (B,).

    The normalised l1-l2 loss of Yaman et al. (2020); absolute values are complex moduli.
    0 is perfect, 2 is what predicting nothing comes to.
    """
    return relative_error(predicted, measured) + relative_error(predicted, measured, 1)


def relative_error(predicted: Tensor, measured: Tensor, order: int = 2) -> Tensor:
    """|y - u| / |y| of each item, in the norm of `order`; u predicted and y measured: complex (B, ...) -> (B,)."""
    error, data = (predicted - measured).flatten(1), measured.flatten(1)
    size = torch.linalg.vector_norm(data, order, dim=1).clamp_min(torch.finfo(data.real.dtype).tiny)
    found: Tensor = torch.linalg.vector_norm(error, order, dim=1) / size
    return found


def unseen_share(image: Tensor, maps: Tensor) -> Tensor:
    """|w x|_2 / |x|_2 of each image x (B, H, W), with w^2 = 1 - sum |S_c|^2 of maps (B, C, H, W): (B,).

    How much of an image lies where no coil sees anything, as around the head with estimated maps. No sample tells of
    it, so a loss of samples leaves whatever a network puts there; lowered, it is 0 there, as the least-norm solution.
    The denominator only sets the scale, and has no gradient.
    """
    seen = torch.view_as_real(maps).square().sum((1, -1))
    outside = (1 - seen).clamp_min(0).sqrt() * image
    size = torch.linalg.vector_norm(image.detach().flatten(1), dim=1)
    share: Tensor = torch.linalg.vector_norm(outside.flatten(1), dim=1)
    found: Tensor = share / size.clamp_min(torch.finfo(size.dtype).tiny)
    return found
