"""Many rounds in one process: nothing may pile up."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from tests.federation.rig import Rig
from tests.toys import toy_study
from wardround.engines.local import LocalEngine
from wardround.federation.coordinator import Coordinator

ROUNDS, WARM = 120, 20


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_a_hundred_rounds_leak_no_file_and_no_memory(tmp_path: Path) -> None:
    schedule = {"rounds": ROUNDS, "validate_every": 0, "release": "last"}
    rig = Rig(toy_study(schedule=schedule, local={"steps": 1, "batch": 2, "optimizer": "sgd", "lr": 0.1}), tmp_path)
    # The rig's own engine keeps a copy of every message.
    engine = LocalEngine(lambda header: rig.sites[header.site])
    rig.coordinator = Coordinator(rig.host.plan("federated"), rig.method, engine, rig.journal)
    found: dict[int, tuple[int, int]] = {}
    for report in rig.coordinator.rounds(rig.start()):
        if report.round in (WARM, ROUNDS):
            gc.collect()
            found[report.round] = resident(), len(os.listdir("/proc/self/fd"))
    (memory, files), (memory_after, files_after) = found[WARM], found[ROUNDS]
    assert files_after == files
    assert memory_after - memory < 4 << 20
    assert len(list(tmp_path.rglob("blobs/*"))) < 20
