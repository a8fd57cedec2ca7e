"""Hospitals that approved a study measure a given model each, and none of them trains: as on one machine."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import yaml

from tests.hospitals.joined import Consortium, resident
from tests.hospitals.test_agent import Direct, approved
from tests.runs.test_evaluation_only import of_file
from tests.toys import toy_sites, toy_study
from wardround.runs.conduct import coordinate
from wardround.runs.session import run

ROLES = {"A": {}, "B": {"role": "evaluate"}, "C": {"role": "unseen"}}


@pytest.mark.slow
def test_a_given_model_is_measured_where_it_was_approved(tmp_path: Path) -> None:
    sites = toy_sites(tmp_path / "data")
    first = run(toy_study(schedule={"rounds": 1}), sites, tmp_path / "first", engine="local", quiet=True)
    start = of_file(first)
    study = toy_study(ROLES, schedule={"rounds": 0}, start=start)
    alone = run(study, sites, tmp_path / "alone", engine="local", near=tmp_path, quiet=True)
    consortium = Consortium(tmp_path / "federation")
    residents = {}
    for name in ROLES:
        entry = {"data": "data", "start": str(tmp_path / start["file"])}
        consortium.of(name).site.write_text(yaml.safe_dump({"sites": {name: entry}}), encoding="utf-8")
        residents[name] = resident(consortium.of(name))
        approved(consortium, residents[name], study)
    with closing(Direct(consortium, residents)) as engine:
        found = coordinate(study, tmp_path / "out", engine, quiet=True, allow_code=True, near=tmp_path)
    for each in residents.values():
        each._workers.halt()
    assert (found.metrics, found.gains) == (alone.metrics, alone.gains)
    assert found.model_sha256 == alone.model_sha256 == first.model_sha256
    assert (found.failed, found.participants) == ({}, ())
