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
Mask = npt.NDArray[np.bool_]


def kept_back(specs: Sequence[MetricSpec], rows: Mapping[str, Floats], least: int, *, bins: bool) -> dict[str, str]:
    """Why metrics may not leave the site: name -> reason, of those that may not; `rows` are (n, *shape) of each.

    A metric stays where a group of patients that it is about has some and fewer than `least` patients: those with a
    value, those without, those with or without a class, and those by whom its numbers differ from those of a metric
    before it. Where `bins` leave, and not their value alone, so do those whose bins hold as few.
    """
    found: dict[str, str] = {}
    leaving: list[Mask] = []
    for spec in specs:
        if spec.counts_apart:
            counted = spec.kind.counted(rows[spec.name])
            why = _few(spec, rows[spec.name], counted, leaving, least, bins)
            if why is None:
                leaving.append(counted)
            else:
                found[spec.name] = f"{spec.name}: fewer than {least} patients {why}"
    return found


def _few(spec: MetricSpec, rows: Floats, counted: Mask, leaving: Sequence[Mask], least: int, bins: bool) -> str | None:
    groups = {
        "have a value": (counted.sum(),),
        "have no value": ((~counted).sum(),),
        "have a value of it alone, or of another metric alone": [(counted != other).sum() for other in leaving],
        "have a class, or have it not": spec.kind.groups(rows),
    }
    for what, sizes in groups.items():
        if any(0 < size < least for size in sizes):
            return what
    cells = spec.kind.cells(rows) if bins else None
    return "are in a bin" if cells is not None and 0 < cells < least else None
