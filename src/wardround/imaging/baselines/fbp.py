"""Filtered back projection of CT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wardround.study.baselines import Baseline

if TYPE_CHECKING:
    from torch import Tensor

    from wardround.imaging.acquisition.operator import LinearOperator


def _reconstruct(operator: LinearOperator, data: Tensor, weight: float | None) -> Tensor:
    return operator.initial(data)


FBP = Baseline(
    "FBP",
    "filtered back projection, nothing learned",
    _reconstruct,
    modalities=frozenset({"ct"}),
    style="zero-filled",
)
