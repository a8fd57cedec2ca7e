"""An update by which old sites lose nothing, from end to end: who trains, what is measured first, what is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.living.ward import admit, ward_sites, ward_study
from wardround.errors import DataError, StudyError
from wardround.living.fisher import fisher_study, trained_at, with_fisher
from wardround.living.release import Release
from wardround.living.update import FISHER_FILE, STUDY_FILE, prepare, update
from wardround.plan.weights import file_sha256
from wardround.results.schema import Result
from wardround.runs.session import open_host, run
from wardround.site.lineage import Lineage
from wardround.study.hashes import written
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.study.sites import SitesFile

Ward = tuple[Result, SitesFile]
ROOM = {"initial_scale": 4.0}


@pytest.fixture
def ward(tmp_path: Path) -> Ward:
    """A release that A and B trained, and C, who came since; two patients more at A."""
    sites = ward_sites(tmp_path / "data", {"A": 10, "B": 10, "C": 10})
    known = ward_study(("A", "B"), protection=ROOM)
    two = sites.model_copy(update={"sites": {name: sites.sites[name] for name in "AB"}})
    result = run(known, two, tmp_path / "parent", engine="local", quiet=True)
    admit(tmp_path / "data" / "A", [f"A-NEW-{n}" for n in range(5)])
    return result, sites


def update_of(parent: Result, roles: dict[str, Any], **changes: Any) -> Study:
    start = {"kind": "release", "file": "parent", "sha256": parent.model_sha256}
    return ward_study(roles, **{"start": start, "protection": ROOM, "schedule": {"rounds": 1}, **changes})


def trains(study: Study, sites: SitesFile, out: Path, site: str) -> set[str]:
    host = open_host(study, sites, out, (), (), None, near=out.parent)
    names = set(host.dataset(site).names("train"))  # type: ignore[attr-defined]
    host.close()
    return names


def test_new_patients_train_by_the_sites_own_record(ward: Ward, tmp_path: Path) -> None:
    parent, sites = ward
    history = sites.sites["A"].history
    assert history is not None
    everybody = trains(update_of(parent, {"A": {}}, update={"train_on": "all"}), sites, tmp_path / "out", "A")
    old = Lineage(history).trained(parent.model_sha256, sorted(everybody))
    new = trains(update_of(parent, {"A": {}}, update={}), sites, tmp_path / "out", "A")
    assert new == everybody - old
    assert new
    assert old
    assert all("NEW" in name for name in new)
    assert trains(update_of(parent, {"A": {}}, update={"train_on": "old"}), sites, tmp_path / "out", "A") == old
    some = trains(update_of(parent, {"A": {}}, update={"memory": 0.5}), sites, tmp_path / "out", "A")
    assert new < some
    assert len(some & old) == round(0.5 * len(old))
    # Nobody trained B's new model: it has nobody new.
    with pytest.raises(DataError, match=r"site B trains and has no training patient whom the release has not learned"):
        run(update_of(parent, {"A": {}, "B": {}}, update={}), sites, tmp_path / "none", quiet=True, near=tmp_path)
    # And C, whom the release does not know, is new as a whole.
    assert len(trains(update_of(parent, {"C": {}}, update={}), sites, tmp_path / "out", "C")) == 4


@pytest.mark.slow
def test_an_update_is_held_by_the_sites_that_do_not_train(ward: Ward, tmp_path: Path) -> None:
    parent, sites = ward
    # A custom task is not told roles: what an evaluating site would train on is never asked for.
    roles = {"A": {"role": "evaluate"}, "B": {"role": "evaluate"}, "C": {}}
    retain = {"kind": "ewc", "weight": 50.0}
    study = update_of(parent, roles, update={"retain": retain})
    assert trained_at(study, tmp_path) == ("A", "B")
    held = with_fisher(study, sites, tmp_path / "fisher", tmp_path, examples=16, engine="local", quiet=True)
    assert held.update is not None
    named = held.update.retain.fisher  # type: ignore[union-attr]
    assert named is not None
    assert file_sha256(tmp_path / named.file) == named.sha256
    measured = load_file(tmp_path / named.file)
    # With the very same patients: those from whom the release learned.
    seen = fisher_study(study, ("A", "B"))
    assert (seen.training_sites, seen.update and seen.update.train_on) == (("A", "B"), "old")
    assert with_fisher(held, sites, tmp_path / "fisher", tmp_path) is held
    free = update_of(parent, roles, update={})
    results = {
        name: run(one, sites, tmp_path / name, engine="local", quiet=True, near=tmp_path)
        for name, one in (("held", held), ("free", free))
    }
    begun, moved = load_file(parent.out / "models" / "federated.safetensors"), {}
    for name, result in results.items():
        values = load_file(result.out / "models" / "federated.safetensors")
        moved[name] = sum(float((measured[n] * np.square(values[n] - begun[n])).sum()) for n in measured)
        assert result.participants == ("C",)
        assert result.gate is not None
    # Less of what mattered at A and B moved.
    assert moved["held"] < 0.9 * moved["free"]


@pytest.mark.slow
def test_squares_that_a_round_cannot_say_are_measured_again(ward: Ward, tmp_path: Path) -> None:
    parent, sites = ward
    retain = {"retain": {"kind": "ewc"}}
    small = {"protection": {"initial_scale": 0.02}}
    study = update_of(parent, {"A": {"role": "evaluate"}, "C": {}}, update=retain, **small)
    held = with_fisher(study, sites, tmp_path / "fisher", tmp_path, examples=16, engine="local", quiet=True)
    runs = sorted(path.name for path in (tmp_path / "fisher").iterdir())
    assert len(runs) > 1
    assert held.update is not None
    largest = max(float(v.max()) for v in load_file(tmp_path / held.update.retain.fisher.file).values())  # type: ignore[union-attr]
    assert largest > 0.02
    tiny = update_of(parent, {"A": {"role": "evaluate"}, "C": {}}, update=retain, protection={"initial_scale": 1e-9})
    with pytest.raises(StudyError, match=r"take `update.retain: lwf`"):
        with_fisher(tiny, sites, tmp_path / "tiny", tmp_path, examples=2, engine="local", quiet=True)


def test_what_cannot_be_measured_is_one_clear_error(ward: Ward, tmp_path: Path) -> None:
    parent, _ = ward
    study = update_of(parent, {"C": {}}, update={"retain": {"kind": "ewc"}})
    with pytest.raises(StudyError, match=r"none of those is in this study; add one of A, B \(`role: evaluate`\)"):
        fisher_study(study, ("A", "B"))
    with pytest.raises(StudyError, match="no Fisher information is needed"):
        fisher_study(update_of(parent, {"C": {}}, update={}), ("A",))


def test_the_update_command_measures_it_first_and_writes_the_whole_study(ward: Ward, tmp_path: Path) -> None:
    parent, sites = ward
    away = {name: entry.model_copy(update={"history": None}) for name, entry in sites.sites.items()}
    history = tmp_path / "parent" / "work" / "sites" / "A" / "history"
    assert sites.sites["A"].history is not None
    history.parent.mkdir(parents=True, exist_ok=True)
    sites.sites["A"].history.rename(history)
    retain = {"retain": {"kind": "ewc", "weight": 50.0}}
    study = ward_study({"A": {}}, update=None, protection=ROOM, schedule={"rounds": 1})
    given = {**written(study), "update": retain}
    one = sites.model_copy(update={"sites": {"A": away["A"]}})
    result = update(Release.at(parent.out), given, one, tmp_path / "two", engine="local", quiet=True)
    whole = load_study(tmp_path / "two" / STUDY_FILE)
    assert whole.update is not None
    assert whole.update.retain.fisher is not None  # type: ignore[union-attr]
    assert (tmp_path / "two" / whole.update.retain.fisher.file).is_file()  # type: ignore[union-attr]
    again = update(Release.at(parent.out), given, one, tmp_path / "two", engine="local", quiet=True)
    assert again.model_sha256 == result.model_sha256
    # For hospitals elsewhere both studies are written, to be handed out one after the other.
    prepared = prepare(Release.at(parent.out), given, tmp_path / "three", train=["A"])
    assert prepared.study.update == study_with(given).update
    assert load_study(tmp_path / "three" / FISHER_FILE).method.kind == "fisher"


def study_with(given: dict[str, Any]) -> Study:
    start = {"kind": "release", "file": "parent.safetensors", "sha256": "ab" * 32}
    return load_study({**given, "start": start})
