"""`wardround inspect --across`: any task that shows images is described, from the command line, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from tests.diagnoses import diagnosis_study, make_diagnoses
from tests.lungs import ct_chain, make_lungs
from tests.mri_hospitals import make_hospitals, write_study
from tests.outlines import make_outlines, outline_study
from wardround.cli import app
from wardround.results.shift import Shift
from wardround.runs.across import inspect_across
from wardround.study.hashes import written


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_the_command_describes_sites_and_writes_a_page(tmp_path: Path) -> None:
    study, sites = write_study(tmp_path, make_hospitals(tmp_path / "data"))
    found = command("--across", sites, study, "--out", tmp_path / "out", "--json")
    assert found.exit_code == 0, found.output
    shift = Shift.model_validate_json(found.stdout)
    # Alpha has four patients, of whom two train, and Beta three.
    assert {site: (profile.split, profile.patients) for site, profile in shift.sites.items()} == {
        "Alpha": ("train", 2),
        "Beta": ("train", 1),
    }
    assert shift.distances["intensity"]["Alpha"]["Beta"] > 0.0
    assert shift.values == (tmp_path / "out" / "shift.json").read_text(encoding="utf-8")
    assert "Doe" not in found.stdout + (tmp_path / "out" / "shift.html").read_text(encoding="utf-8")
    table = command("--across", sites, study, "--out", tmp_path / "out")
    assert "Jensen-Shannon" in table.stdout
    assert not (tmp_path / "out" / "work").exists()


def test_the_command_needs_a_path_or_sites() -> None:
    found = command()
    assert found.exit_code == 2
    assert "give a path, or --across with a sites file" in found.stderr


def test_images_with_classes_are_counted_by_class(tmp_path: Path) -> None:
    sites = make_diagnoses(tmp_path, {"A": (6, 4), "B": (2, 7)})
    study = diagnosis_study({"A": {}, "B": {"role": "unseen"}})
    found = inspect_across(sites, study)
    assert sum(found.sites["B"].classes.values()) == found.sites["B"].patients == 9
    assert sorted(found.sites["B"].classes.values())[-2:] == [2, 7]
    assert found.sites["B"].split == "test"
    assert found.sites["A"].matrix[2].mean == 1.0


def test_a_chain_is_described_by_what_is_scanned(tmp_path: Path) -> None:
    found = inspect_across(make_lungs(tmp_path, {"A": 4, "B": 4}), ct_chain())
    (channel,) = found.sites["A"].channels
    assert sum(channel.histogram) == pytest.approx(1.0, abs=1e-5)
    assert np.isfinite(channel.spectrum).all()
    assert found.sites["A"].structures


def test_what_a_study_does_to_images_is_done_before_they_are_described(tmp_path: Path) -> None:
    sites = make_outlines(tmp_path / "data", {"A": 5, "B": 5})
    plain = inspect_across(sites, outline_study({"A": {}, "B": {}}))
    small = inspect_across(sites, outline_study({"A": {}, "B": {}}, task={"resize": [16, 16], "patch": [16, 16]}))
    # Noise of neighbours is averaged, the histogram is that of the files.
    assert small.sites["A"].channels[0].histogram == plain.sites["A"].channels[0].histogram
    assert small.sites["A"].channels[0].noise.mean < plain.sites["A"].channels[0].noise.mean  # type: ignore[union-attr]
    assert small.sites["A"].matrix == plain.sites["A"].matrix


def test_a_file_of_landmarks_is_the_section_of_a_study(tmp_path: Path) -> None:
    sites = make_outlines(tmp_path / "data", {"A": 5, "B": 5})
    (tmp_path / "sites.yaml").write_text(json.dumps({"sites": {n: {"data": str(sites.of(n).data[0])} for n in "AB"}}))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(written(outline_study({"A": {}, "B": {}}))))
    file = tmp_path / "landmarks.yaml"
    across = "--across", tmp_path / "sites.yaml", tmp_path / "study.yaml", "--out", tmp_path / "out"
    found = command(*across, "--landmarks", file)
    assert found.exit_code == 0, found.output
    assert "put them into the study" in found.stdout
    section = yaml.safe_load(file.read_text(encoding="utf-8"))
    study = outline_study({"A": {}, "B": {}}, **section)
    assert study.task.describe().endswith("histograms matched to 11 landmarks")
