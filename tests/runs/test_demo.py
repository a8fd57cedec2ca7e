"""The demos: phantoms that follow the study, a folder that other commands work on, and a run that ends."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from wardround.cli import app
from wardround.errors import StudyError
from wardround.imaging import phantoms
from wardround.imaging.datasets.split import split_patients
from wardround.imaging.readers.volume import read_volume
from wardround.runs import demo as demos
from wardround.runs import session
from wardround.runs.demo import CONTRASTS, DEMO, Demo, demo_study
from wardround.study.sites import load_sites
from wardround.tasks.chain import ChainTask

SMALL = ["task.size=[32,32]"]
QUICK = [
    *SMALL,
    "model={kind: modl, preset: tiny}",
    "local.steps=1",
    "schedule.rounds=1",
    "schedule.validate_every=1",
    "task.evaluation.baselines=[zero_filled]",
]


def tiny(demo: Demo) -> Demo:
    return replace(demo, train=3, unseen=1, slices=2)


@functools.cache
def ball() -> phantoms._Atlas:
    """White matter under grey: in place of nilearn's maps, which take seconds to read."""
    x, y, z = (np.arange(-c, n - c, dtype=np.float32) for c, n in zip((98, 116, 101), (197, 233, 189), strict=True))
    radius = np.sqrt((x**2)[:, None, None] + (y**2)[:, None] + z**2)
    white, grey = np.clip(58 - radius, 0, 1), np.clip(66 - radius, 0, 1)
    return phantoms._Atlas(grey - white, white, radius[::2, ::2, ::2] - 70)


@pytest.fixture(autouse=True)
def simple_anatomy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phantoms, "_atlas", ball)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.nii.gz")}


def test_the_demo_leaves_a_sites_file(tmp_path: Path) -> None:
    """It lies beside the phantoms and names them relative to itself: the run's folder can be moved."""
    made = tmp_path / "made"
    study, sites = demo_study(made, SMALL, demo=tiny(DEMO))
    assert sites == load_sites(made / "sites.yaml")
    assert sites.sites.keys() == study.sites.keys() == {site.name for site in DEMO.sites}
    moved = made.rename(tmp_path / "moved")
    assert load_sites(moved / "sites.yaml").of("Harbour").data == (moved.resolve() / "Harbour",)


def test_phantoms_follow_the_study(tmp_path: Path) -> None:
    made: list[int] = []
    study, _ = demo_study(tmp_path / "a", SMALL, demo=tiny(DEMO), phase=lambda _, done, __: made.append(done))
    assert study.seed == 2026
    assert made == list(range(tiny(DEMO).total + 1))
    again, _ = demo_study(tmp_path / "b", SMALL, demo=tiny(DEMO))
    other, _ = demo_study(tmp_path / "c", [*SMALL, "seed=7"], demo=tiny(DEMO))
    assert (again.seed, other.seed) == (2026, 7)
    first, second, third = (files(tmp_path / name) for name in "abc")
    assert first == second
    assert first.keys() == third.keys()
    assert all(first[name] != third[name] for name in first if "image" in name)
    image = read_volume(tmp_path / "a" / "Harbour" / "P001" / "image.nii.gz")
    assert image.data.shape == (32, 32, 2)


@pytest.mark.parametrize("change", [["seed=7"], ["task.size=[48,48]"]])
def test_phantoms_of_another_study_are_refused_and_stay(tmp_path: Path, change: list[str]) -> None:
    demo_study(tmp_path, SMALL, demo=tiny(DEMO))
    before = files(tmp_path)
    with pytest.raises(StudyError, match="another seed, image size or demo; choose another --out"):
        demo_study(tmp_path, [*SMALL, *change], demo=tiny(DEMO))
    with pytest.raises(StudyError, match="another seed, image size or demo"):
        demo_study(tmp_path, SMALL, demo=tiny(CONTRASTS))
    assert files(tmp_path) == before


def test_phantoms_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    demo_study(tmp_path, SMALL, demo=tiny(DEMO))
    (tmp_path / "Harbour" / ".complete").unlink()  # stopped while it made this hospital
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nii.gz")}
    made: list[int] = []
    demo_study(tmp_path, SMALL, demo=tiny(DEMO), phase=lambda _, done, __: made.append(done))
    assert made == list(range(tiny(DEMO).total + 1))
    anew = {path.parent.parent.name for path, when in written.items() if path.stat().st_mtime_ns != when}
    assert anew == {"Harbour"}


def test_a_folder_that_the_demo_did_not_make_stays(tmp_path: Path) -> None:
    scan = tmp_path / "Harbour" / "P001" / "image.nii.gz"
    scan.parent.mkdir(parents=True)
    scan.write_bytes(b"a scan")
    with pytest.raises(StudyError, match="Harbour is there already, and the demo did not make it"):
        demo_study(tmp_path, SMALL, demo=tiny(DEMO))
    assert scan.read_bytes() == b"a scan"


def test_a_demo_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"the demo contrasts is a reconstruction: leave task\.kind as it is"):
        demo_study(tmp_path, ["task={kind: chain, images: [image], structures: {a: any}}"], demo=tiny(CONTRASTS))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [2026, 7, 11])
def test_of_10_patients_1_trains_2_validate_and_7_test(tmp_path: Path, seed: int) -> None:
    study, _ = demo_study(tmp_path, [*SMALL, f"seed={seed}"], demo=tiny(DEMO))
    assert isinstance(study.task, ChainTask)
    assert Counter(site.role for site in study.sites.values()) == {"train": 4, "unseen": 1}
    for site in DEMO.sites:
        assert study.sites[site.name].role == site.role
        parts = split_patients(DEMO.patients(site), study.task.split, seed, site.name, site.role)
        sizes = {name: len(patients) for name, patients in parts.items()}
        wanted = (1, 2, 7) if site.role == "train" else (0, 0, 7)
        assert sizes == dict(zip(("train", "validation", "test"), wanted, strict=True))


@pytest.mark.parametrize(
    ("flags", "demo"), [([], DEMO), pytest.param(["--contrasts", "--quiet"], CONTRASTS, marks=pytest.mark.slow)]
)
def test_a_demo_runs_to_its_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], demo: Demo
) -> None:
    monkeypatch.setattr(demos, demo.name.upper(), tiny(demo))
    monkeypatch.setattr(session, "run", functools.partial(session.run, engine="local"))
    monkeypatch.chdir(tmp_path)
    overrides = [part for change in QUICK for part in ("--set", change)]
    done = CliRunner().invoke(app, ["demo", "--processes", "1", *flags, *overrides])
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    said = f"Making phantoms: {tiny(demo).total} made-up patients of {len(demo.sites)} hospitals"
    assert (said in text) == ("--quiet" not in flags)
    assert ("Making" in text) == ("--quiet" not in flags)
    assert "Phantoms, not patients" in text
    assert "simulated acquisitions" in text
    out = tmp_path / "runs" / demo.name
    assert "Phantoms, not patients" in (out / "report.html").read_text(encoding="utf-8")
    assert "Phantoms, not patients" in (out / "model_card.md").read_text(encoding="utf-8")
    measured = json.loads((out / "result.json").read_text(encoding="utf-8"))["metrics"]
    for site in demo.sites:
        arms = {"zero_filled", "federated"} | ({"local"} if site.role == "train" else set())
        assert all(measured[arm][site.name] for arm in arms)
    assert ("pooled" in measured) == (demo is not DEMO)  # the quick demo answers one question: alone or together
