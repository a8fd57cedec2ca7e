"""Which metrics a site keeps to itself, because they would say something of too few of its patients.

A metric that patients can be without is over a part of them, so the rules for numbers of patients hold for that part
and for the rest, and for what the value singles out: with one sick patient an AUROC is that patient's rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from wardround.tasks.task import MetricSpec

Floats = npt.NDArray[np.float64]


def kept_back(specs: Sequence[MetricSpec], rows: Mapping[str, Floats], least: int, *, bins: bool) -> dict[str, str]:
    """Why metrics may not leave the site: name -> reason, of those that may not; `rows` are (n, *shape) of each.

    A metric stays where a group of patients that it is about has some and fewer than `least` patients: those with a
    value, those without, those with or without a class. Where `bins` leave, and not their value alone, so do those
    whose bins hold as few.
    """
    found = {spec.name: _reason(spec, rows[spec.name], least, bins) for spec in specs if spec.counts_apart}
    return {name: why for name, why in found.items() if why is not None}


def _reason(spec: MetricSpec, rows: Floats, least: int, bins: bool) -> str | None:
    counted = int(spec.kind.counted(rows).sum())
    few = f"{spec.name}: fewer than {least} patients"
    for what, sizes in (
        ("have a value", (counted,)),
        ("have no value", (len(rows) - counted,)),
        ("have a class, or have it not", spec.kind.groups(rows)),
    ):
        if any(0 < size < least for size in sizes):
            return f"{few} {what}"
    cells = spec.kind.cells(rows) if bins else None
    return f"{few} in a bin" if cells is not None and 0 < cells < least else None
