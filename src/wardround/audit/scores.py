"""What a recovered image is worth to an adversary, and the light that this gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom
from torch import Tensor

from wardround.tasks.metrics import inner, masked_mean, psnr, ssim_map

Light = Literal["red", "amber", "green", "attack not working", "not attacked"]
Floats = npt.NDArray[np.float64]

RED_SSIM = 0.5
RED_RETRIEVAL = 10.0  # times chance
CONTROL_SSIM = 0.8
_ORDER: tuple[Light, ...] = ("not attacked", "green", "attack not working", "amber", "red")


@dataclass(frozen=True, eq=False)
class Trial:
    """Scores of the images of one update, each (N,): of the recovered, the mean and the best other image."""

    ssim: Floats
    psnr: Floats
    null_ssim: Floats
    other_ssim: Floats
    found: npt.NDArray[np.bool_]  # whether the victim is the recovered image's nearest neighbour in the pool


@dataclass(frozen=True)
class Row:
    """One attack on one kind of update, over all its trials. `worst` is the worst for the patient: the highest."""

    variant: str
    attack: str
    trials: int
    images: int
    ssim_median: float
    ssim_worst: float
    psnr_median: float
    psnr_worst: float
    null_ssim: float
    null_sd: float
    best_other_ssim: float
    retrieved: int
    retrieval: float
    chance: float
    light: Light
    why: str

    def to_json(self) -> dict[str, Any]:
        """As audit.json holds it."""
        return asdict(self)


def score(recovered: Tensor, truth: Tensor, masks: Tensor | None, pool: Tensor) -> Trial:
    """Score recovered images (N, H, W) against the truth, in the order that fits it best.

    `pool` (M, H, W) are the site's images to be told apart, with the truth among them; the null hypotheses are their
    mean and the best other one. SSIM and PSNR are taken inside `masks` where there are any.
    """
    recovered, truth, pool = (x.detach().float() for x in (recovered, truth, pool))
    table = np.array([[float(_ssim(r, t, None)) for t in truth] for r in recovered])
    _, columns = linear_sum_assignment(-table)
    ordered = recovered[torch.from_numpy(np.argsort(columns))]
    scored = [_one(ordered[i], truth[i], None if masks is None else masks[i], pool) for i in range(len(truth))]
    return Trial(*(np.array(values) for values in zip(*scored, strict=True)))


def _one(image: Tensor, truth: Tensor, mask: Tensor | None, pool: Tensor) -> tuple[float, float, float, float, bool]:
    others = pool[[not torch.equal(each, truth) for each in pool]]
    null = others.mean(dim=0) if len(others) else torch.zeros_like(truth)
    nearest = max((float(_correlation(each, truth)), i) for i, each in enumerate(others)) if len(others) else None
    best = float(_ssim(others[nearest[1]], truth, mask)) if nearest else 0.0
    own = float(_correlation(image, truth))
    found = bool(len(others)) and all(own > float(_correlation(image, each)) for each in others)
    error = psnr(image[None], truth[None], None if mask is None else mask[None])
    return float(_ssim(image, truth, mask)), float(error), float(_ssim(null, truth, mask)), best, found


def _ssim(image: Tensor, truth: Tensor, mask: Tensor | None) -> Tensor:
    similarity = ssim_map(image[None], truth[None])
    return masked_mean(similarity, None if mask is None else inner(mask[None])).squeeze(0)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    return torch.cosine_similarity((a - a.mean()).flatten(), (b - b.mean()).flatten(), dim=0)


def row(variant: str, attack: str, trials: Sequence[Trial], pool: int, *, works: bool) -> Row:
    """Sum up an attack's trials among `pool` images; `works` says whether its positive control succeeded."""
    ssims, psnrs, nulls, others = (
        np.concatenate([getattr(trial, name) for trial in trials])
        for name in ("ssim", "psnr", "null_ssim", "other_ssim")
    )
    retrieved = int(sum(trial.found.sum() for trial in trials))
    n, chance = len(ssims), 1.0 / max(pool, 1)
    null, spread = float(nulls.mean()), float(nulls.std(ddof=1)) if n > 1 else 0.0
    light, why = traffic_light(float(ssims.max()), null, spread, retrieved, n, chance)
    if not works and light == "green":
        light, why = "attack not working", "its positive control failed, so that it found nothing means nothing"
    return Row(
        variant=variant,
        attack=attack,
        trials=len(trials),
        images=n,
        ssim_median=float(np.median(ssims)),
        ssim_worst=float(ssims.max()),
        psnr_median=float(np.median(psnrs)),
        psnr_worst=float(psnrs.max()),
        null_ssim=null,
        null_sd=spread,
        best_other_ssim=float(others.max()),
        retrieved=retrieved,
        retrieval=retrieved / n,
        chance=chance,
        light=light,
        why=why,
    )


def traffic_light(ssim: float, null: float, sd: float, retrieved: int, n: int, chance: float) -> tuple[Light, str]:
    """The light of an attack's best SSIM and its retrievals, and why.

    Where the mean image alone reaches SSIM 0.5, an attack must beat it by 2 sd to count; a retrieval rate of 10 times
    chance is red where chance explains it with p <= 0.05, and amber on fewer trials.
    """
    above = ssim > null + 2.0 * sd
    rate = retrieved / n if n else 0.0
    often = retrieved > 0 and rate >= RED_RETRIEVAL * chance
    if ssim >= RED_SSIM and above:
        return "red", f"SSIM {ssim:.2f}: a recognisable image"
    if often and float(binom.sf(retrieved - 1, n, chance)) <= 0.05:
        return (
            "red",
            f"{retrieved} of {n} recognised among {round(1 / chance)} images, {rate / chance:.0f} times chance",
        )
    if above:
        return "amber", f"SSIM {ssim:.2f} is above the mean image's {null:.2f} by more than 2 sd"
    if retrieved and float(binom.sf(retrieved - 1, n, chance)) <= 0.05:
        return "amber", f"{retrieved} of {n} recognised: more than chance, among few images"
    if often:
        return "amber", f"{retrieved} of {n} recognised: more than chance, but too few trials to tell"
    return "green", "no better than the mean image, and recognised no more often than by chance"


def worst_light(lights: Sequence[Light]) -> Light:
    """The light of the whole: one attack that works badly never turns into safety by another that finds nothing."""
    return max(lights, key=_ORDER.index, default="not attacked")
