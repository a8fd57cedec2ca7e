"""A weight by validation loss is a measurement of a site's validation patients, and leaves by the rules of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.cohorts import CohortTask, cohort_study
from tests.federation.rig import ARM, Rig
from tests.federation.test_write_once import ask_train, nudged
from wardround.federation.exchange import UPDATE
from wardround.site.egress import EgressRules
from wardround.site.measured import SETS, MeasuredSets
from wardround.site.rules import rules_of
from wardround.site.site import Site
from wardround.storage.store import SiteStore

# The validation patients of every site of `CohortTask`.
VALIDATE = [f"Doe-{number}" for number in range(4, 9)]


def rig_of(folder: Path, weights: str = "validation", **egress: int) -> Rig:
    """A federation whose site A has a record of measured sets, and rules."""
    study = cohort_study(method={"kind": "fedavg", "weights": weights})
    rig = Rig(study, folder, task=CohortTask())
    rules = replace(rules_of(rig.host, ARM, rounding_root=rig.host.rounding_root), egress=EgressRules(**egress))
    (folder / "history").mkdir()
    sets, store = MeasuredSets(folder / "history"), SiteStore(folder / "sites" / "ruled")
    rig.sites["A"] = Site("A", rules, lambda: rig.learner("A"), store, sets=sets)
    return rig


def reason(rig: Rig, number: int = 1, step: int = 0, keep: int = 0) -> str:
    """Why site A does not train; nothing where it does."""
    state = rig.start()
    asked = state if not step else nudged(rig, state, step)
    reply = ask_train(rig, asked, number, validate=False, keep=keep)
    return "" if reply.header.kind == UPDATE else str(reply.header.meta["reason"])


def test_fewer_patients_than_a_cohort_give_no_weight(tmp_path: Path) -> None:
    few = reason(rig_of(tmp_path / "few", minimum_cohort=6))
    assert "withholds its weight, which method.weights=validation makes" in few
    assert "fewer patients than egress.minimum_cohort. Give the study method.weights=samples or equal" in few
    assert "fewer than 6 patients" in reason(rig_of(tmp_path / "floor", floor=6))
    assert not reason(rig_of(tmp_path / "enough", minimum_cohort=5))
    # Weights that are no measurement need none.
    assert not reason(rig_of(tmp_path / "samples", "samples", minimum_cohort=6))


def test_a_list_of_metrics_without_the_loss_gives_no_weight(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)
    own = rig.sites["A"]._own
    own._egress = replace(own._egress, metrics=frozenset({"r", "mse"}))
    assert "loss not in egress.metrics" in reason(rig)
    own._egress = replace(own._egress, metrics=frozenset({"loss"}))
    assert not reason(rig)


@pytest.mark.parametrize("weights", ["validation", "samples"])
def test_patients_who_differ_by_few_from_a_measured_set_give_no_weight(tmp_path: Path, weights: str) -> None:
    """The attack: the weights over n and over n + 1 patients give the loss of one."""
    rig = rig_of(tmp_path, weights, minimum_cohort=5)
    assert MeasuredSets(tmp_path / "history").join("validation", [*VALIDATE, "Doe-39"], "any", 5) is None
    refused = "its validation patients differ from those it measured before by fewer than 5" in reason(rig)
    assert refused == (weights == "validation")


def test_a_weight_puts_its_patients_on_record(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, minimum_cohort=5)
    assert not reason(rig)
    assert len((tmp_path / "history" / SETS).read_bytes().splitlines()) == 1
    assert MeasuredSets(tmp_path / "history").join("validation", [*VALIDATE, "Doe-39"], "any", 5) is not None


def test_a_round_has_one_weight(tmp_path: Path) -> None:
    """The attack: requests to train on many models, a bit apart, each answered with a loss."""
    rig = rig_of(tmp_path / "validation")
    assert not reason(rig, step=1)
    assert "gives one weight by validation loss of a round" in reason(rig, step=2)
    assert not reason(rig, step=1, keep=1)
    assert not reason(rig, number=2, step=2)
    samples = rig_of(tmp_path / "samples", "samples")
    assert not reason(samples, step=1)
    assert not reason(samples, step=2)
