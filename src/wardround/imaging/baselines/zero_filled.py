"""The zero-filled image of MRI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wardround.study.baselines import Baseline

if TYPE_CHECKING:
    from torch import Tensor

    from wardround.imaging.acquisition.operator import LinearOperator


def _reconstruct(operator: LinearOperator, data: Tensor, weight: float | None) -> Tensor:
    return operator.A_adjoint(data)


ZERO_FILLED = Baseline(
    "Zero-filled",
    "no reconstruction: missing samples are zero",
    _reconstruct,
    modalities=frozenset({"mri"}),
    style="zero-filled",
)
