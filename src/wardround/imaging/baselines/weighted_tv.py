"""Total variation in which rays of few photons count less, for CT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wardround.imaging.baselines.tv import CT_WEIGHTS
from wardround.study.baselines import Baseline

if TYPE_CHECKING:
    from torch import Tensor

    from wardround.imaging.acquisition.operator import LinearOperator


def _reconstruct(operator: LinearOperator, data: Tensor, weight: float | None) -> Tensor:
    # Late: results read the label without torch.
    from wardround.imaging.acquisition.solvers import weighted_tv

    assert weight is not None
    return weighted_tv(operator, data, weight)


WEIGHTED_TV = Baseline(
    "Weighted TV",
    "total variation, rays weighted by their photons",
    _reconstruct,
    CT_WEIGHTS,
    key="tv_weights",
    modalities=frozenset({"ct"}),
    style="cg-sense",
)
