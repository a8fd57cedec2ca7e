"""Image metrics with their range stated.

All image metrics take magnitude images (B, H, W) scaled so that the volume's maximum is 1: the data range of
PSNR and SSIM is therefore 1.0, the maximum of the volume and not of the slice. `*_head` restricts a metric to
the pixels of a mask, because empty background flatters PSNR and punishes SSIM.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from wardround.tasks.task import MetricSpec

if TYPE_CHECKING:
    from torch import Tensor

DATA_RANGE = 1.0
SSIM_WINDOW = 7

_WHOLE = (
    MetricSpec("psnr", 0.0, 80.0, 1e-4, True, "PSNR", "dB", 0.05, "peak signal-to-noise ratio over the whole image"),
    MetricSpec(
        "ssim", -1.0, 1.0, 1e-6, True, "SSIM", "", 0.001, "structural similarity over the whole image, at most 1"
    ),
    MetricSpec(
        "nmse", 0.0, 10.0, 1e-6, False, "NMSE", "", 0.0002, "squared error relative to the image's energy, 0 is perfect"
    ),
)


def _in_the_head(spec: MetricSpec) -> MetricSpec:
    inside = spec.definition.replace("over the whole image", "inside the head")
    inside = inside.replace("the image's energy", "the image's energy inside the head")
    return replace(spec, name=f"{spec.name}_head", label=f"{spec.label} in the head", definition=inside)


RECONSTRUCTION_METRICS = (*_WHOLE, *map(_in_the_head, _WHOLE))
KSPACE_RESIDUAL = MetricSpec(
    "kspace_residual", 0.0, 10.0, 1e-6, False, "Held-out k-space error", "", 0.001,
    "error in predicting measured samples that were kept from the method, relative to their size: the mean of the "
    "ratios of Euclidean and of absolute norms, 0 is perfect and 1 is what predicting nothing comes to",
)  # fmt: skip
# Where a site has no true images: of its slices those of images have no value.
SPLIT_METRICS = (KSPACE_RESIDUAL, *(replace(spec, may_be_absent=True) for spec in RECONSTRUCTION_METRICS))


def reconstruction_scores(image: Tensor, target: Tensor, head: Tensor) -> dict[str, Tensor]:
    """All of `RECONSTRUCTION_METRICS`: magnitude images and masks (B, H, W) -> name -> (B,)."""
    similarity = ssim_map(image, target)
    return {
        "psnr": psnr(image, target),
        "ssim": similarity.mean(dim=(-2, -1)),
        "nmse": nmse(image, target),
        "psnr_head": psnr(image, target, head),
        "ssim_head": masked_mean(similarity, inner(head)),
        "nmse_head": nmse(image, target, head),
    }


def psnr(image: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(R^2 / MSE) with R = 1, over all pixels or those of the mask.

    (B, H, W) -> (B,). Identical images give 160 dB instead of infinity.
    """
    error = masked_mean((image - target).square(), mask)
    return 10.0 * (DATA_RANGE**2 / error.clamp_min(1e-16)).log10()


def nmse(image: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Normalised mean squared error |image - target|^2 / |target|^2, over all pixels or those of the mask.

    (B, H, W) -> (B,).
    """
    error = masked_mean((image - target).square(), mask)
    return error / masked_mean(target.square(), mask).clamp_min(1e-16)


def ssim(image: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean structural similarity over all windows, or over those centred on the mask: (B, H, W) -> (B,)."""
    similarity = ssim_map(image, target)
    return masked_mean(similarity, None if mask is None else inner(mask))


def ssim_map(image: Tensor, target: Tensor) -> Tensor:
    """Structural similarity of every full 7x7 uniform window: (B, H, W) -> (B, H-6, W-6).

    K1 = 0.01, K2 = 0.03, R = 1 and sample covariances, as in scikit-image and the fastMRI challenge (Wang et
    al., IEEE TIP 2004; Zbontar et al., arXiv:1811.08839).
    """
    # Imported late: coordinators read specifications and merge means without torch.
    import torch
    from torch.nn.functional import avg_pool2d

    count = SSIM_WINDOW**2
    moments = torch.stack((image, target, image * image, target * target, image * target), dim=1)
    mean_x, mean_y, xx, yy, xy = avg_pool2d(moments, SSIM_WINDOW, stride=1).unbind(dim=1)
    unbias = count / (count - 1)
    variances = unbias * (xx - mean_x * mean_x + yy - mean_y * mean_y)
    covariance = unbias * (xy - mean_x * mean_y)
    c1, c2 = (0.01 * DATA_RANGE) ** 2, (0.03 * DATA_RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)


def inner(mask: Tensor) -> Tensor:
    """The part of a mask (..., H, W) where SSIM windows have their centres: (..., H-6, W-6)."""
    edge = SSIM_WINDOW // 2
    return mask[..., edge:-edge, edge:-edge]


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the last two axes, weighted by the mask; over all pixels if it is absent or empty."""
    if mask is None:
        return values.mean(dim=(-2, -1))
    weights = mask.to(values.dtype)
    area = weights.sum(dim=(-2, -1))
    inside = (values * weights).sum(dim=(-2, -1)) / area.clamp_min(1.0)
    return inside.where(area > 0, values.mean(dim=(-2, -1)))
