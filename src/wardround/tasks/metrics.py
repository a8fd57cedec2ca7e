"""Image metrics with their range stated, and means over patients that can be merged.

All image metrics take magnitude images (B, H, W) scaled so that the volume's maximum is 1: the data range of
PSNR and SSIM is therefore 1.0, the maximum of the volume and not of the slice. `*_head` restricts a metric to
the pixels of a mask, because empty background flatters PSNR and punishes SSIM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wardround.tasks.task import MetricSpec

if TYPE_CHECKING:
    from torch import Tensor

DATA_RANGE = 1.0
SSIM_WINDOW = 7

RECONSTRUCTION_METRICS = (
    MetricSpec("psnr", 0.0, 80.0, 1e-4, True),
    MetricSpec("ssim", -1.0, 1.0, 1e-6, True),
    MetricSpec("nmse", 0.0, 10.0, 1e-6, False),
    MetricSpec("psnr_head", 0.0, 80.0, 1e-4, True),
    MetricSpec("ssim_head", -1.0, 1.0, 1e-6, True),
    MetricSpec("nmse_head", 0.0, 10.0, 1e-6, False),
)


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


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` patients with its bootstrap interval; the bounds equal the value without replicates."""

    value: float
    ci_low: float
    ci_high: float
    n: int


@dataclass(frozen=True, eq=False)
class PatientMeans:
    """A metric summed over patients, with bootstrap replicates; states of different patients add.

    `replicates` (R,) holds, for each replicate, the sum over the patients it drew, with multiplicity: so a
    site shares R sums and no patient's value. Added across sites, replicate r combines every site's own
    r-th draw: the interval is that of a bootstrap stratified by site (each site resamples its own number of
    patients; Efron & Tibshirani, An Introduction to the Bootstrap, 1993), valid for these sites, silent
    about new ones.
    """

    total: float
    count: int
    replicates: NDArray[np.float64]

    @classmethod
    def empty(cls, replicates: int) -> PatientMeans:
        """The neutral element of `+`."""
        return cls(0.0, 0, np.zeros(replicates))

    @classmethod
    def of(cls, values: Sequence[float] | NDArray[np.float64], weights: NDArray[np.int64]) -> PatientMeans:
        """From one value per patient (n,) and `replicate_weights` (R, n)."""
        per_patient = np.asarray(values, dtype=np.float64)
        if weights.ndim != 2 or weights.shape[1] != per_patient.size:
            raise ValueError(f"weights {weights.shape} do not fit {per_patient.size} patients")
        return cls(float(per_patient.sum()), per_patient.size, weights @ per_patient)

    def __add__(self, other: PatientMeans) -> PatientMeans:
        if self.replicates.shape != other.replicates.shape:
            raise ValueError(f"{self.replicates.size} replicates do not add to {other.replicates.size}")
        return PatientMeans(self.total + other.total, self.count + other.count, self.replicates + other.replicates)

    def compute(self, level: float = 0.95) -> Estimate:
        """The mean over all patients and its percentile interval; NaN without patients."""
        if not self.count:
            return Estimate(np.nan, np.nan, np.nan, 0)
        return _estimate(self.total / self.count, self.replicates / self.count, self.count, level)


def mean_of_sites(sites: Sequence[PatientMeans], level: float = 0.95) -> Estimate:
    """The unweighted mean of the sites' means, sites without patients left out."""
    present = [site for site in sites if site.count]
    if not present:
        return Estimate(np.nan, np.nan, np.nan, 0)
    value = float(np.mean([site.total / site.count for site in present]))
    replicates = np.mean([site.replicates / site.count for site in present], axis=0)
    return _estimate(value, replicates, sum(site.count for site in present), level)


def replicate_weights(patients: int, replicates: int, random: np.random.Generator) -> NDArray[np.int64]:
    """How often each replicate draws each patient: (replicates, patients); rows sum to `patients`."""
    if not patients or not replicates:
        return np.zeros((replicates, patients), dtype=np.int64)
    return random.multinomial(patients, np.full(patients, 1.0 / patients), size=replicates)


def _estimate(value: float, replicates: NDArray[np.float64], count: int, level: float) -> Estimate:
    if not replicates.size:
        return Estimate(value, value, value, count)
    tail = 50.0 * (1.0 - level)
    low, high = np.percentile(replicates, (tail, 100.0 - tail))
    return Estimate(value, float(low), float(high), count)
