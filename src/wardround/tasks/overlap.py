"""How a predicted mask agrees with the drawn one: Dice, HD95, sensitivity, error of the volume; whole patients, in 3-D.

A patient without the structure has no Dice, and counts apart; what the network marks in such patients is `false_alarm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from wardround.tasks.task import MetricSpec
from wardround.wire.host import on_host

Mask = NDArray[np.bool_]
# Beyond it, in mm or pixels, a surface counts as missed; the diagonal of a head is less.
FARTHEST = 400.0
_MOST_VOLUME_ERROR = 10.0


def overlap_metrics(structures: Sequence[str], unit: str) -> tuple[MetricSpec, ...]:
    """The metrics of a segmentation; the first is the mean Dice of a patient's structures.

    With one structure they have no name behind them; with several each of them has its own, beside the mean Dice.
    """
    if len(structures) == 1:
        return _of("", unit)
    mean = MetricSpec(
        "dice", 0.0, 1.0, 1e-4, True, "Dice", "", 0.005,
        "2 |A and B| / (|A| + |B|) of a patient's voxels, mean over the structures that the patient has",
        may_be_absent=True,
    )  # fmt: skip
    return (mean, *(spec for structure in structures for spec in _of(structure, unit)))


def _of(structure: str, unit: str) -> tuple[MetricSpec, ...]:
    end, of = (f"_{structure}", f" of {structure}") if structure else ("", "")
    return (
        MetricSpec(f"dice{end}", 0.0, 1.0, 1e-4, True, f"Dice{of}", "", 0.005,
                   "2 |A and B| / (|A| + |B|) of a patient's voxels", may_be_absent=True),
        MetricSpec(f"hd95{end}", 0.0, FARTHEST, 1e-2, False, f"HD95{of}", unit, 0.5,
                   "the larger of both 95th percentiles of the distances from one surface to the other; the image's "
                   "diagonal where nothing was marked", may_be_absent=True),
        MetricSpec(f"sensitivity{end}", 0.0, 1.0, 1e-4, True, f"Sensitivity{of}", "", 0.005,
                   "share of the structure's voxels that were marked", may_be_absent=True),
        MetricSpec(f"volume_error{end}", 0.0, _MOST_VOLUME_ERROR, 1e-3, False, f"Volume error{of}", "", 0.01,
                   "|marked - true| volume / true volume", may_be_absent=True),
        MetricSpec(f"false_alarm{end}", 0.0, 1.0, 1e-3, False, f"False alarms{of}", "", 0.01,
                   "share of patients without the structure in whom something was marked", may_be_absent=True),
    )  # fmt: skip


def overlap_scores(
    predicted: Tensor, drawn: Tensor, known: Sequence[bool], structures: Sequence[str], spacing: Sequence[float]
) -> dict[str, Tensor]:
    """All metrics of one image: name -> (1,), NaN where the image has none.

    predicted, drawn: bool (K, *shape), a channel a structure, `spacing` the size of a voxel along `shape`. A structure
    that was not annotated (`known`) has no values.
    """
    one = len(structures) == 1
    marked, true = on_host(predicted).astype(bool), on_host(drawn).astype(bool)
    scores: dict[str, float] = {}
    for number, structure in enumerate(structures):
        values = _scores(marked[number], true[number], spacing) if known[number] else dict.fromkeys(_NAMES, np.nan)
        scores |= {name if one else f"{name}_{structure}": value for name, value in values.items()}
    if not one:
        each = np.array([scores[f"dice_{structure}"] for structure in structures])
        scores["dice"] = float(np.nanmean(each)) if np.isfinite(each).any() else np.nan
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in scores.items()}


_NAMES = ("dice", "hd95", "sensitivity", "volume_error", "false_alarm")


def _scores(marked: Mask, true: Mask, spacing: Sequence[float]) -> dict[str, float]:
    a, b = int(marked.sum()), int(true.sum())
    if b == 0:
        return {**dict.fromkeys(_NAMES, np.nan), "false_alarm": float(a > 0)}
    both = int((marked & true).sum())
    return {
        "dice": 2.0 * both / (a + b),
        "hd95": hd95(marked, true, spacing),
        "sensitivity": both / b,
        "volume_error": abs(a - b) / b,
        "false_alarm": np.nan,
    }


def hd95(marked: Mask, true: Mask, spacing: Sequence[float]) -> float:
    """The larger of both 95th percentiles of the distances from one surface to the other, in the unit of `spacing`.

    As Metrics Reloaded has it (Maier-Hein et al., Nature Methods 21, 2024).
    A surface is of the voxels that have a neighbour outside, across a face. The diagonal of the image where one of the
    two is empty; 0 where both are.
    """
    if not marked.any() or not true.any():
        both = marked.any() == true.any()
        return 0.0 if both else float(np.linalg.norm(np.multiply(marked.shape, spacing)))
    # Only what is around them: distances outside do not matter.
    box = tuple(slice(max(int(low) - 1, 0), int(high) + 2) for low, high in _box(marked | true))
    surfaces = [_surface(mask[box]) for mask in (marked, true)]
    away = [ndimage.distance_transform_edt(~surface, sampling=tuple(spacing)) for surface in surfaces]
    return float(max(np.percentile(away[1][surfaces[0]], 95), np.percentile(away[0][surfaces[1]], 95)))


def _box(mask: Mask) -> list[tuple[int, int]]:
    spans = []
    for axis in range(mask.ndim):
        rest = tuple(other for other in range(mask.ndim) if other != axis)
        at = np.flatnonzero(mask.any(axis=rest))
        spans.append((int(at[0]), int(at[-1])))
    return spans


def _surface(mask: Mask) -> Mask:
    eroded: Any = ndimage.binary_erosion(mask, border_value=0)
    return np.asarray(mask & ~eroded, dtype=np.bool_)
