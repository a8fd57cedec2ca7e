"""Who trains in an update, and what a site makes for itself of what is released."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.federation.rig import recorded_sessions
from tests.toys import toy_sites, toy_study
from wardround.errors import DataError, Interrupted
from wardround.federation.exchange import EVALUATE
from wardround.federation.measuring import FINETUNED
from wardround.federation.release import load_model, model_path
from wardround.imaging.datasets.split import Parts
from wardround.results.schema import Result
from wardround.runs.session import evaluate, run
from wardround.site.measured import folder_key
from wardround.site.renewed import check_some, remembered, renewed
from wardround.site.splits import KEY, SPLITS
from wardround.study.update import Update

NAMES = [f"DOE-{number:02d}" for number in range(20)]
PARTS: Parts = {"train": tuple(range(14)), "validation": (14, 15, 16), "test": (17, 18, 19)}
OLD = frozenset(NAMES[:10])


@pytest.fixture
def history(tmp_path: Path) -> Path:
    """The history folder of a site where somebody has trained."""
    (tmp_path / SPLITS).touch()
    folder_key(tmp_path, KEY, SPLITS)
    return tmp_path


def train(history: Path, role: Any = "train", old: frozenset[str] = OLD, **update: Any) -> tuple[int, ...]:
    parts = renewed("A", NAMES, PARTS, role, Update(**update), old, history)
    assert (parts["validation"], parts["test"]) == (PARTS["validation"], PARTS["test"])
    return parts["train"]


def test_new_patients_train_and_as_many_others_as_the_study_says(history: Path) -> None:
    assert train(history) == (10, 11, 12, 13)
    assert train(history, train_on="all") == PARTS["train"]
    assert train(history, train_on="old") == tuple(range(10))
    assert train(history, role="evaluate", train_on="all") == ()
    kept = train(history, memory=0.3)
    assert len(kept) == 3 + 4
    assert kept == train(history, memory=0.3)
    # One share holds a smaller one; a share of some is one patient at least.
    assert set(train(history, memory=0.1)) < set(kept) < set(train(history, memory=1.0)) == set(PARTS["train"])
    assert len(train(history, memory=0.01)) == 1 + 4


def test_who_is_remembered_is_the_sites_secret_and_hardly_moves(history: Path, tmp_path_factory: Any) -> None:
    chosen = remembered("A", NAMES[:10], 0.4, history)
    for more in range(11, 15):
        # One of four is another at most, for each patient more; in another order the same.
        next_ones = remembered("A", NAMES[:more][::-1], 0.4, history)
        assert len(chosen - next_ones) <= more - 10
    drawn = {chosen}
    for _ in range(4):
        elsewhere = tmp_path_factory.mktemp("history")
        (elsewhere / SPLITS).touch()
        folder_key(elsewhere, KEY, SPLITS)
        drawn.add(remembered("A", NAMES[:10], 0.4, elsewhere))
    # 210 choices of 4 of 10: all five alike would come once in two thousand million times.
    assert len(drawn) > 1
    with pytest.raises(DataError, match="the site's record of who trains cannot be read"):
        remembered("A", NAMES, 0.5, tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize(
    ("train_on", "old", "reason"),
    [
        ("new", frozenset(NAMES), "has not learned from yet .*give it `role: evaluate`, or set update.train_on to all"),
        ("old", frozenset[str](), "no training patient whom the release learned from"),
    ],
)
def test_a_site_without_such_patients_is_one_clear_error(
    history: Path, train_on: str, old: frozenset[str], reason: str
) -> None:
    update = Update.model_validate({"train_on": train_on})
    left = train(history, old=old, train_on=train_on)
    with pytest.raises(DataError, match=reason):
        check_some("A", len(left), update)
    check_some("A", 1, update)
    check_some("A", 0, None)


# What a site makes for itself ---------------------------------------------------------------------------------------

TUNE = {"finetune": {"steps": 20, "lr": 0.1}, "train_on": "all"}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A release to continue."""
    folder = tmp_path_factory.mktemp("chain")
    study = toy_study("AB", schedule={"rounds": 1})
    return run(study, toy_sites(folder / "data", "AB"), folder / "parent", engine="local", quiet=True)


def go(parent: Result, folder: Path, update: Mapping[str, Any]) -> Result:
    start = {"kind": "release", "file": "parent", "sha256": parent.model_sha256}
    study = toy_study("AB", schedule={"rounds": 2}, start=start, update=update)
    sites = toy_sites(folder / "data", "AB")
    return run(study, sites, folder / "out", engine="local", quiet=True, near=parent.out.parent)


def test_a_site_goes_on_alone_and_keeps_what_comes_of_it(
    parent: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = recorded_sessions(monkeypatch)
    result = go(parent, tmp_path, TUNE)
    own = {site: load_file(tmp_path / "out" / "models" / site / "federated" / "model.safetensors") for site in "AB"}
    released = load_model(model_path(tmp_path / "out", "federated"))[0]
    far = {s: sum(float(np.abs(v[name] - released[name]).max()) for name in released) for s, v in own.items()}
    # The validation patients of A are served better by its own steps, those of B by what is released.
    assert far["A"] > 0.01
    assert far["B"] == 0.0
    for site, values in own.items():
        assert result.metrics[FINETUNED][site] is not None
        assert result.gain("federated", FINETUNED, site, "r") is not None
        # No value of it left the site, in any message.
        for name, value in values.items():
            if not np.array_equal(value, released[name]):
                assert not any(value.tobytes() in each.data for each in sent), name
    asked = [s for s in sent if s.message.header.meta.get("evaluator") == FINETUNED]
    assert [s.message.header.kind for s in asked] == [EVALUATE, EVALUATE]
    assert not any(s.body for s in asked)
    # Everything else is what it would be without.
    plain = go(parent, tmp_path / "plain", {"train_on": "all"})
    assert plain.model_sha256 == result.model_sha256
    assert plain.metrics["federated"] == result.metrics["federated"]
    assert FINETUNED not in plain.metrics
    sites = toy_sites(tmp_path / "data", "AB")
    assert evaluate(tmp_path / "out", sites, engine="local", quiet=True).metrics == result.metrics
    table = list(csv.reader((tmp_path / "out" / "sites" / "A" / "patients.csv").read_text().splitlines()))
    assert {row[2] for row in table[1:]} == {"federated", "parent", FINETUNED}


def test_the_better_of_two_on_validation_patients_is_kept(parent: Result, tmp_path: Path) -> None:
    """Steps that are far too long lead away: then it is the release, to every bit."""
    result = go(parent, tmp_path, {"finetune": {"steps": 3, "lr": 1e4}, "train_on": "all"})
    assert result.metrics[FINETUNED] == result.metrics["federated"]
    released = load_model(model_path(tmp_path / "out", "federated"))[0]
    own = load_file(tmp_path / "out" / "models" / "A" / "federated" / "model.safetensors")
    assert all(np.array_equal(own[name], released[name]) for name in released)


def test_a_run_that_stopped_makes_the_same_model(
    parent: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = go(parent, tmp_path / "whole", TUNE)

    def dying(*_: Any) -> None:
        raise Interrupted("power cut")

    with monkeypatch.context() as patch:
        patch.setattr("wardround.runs.conduct.ask_spending", dying)
        with pytest.raises(Interrupted):
            go(parent, tmp_path / "stopped", TUNE)
    again = go(parent, tmp_path / "stopped", TUNE)
    assert again.metrics == whole.metrics
    files = [tmp_path / each / "out/models/B/federated/model.safetensors" for each in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
