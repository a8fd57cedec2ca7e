"""Least squares with coil maps (SENSE) by conjugate gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wardround.study.baselines import Baseline

if TYPE_CHECKING:
    from torch import Tensor

    from wardround.imaging.acquisition.operator import LinearOperator


def _reconstruct(operator: LinearOperator, data: Tensor, weight: float | None) -> Tensor:
    # Late: results read the label without torch.
    from wardround.imaging.acquisition.solvers import cg_sense

    assert weight is not None
    return cg_sense(operator, data, weight)


CG_SENSE = Baseline(
    "CG-SENSE",
    "least squares with coil maps, nothing learned",
    _reconstruct,
    key="cg_weights",
    modalities=frozenset({"mri"}),
    style="cg-sense",
)
