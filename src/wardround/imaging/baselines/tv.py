"""Total variation, of any operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wardround.study.baselines import Baseline

if TYPE_CHECKING:
    from torch import Tensor

    from wardround.imaging.acquisition.operator import LinearOperator

# Of images of peak 1, in units of the image times |A|^2, and of attenuation relative to water.
WEIGHTS = (0.0005, 0.001, 0.002, 0.004, 0.008)
CT_WEIGHTS = (0.0002, 0.0003, 0.0004, 0.0005, 0.0006, 0.0008, 0.0012)


def _reconstruct(operator: LinearOperator, data: Tensor, weight: float | None) -> Tensor:
    # Late: results read the label without torch.
    from wardround.imaging.acquisition.solvers import tv

    assert weight is not None
    return tv(operator, data, weight)


TV = Baseline(
    "TV",
    "total variation: compressed sensing, nothing learned",
    _reconstruct,
    WEIGHTS,
    {"ct": CT_WEIGHTS},
    key="tv_weights",
    style="tv",
)
