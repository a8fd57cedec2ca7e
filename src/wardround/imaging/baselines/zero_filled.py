"""The zero-filled image of MRI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wardround.study.baselines import Baseline

if TYPE_CHECKING:
    from torch import Tensor

    from wardround.imaging.acquisition.operator import LinearOperator


def _reconstruct(operator: LinearOperator, data: Tensor, weight: float | None) -> Tensor:
    # A* y of lines; along a trajectory gridding, which makes up for how densely it is sampled.
    return operator.initial(data)


ZERO_FILLED = Baseline(
    "Zero-filled",
    "no reconstruction: missing samples are zero",
    _reconstruct,
    modalities=frozenset({"mri"}),
    style="zero-filled",
)
