"""What the scanners of a CT study keep in memory, before any of it is built."""

from __future__ import annotations

import os
from collections.abc import Mapping

from wardround.imaging.acquisition.ct.operator import MatrixPlan, plan_matrix
from wardround.imaging.acquisition.ct.simulate import refined
from wardround.study.ct import CTGeometry


def planned_matrices(geometry: CTGeometry) -> Mapping[str, MatrixPlan]:
    """The three matrices of a scanner in a study: `projector`, `back projection` (FBP) and `simulation`.

    Raises StudyError as `wardround.imaging.acquisition.ct.operator.matrix_limit` does.
    """
    return {
        "projector": plan_matrix(geometry, "joseph"),
        "back projection": plan_matrix(geometry, "fbp", "adjoint"),
        "simulation": plan_matrix(refined(geometry), "strip", "forward"),
    }


def machine_memory() -> int | None:
    """Bytes of this machine's memory; nothing where the operating system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
