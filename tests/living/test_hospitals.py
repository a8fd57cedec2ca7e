"""Hospitals that approved two studies, the second of which goes on from the first: each finds what it needs itself."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hospitals.joined import Consortium, resident
from tests.hospitals.test_agent import Direct, approved
from tests.living.ward import ROLES, admit, ward_study
from wardround.living.release import Release
from wardround.living.update import prepare
from wardround.runs.conduct import coordinate

SITES = ("A", "B")


@pytest.mark.slow
def test_hospitals_go_on_from_a_release_that_reached_them(tmp_path: Path, monkeypatch: Any) -> None:
    """No hospital's file names the release: it lies in each one's history, and no patient changes sides."""
    consortium = Consortium(tmp_path / "federation")
    residents = {}
    for number, name in enumerate(SITES):
        folder = consortium.of(name).site.parent / "ward"
        admit(folder, [f"{name}-DOE-{patient:02d}" for patient in range(12)], 0.3 * number)
        text = yaml.safe_dump({"sites": {name: {"data": str(folder)}}})
        consortium.of(name).site.write_text(text, encoding="utf-8")
        residents[name] = resident(consortium.of(name))
    study = ward_study()
    for name in SITES:
        approved(consortium, residents[name], study)
    with closing(Direct(consortium, residents)) as engine:
        first = coordinate(study, tmp_path / "first", engine, quiet=True, allow_code=True)
    admit(consortium.of("A").site.parent / "ward", [f"A-ROE-{number}" for number in range(5)])
    monkeypatch.setitem(ROLES, "B", "evaluate")
    # The coordinator knows of new patients what people say.
    prepared = prepare(Release.at(tmp_path / "first"), ward_study(), tmp_path / "next", train=["A"])
    shutil.rmtree(tmp_path / "first")
    for name in SITES:
        approved(consortium, residents[name], prepared.study)
    with closing(Direct(consortium, residents)) as engine:
        second = coordinate(
            prepared.study, tmp_path / "second", engine, quiet=True, allow_code=True, near=tmp_path / "next"
        )
    for each in residents.values():
        each._workers.halt()
    assert second.failed == {}
    assert second.participants == ("A",)
    assert second.metrics["parent"]["B"] == first.metrics["federated"]["B"]
    assert second.gate is not None
    assert second.gate.sites.keys() == {"A", "B"}
