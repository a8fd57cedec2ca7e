"""What the simulated CT scanners of a study take: memory, and time where that is not enough."""

from __future__ import annotations

import math
from collections.abc import Iterator

from wardround.imaging.acquisition.ct.memory import machine_memory, planned_matrices
from wardround.imaging.acquisition.ct.operator import VARIABLE, MatrixPlan
from wardround.results.units import human_bytes
from wardround.runs.columns import table, wrapped
from wardround.study.ct import CTAcquisition
from wardround.study.schema import Study


def explain_matrices(study: Study) -> str:
    """The matrices of every site's scanner, their sum, and what is wrong with them: a section of `check`.

    Raises StudyError.
    """
    scanners: dict[str, dict[str, MatrixPlan]] = {}
    keys: dict[str, str] = {}
    for site in study.sites:
        acquisition = study.acquisition_of(site)
        assert isinstance(acquisition, CTAcquisition)
        keys[site] = acquisition.model_dump_json()  # sites of one acquisition share a scanner
        if keys[site] not in scanners:
            scanners[keys[site]] = dict(planned_matrices(acquisition.geometry))
    plans = {site: scanners[key] for site, key in keys.items()}
    names = next(iter(plans.values()))
    rows = [(site, *map(_cell, planned.values())) for site, planned in plans.items()]
    total = sum(plan.nbytes for planned in scanners.values() for plan in planned.values() if plan.stored)
    lines = [
        "Matrices of the simulated scanners, in memory",
        table(("site", *names), rows),
        wrapped(f"In all {human_bytes(total)}; a worker process has those of the sites it serves.", "  "),
        *(wrapped(line, "  - ") for line in _cautions(plans, total)),
    ]
    return "\n".join(lines)


def _cell(plan: MatrixPlan) -> str:
    return human_bytes(plan.nbytes) if plan.stored else f"on the fly (of {human_bytes(plan.nbytes)})"


def _cautions(plans: dict[str, dict[str, MatrixPlan]], total: int) -> Iterator[str]:
    slow = {
        site: [plan for plan in planned.values() if not plan.stored]
        for site, planned in plans.items()
        if not all(plan.stored for plan in planned.values())
    }
    if slow:
        largest = max(plan.nbytes for planned in slow.values() for plan in planned)
        limit = next(plan.limit for planned in slow.values() for plan in planned)
        yield (
            f"On the fly at {', '.join(slow)}: a matrix above {human_bytes(limit)} is computed anew for every product, "
            "which is slow: minutes for a slice of 512 x 512 pixels. Take fewer pixels, views or bins, or with the "
            f"memory for it set the environment variable {VARIABLE}={math.ceil(1.05 * largest / 1e9)}."
        )
    memory = machine_memory()
    if memory is not None and total > memory:
        yield (
            f"That is more than the {human_bytes(memory)} of memory of this machine: take fewer pixels, views or bins, "
            f"or a lower {VARIABLE}, which is slower."
        )
