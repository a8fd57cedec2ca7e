"""What `check` says of the matrices of simulated scanners, and that it is what a run keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from tests.ct_hospitals import GEOMETRY, OTHER, ct_study, make_ct_hospitals, thorax
from wardround.cli import app
from wardround.imaging.acquisition.ct.memory import machine_memory, planned_matrices
from wardround.imaging.acquisition.ct.operator import VARIABLE, CTProjector, StoredWeights
from wardround.runs import explain_ct
from wardround.study.ct import CTAcquisition, CTGeometry
from wardround.tasks.ct import Scanner


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _check(place: Path, **changes: Any) -> str:
    study = place / "study.yaml"
    study.write_text(yaml.safe_dump(ct_study(**changes)), encoding="utf-8")
    result = _run("check", study)
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split("in memory\n")[1].split("\nArms")[0].split())


@pytest.mark.parametrize("geometry", [GEOMETRY, OTHER])
def test_what_is_planned_is_what_a_scanner_keeps(geometry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    built: dict[str, StoredWeights] = {}
    begin = CTProjector.__init__

    def watched(self: CTProjector, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        assert isinstance(self.weights, StoredWeights)
        built[self.model] = self.weights

    monkeypatch.setattr(CTProjector, "__init__", watched)
    scanner = Scanner(CTAcquisition.model_validate({"geometry": geometry}))
    data, _ = scanner.scan(np.kron(thorax(0, 32, 12.0), np.ones((2, 2))).astype(np.float32), np.random.default_rng(0))
    scanner.system.initial(data[None])
    scanner.system.normal(scanner.system.initial(data[None]))
    plans = planned_matrices(CTGeometry.model_validate(geometry))
    for name, model in {"projector": "joseph", "back projection": "fbp", "simulation": "strip"}.items():
        kept = sum(len(copy.values()) * 8 for copy in built[model]._copies.values())
        assert plans[name].stored
        assert plans[name].nbytes == pytest.approx(kept, rel=0.05), name


def test_check_lists_the_matrices_of_every_site(tmp_path: Path) -> None:
    """A and New have one acquisition and so share a scanner."""
    said = _check(tmp_path)
    plans = [planned_matrices(CTGeometry.model_validate(geometry)) for geometry in (GEOMETRY, OTHER)]
    a, b = (" ".join(f"{plan.nbytes / 1e3:.3g} kB" for plan in planned.values()) for planned in plans)
    assert said.startswith(f"site projector back projection simulation A {a} B {b} New {a} ")
    total = sum(plan.nbytes for planned in plans for plan in planned.values())
    assert f"In all {total / 1e6:.1f} MB; a worker process has those of the sites it serves." in said
    assert "on the fly" not in said.lower()
    assert "memory of this machine" not in said


def test_check_says_what_is_computed_on_the_fly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = planned_matrices(CTGeometry.model_validate(GEOMETRY))["simulation"].nbytes
    monkeypatch.setenv(VARIABLE, str(0.9 * simulation / 1e9))
    said = _check(tmp_path, sites={"A": {}})
    assert f"on the fly (of {simulation / 1e3:.0f} kB)" in said
    assert "On the fly at A: a matrix above" in said
    assert "is slow" in said
    assert f"{VARIABLE}=1." in said


def test_check_warns_of_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = machine_memory()
    assert memory is None or memory > 2**26
    monkeypatch.setattr(explain_ct, "machine_memory", lambda: 1000)
    assert "That is more than the 1.0 kB of memory of this machine" in _check(tmp_path)
    monkeypatch.setattr(explain_ct, "machine_memory", lambda: None)
    assert "of this machine" not in _check(tmp_path)


def test_a_limit_that_is_none_stops_a_run_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = make_ct_hospitals(tmp_path)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(ct_study()), encoding="utf-8")
    sites = {"sites": {site: {"data": str(root)} for site, root in roots.items()}}
    (tmp_path / "sites.yaml").write_text(yaml.safe_dump(sites), encoding="utf-8")
    monkeypatch.setenv(VARIABLE, "four")
    files = (tmp_path / "study.yaml", "--sites", tmp_path / "sites.yaml")
    for result in (_run("check", *files), _run("run", *files, "--out", tmp_path / "out")):
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: the environment variable {VARIABLE} is no positive number of GB")
    assert not (tmp_path / "out").exists()
