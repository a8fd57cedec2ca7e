"""Total variation of a real image, for MRI: the assumption of a network with `image: real`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wardround.imaging.baselines.tv import WEIGHTS
from wardround.study.baselines import Baseline

if TYPE_CHECKING:
    from torch import Tensor

    from wardround.imaging.acquisition.operator import LinearOperator


def _reconstruct(operator: LinearOperator, data: Tensor, weight: float | None) -> Tensor:
    # Late: results read the label without torch.
    from wardround.imaging.acquisition.solvers import tv
    from wardround.imaging.acquisition.wrapped import RealImage

    assert weight is not None
    return tv(RealImage(operator), data, weight)


TV_REAL = Baseline(
    "TV, real image",
    "total variation of a real image, nothing learned",
    _reconstruct,
    WEIGHTS,
    key="tv_weights",
    modalities=frozenset({"mri"}),
    real_images=True,
    style="other-2",
)
