"""The release that a study continues is a row of its results, measured as the new model is and on the same patients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.apart import apart, comparable
from tests.living.ward import ROLES, admit, ward_sites, ward_study
from wardround.errors import DataError, Interrupted
from wardround.results.schema import Result
from wardround.runs.session import evaluate, run
from wardround.site.lineage import Lineage
from wardround.site.own_parts import OwnParts, carried_part
from wardround.study.schema import Study
from wardround.study.sites import SitesFile

FEW = {"A": 12, "B": 12}


def parent_of(tmp_path: Path, sites: SitesFile, **changes: Any) -> Result:
    return run(ward_study(**changes), sites, tmp_path / "parent", engine="local", quiet=True)


def child_study(parent: Result, **changes: Any) -> Study:
    start = {"kind": "release", "file": "parent", "sha256": parent.model_sha256, **changes.pop("start", {})}
    return ward_study(changes.pop("sites", ("A", "B")), **{"start": start, "update": {"train_on": "all"}, **changes})


def child_of(tmp_path: Path, parent: Result, ward: SitesFile, name: str = "child", **changes: Any) -> Result:
    how = {"engine": "local", **changes.pop("how", {})}
    return run(child_study(parent, **changes), ward, tmp_path / name, near=tmp_path, quiet=True, **how)


def at(result: Result, arm: str, site: str, metric: str = "mse") -> float:
    found = result.estimate(arm, site, metric)
    assert found is not None
    return found.value


def test_the_parent_is_measured_where_it_was_left(tmp_path: Path) -> None:
    """With no patient joined, the row is the parent's own result, number by number; and `evaluate` gives it again."""
    sites = ward_sites(tmp_path, FEW)
    parent = parent_of(tmp_path, sites)
    child = child_of(tmp_path, parent, sites)
    for site in FEW:
        for metric in ("r", "mse"):
            assert child.estimate("parent", site, metric) == parent.estimate("federated", site, metric)
            gain = child.gain("federated", "parent", site, metric)
            assert gain is not None
            sign = 1.0 if metric == "r" else -1.0
            difference = sign * (at(child, "federated", site, metric) - at(child, "parent", site, metric))
            assert gain.value == pytest.approx(difference, abs=2e-6)
    again = evaluate(tmp_path / "child", sites, engine="local", quiet=True)
    assert again.metrics == child.metrics
    assert again.gains == child.gains
    assert child.arms == ("parent", "federated")


def test_sites_that_do_not_train_measure_it_and_hold_out_who_trained(tmp_path: Path, monkeypatch: Any) -> None:
    sites = ward_sites(tmp_path, {**FEW, "C": 12})
    parent = run(ward_study(("A", "B", "C")), sites, tmp_path / "parent", engine="local", quiet=True)
    admit(tmp_path / "A", [f"A-ROE-{n}" for n in range(5)])
    monkeypatch.setitem(ROLES, "B", "evaluate")
    monkeypatch.setitem(ROLES, "C", "unseen")
    roles = {"A": {}, "B": {"role": "evaluate"}, "C": {"role": "unseen"}}
    child = child_of(tmp_path, parent, sites, sites=roles)
    assert child.patients["B"] == {"train": 0, "validation": 2, "test": 5}
    assert child.patients["C"] == {"train": 0, "validation": 0, "test": 5}
    for site in "BC":
        assert at(child, "parent", site) == at(parent, "federated", site)
        assert child.gain("federated", "parent", site, "mse") is not None
    assert child.gains["federated"]["parent"].keys() == {"A", "B", "C", "mean"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [pytest.param({"engine": "workers", "processes": 2}, marks=pytest.mark.slow), {"engine": "local"}]
)
def test_it_is_the_same_under_masks_in_workers_and_after_a_stop(tmp_path: Path, how: dict[str, Any]) -> None:
    sites = ward_sites(tmp_path, {**FEW, "C": 12})
    names = ("A", "B", "C")
    secure = {"secure": True}
    parent = run(ward_study(names, protection=secure), sites, tmp_path / "parent", engine="local", quiet=True)
    child = child_of(tmp_path, parent, sites, sites=names, protection=secure, how=how)
    for site in names:
        assert at(child, "parent", site) == at(parent, "federated", site)
    # The same command once more: sites answer from their stores, and the numbers are the same.
    again = child_of(tmp_path, parent, sites, sites=names, protection=secure, how=how)
    assert again.metrics == child.metrics


PERSONAL = {"method": {"kind": "fedbn"}, "options": {"norm": True}}


def test_a_private_part_goes_on_where_it_was(tmp_path: Path, monkeypatch: Any) -> None:
    """Batch norm stays at each site: the parent is completed by it, a site that trains begins with it, and a site that
    does not keeps it for the new model."""
    sites = ward_sites(tmp_path, FEW)
    parent = parent_of(tmp_path, sites, **PERSONAL)
    assert OwnParts(tmp_path / "history-A").of(parent.model_sha256)
    child = child_of(tmp_path, parent, sites, start={"partial": True}, **PERSONAL)
    for site in FEW:
        assert at(child, "parent", site) == at(parent, "federated", site)

    monkeypatch.setitem(ROLES, "B", "evaluate")
    still = {**PERSONAL, "local": {"steps": 1, "batch": 2, "optimizer": "sgd", "lr": 1e-12}}
    roles = {"A": {}, "B": {"role": "evaluate"}}
    same = child_of(tmp_path, parent, sites, "still", sites=roles, start={"partial": True}, **still)
    # A step of no length: what is measured is the parent, its running statistics at A aside.
    assert at(same, "federated", "B") == pytest.approx(at(parent, "federated", "B"), abs=1e-5)
    mine = load_file(tmp_path / "still/models/A/federated/local.safetensors")
    theirs = load_file(tmp_path / "parent/models/A/federated/local.safetensors")
    assert np.allclose(mine["1.weight"], theirs["1.weight"], atol=1e-6)
    assert not np.allclose(mine["1.weight"], 1.0, atol=1e-6)
    # A site that did not train finds its part beside the new model, where it is applied.
    beside = load_file(tmp_path / "still/models/B/federated/local.safetensors")
    before = load_file(tmp_path / "parent/models/B/federated/local.safetensors")
    assert all(np.array_equal(beside[name], before[name]) for name in before)
    kept = OwnParts(tmp_path / "history-B")
    assert kept.of(same.model_sha256).keys() == kept.of(parent.model_sha256).keys()


@pytest.mark.parametrize("damage", ["gone", "another", "shape"])
def test_a_private_part_that_is_not_what_it_was_is_an_error(tmp_path: Path, damage: str) -> None:
    sites = ward_sites(tmp_path, FEW)
    parent = parent_of(tmp_path, sites, **PERSONAL)
    path = OwnParts(tmp_path / "history-A").path(parent.model_sha256)
    values = load_file(path)
    path.unlink()
    if damage != "gone":
        save_file({name: value[:-1] if value.ndim else value for name, value in values.items()}, path)
    if damage == "shape":
        from wardround.wire.tensors import tensors_sha256

        record = tmp_path / "history-A" / "lineage.jsonl"
        line = json.loads(record.read_text())
        record.write_text(json.dumps({**line, "own": tensors_sha256(load_file(path))}) + "\n")
    reason = {"gone": "is gone; restore", "another": "is another; restore", "shape": "does not fit the study's model"}
    with pytest.raises(DataError, match=reason[damage]):
        child_of(tmp_path, parent, sites, start={"partial": True}, **PERSONAL)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"start": {"kind": "fresh"}}, "update: the study continues a release, and `start` names none"),
        ({"schedule": {"rounds": 0}}, "update: with schedule.rounds 0 nothing is trained"),
        ({"start": {"only": ["0.*"]}}, "start.only: with `update` the release is measured as it is"),
    ],
)
def test_an_update_of_nothing_is_refused(changes: dict[str, Any], reason: str) -> None:
    start = {"kind": "release", "file": "parent", "sha256": "a" * 64, **changes.get("start", {})}
    if start["kind"] == "fresh":
        start = {"kind": "fresh"}
    with pytest.raises(ValueError, match=reason):
        ward_study(**{**changes, "start": start, "update": {}})


class Stops:
    """A watcher that stops a run after its first round."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def round(self, report: Any) -> None:
        """Called with each round."""
        raise KeyboardInterrupt


@pytest.mark.slow
def test_a_resumed_child_is_the_whole_one(tmp_path: Path) -> None:
    """What a site carries over stands before its first round, and not before those after a stop."""
    sites = ward_sites(tmp_path, FEW)
    parent = parent_of(tmp_path, sites, **PERSONAL)
    whole = child_of(tmp_path, parent, sites, "whole", start={"partial": True}, **PERSONAL)
    with pytest.raises(Interrupted):
        child_of(tmp_path, parent, sites, "resumed", start={"partial": True}, how={"watcher": Stops()}, **PERSONAL)
    resumed = child_of(tmp_path, parent, sites, "resumed", start={"partial": True}, **PERSONAL)
    assert (resumed.model_sha256, resumed.local_sha256) == (whole.model_sha256, whole.local_sha256)
    assert (resumed.metrics, resumed.gate) == (whole.metrics, whole.gate)


@pytest.mark.slow
def test_parties_apart_come_to_the_same(tmp_path: Path) -> None:
    """Each site has its own history alone, and finds the release and its part of it there."""
    sites = ward_sites(tmp_path, FEW)
    parent = parent_of(tmp_path, sites, **PERSONAL)
    study = child_study(parent, start={"partial": True}, **PERSONAL)
    together = run(study, sites, tmp_path / "together", near=tmp_path, quiet=True, engine="local")
    parted = apart(study, sites, tmp_path / "apart", near=tmp_path)
    assert comparable(parted.values) == comparable(together.values)
    assert parted.gate is not None


def test_a_site_that_was_away_has_its_part_of_an_earlier_release(tmp_path: Path) -> None:
    values = {"w": np.arange(3, dtype=np.float32)}
    save_file(values, tmp_path / "local.safetensors")
    own = OwnParts(tmp_path).keep("a" * 64, tmp_path / "local.safetensors")
    Lineage(tmp_path).record_digests("a" * 64, None, "s" * 64, {}, own)
    initial = {"w": torch.zeros(3)}
    found = carried_part("A", ("b" * 64, "a" * 64), tmp_path, initial)
    assert np.array_equal(found["w"], values["w"])
    assert carried_part("A", ("b" * 64,), tmp_path, initial) == {}
