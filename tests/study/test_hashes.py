"""What a study is known by: settings that a later version adds change the plan's hash and never the study's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, create_model

from wardround.learning.methods.fedavg import FedAvgSettings
from wardround.learning.methods.fedprox import FedProxSettings
from wardround.models.unrolled import MoDLSettings
from wardround.study.acquisition import MRIAcquisition
from wardround.study.base import Config
from wardround.study.ct import CTAcquisition, CTGeometry
from wardround.study.hashes import differing, plan_sha256, study_sha256, written
from wardround.study.load import load_study
from wardround.study.protection import Privacy, Protection, Rotation
from wardround.study.schema import Local, Schedule, Study, StudySite
from wardround.study.tasks import Evaluation, ReconstructionTask, Split

SITES = {"A": {}, "B": {"acquisition": {"coils": 4, "mask": {"acceleration": 6}}}, "C": {"role": "unseen"}}
MRI: dict[str, Any] = {
    "name": "mri",
    "seed": 7,
    "sites": SITES,
    "task": {"size": [64, 64], "split": {"test": 0.25}, "evaluation": {"baselines": []}},
    "model": {"preset": "tiny"},
    "method": {"kind": "fedprox", "mu": 0.01},
    "local": {"steps": 5, "lr": 0.001},
    "schedule": {"rounds": 3},
}
PRIVATE: dict[str, Any] = {
    "name": "private",
    "sites": {"A": {}, "B": {}, "C": {}},
    "method": {"weights": "equal"},
    "schedule": {"release": "last"},
    "protection": {"secure": True, "privacy": {}},
}
CT: dict[str, Any] = {
    "name": "ct",
    "sites": {"A": {"acquisition": {"kind": "ct", "photons": 1e4, "geometry": {"size": [128, 128], "views": 90,
              "source_distance": 595, "detector_distance": 490.6}}}},
    "acquisition": {"kind": "ct"},
    "task": {"size": [128, 128]},
    "model": {"kind": "redcnn"},
}  # fmt: skip
# A setting that is added with a default leaves these as they are. If one changes, studies that people approved and
# wrote down are no longer the same: find what leaked, and do not edit the number.
PINNED = {
    "least": (
        {"name": "trial", "sites": {"A": {}}},
        "c352a3ef444d333b2b62e330ef52d4e71b67006c14d184438d10d2affa7065d2",
    ),
    "mri": (MRI, "dbffbef98f6cb48974cb4f0f676916ec8f95068d17961597b460b337c8afae1f"),
    "private": (PRIVATE, "98028fce9308dbd3e68c35358830a7fceadf67ed70b8a8418fdfb56661cf2b51"),
    "ct": (CT, "f23f52aa1db0eb29182dbdbf9410764f4343cbe224f68df0e40cb3f1d478b975"),
}


@pytest.mark.parametrize("name", PINNED)
def test_the_hash_of_a_study_is_the_same_in_every_version(name: str) -> None:
    given, pinned = PINNED[name]
    assert study_sha256(load_study(given)) == pinned


def _later(sections: Mapping[str, type[BaseModel]]) -> type[Study]:
    """The schema of a later version, with one more setting in each of these sections of the study."""
    fields: dict[str, Any] = {}
    for name, section in sections.items():
        later = create_model(f"Later{name}", __base__=section, one_more=(int, 3), another=(Config | None, None))
        fields[name] = (later, Field(default_factory=later))
    return create_model("LaterStudy", __base__=Study, one_more=(str, "fresh"), part=(Local, Local()), **fields)


@given(
    st.sets(st.sampled_from(["local", "schedule", "protection", "acquisition"])),
    st.sampled_from([case[0] for case in PINNED.values() if case[0] is not CT]),
)
def test_a_setting_that_a_later_version_adds_changes_the_plan_alone(sections: set[str], given: Any) -> None:
    known: dict[str, type[BaseModel]] = {
        "local": Local, "schedule": Schedule, "protection": Protection, "acquisition": MRIAcquisition
    }  # fmt: skip
    later = _later({name: known[name] for name in sections})
    now, then = load_study(given), later.model_validate(given)
    assert study_sha256(then) == study_sha256(now)
    assert plan_sha256(then) != plan_sha256(now)
    assert written(then) == written(now)


@pytest.mark.parametrize("given", [case[0] for case in PINNED.values()], ids=PINNED)
def test_what_is_written_is_read_as_the_same_study(given: Any) -> None:
    study = load_study(given)
    again = load_study(yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(written(study))))))
    assert again == study
    assert written(again) == written(study)
    assert (study_sha256(again), plan_sha256(again)) == (study_sha256(study), plan_sha256(study))
    # A study with every default written out is the same plan, and says more.
    full = load_study(study.model_dump(mode="json"))
    assert plan_sha256(full) == plan_sha256(study)
    assert study_sha256(full) != study_sha256(study)


@pytest.mark.parametrize(
    "override",
    ["local={}", "task={}", "method={}", "protection={}", "acquisition={mask: {}}", "seed=7.0",
     "local.lr=1e-3", "task.size=[64, 64.0]"],
)  # fmt: skip
def test_one_study_said_in_another_way_has_one_hash(override: str) -> None:
    name = override.partition("=")[0]
    without = {key: value for key, value in MRI.items() if f"{key}={{}}" != override}
    assert study_sha256(load_study(MRI, [override])) == study_sha256(load_study(without)), name


@pytest.mark.parametrize(
    ("override", "plan_too"),
    [
        ("seed=8", True),
        ("protection={privacy: {}}", True),
        ("sites.A.acquisition={}", True),
        ("sites={A: {}}", True),
        ("schedule.keep=2", False),
        ("sites.A.role=train", False),
        ("local.clip_norm=null", False),
        ("acquisition.kind=mri", False),
        ("sites.B.acquisition.kind=mri", False),
    ],
)
def test_what_is_written_is_what_counts(override: str, plan_too: bool) -> None:
    base = {**MRI, "schedule": {"release": "last"}, "method": {"weights": "equal"}}
    now, then = load_study(base), load_study(base, [override])
    assert study_sha256(then) != study_sha256(now)
    assert (plan_sha256(then) != plan_sha256(now)) == plan_too


def test_a_study_built_in_python_is_the_one_of_a_file() -> None:
    mri = Study(
        name="mri",
        seed=7,
        sites={
            "A": StudySite(),
            "B": StudySite(acquisition=MRIAcquisition.model_validate({"coils": 4, "mask": {"acceleration": 6}})),
            "C": StudySite(role="unseen"),
        },
        task=ReconstructionTask(size=(64, 64), split=Split(test=0.25), evaluation=Evaluation(baselines=())),
        model=MoDLSettings(preset="tiny"),
        method=FedProxSettings(kind="fedprox", mu=0.01),
        local=Local(steps=5, lr=0.001),
        schedule=Schedule(rounds=3),
        protection=Protection(),
    )
    assert study_sha256(mri) == PINNED["mri"][1]
    private = Study(
        name="private",
        sites=dict.fromkeys("ABC", StudySite()),
        method=FedAvgSettings(weights="equal"),
        schedule=Schedule(release="last"),
        protection=Protection(secure=True, privacy=Privacy()),
    )
    assert study_sha256(private) == PINNED["private"][1]
    # What reads as another kind without its name, keeps it.
    geometry = CTGeometry(views=90, source_distance=595.0, detector_distance=490.6)
    ct = load_study(CT).model_copy(update={"acquisition": CTAcquisition(geometry=geometry)})
    assert written(ct)["acquisition"]["kind"] == "ct"
    changed = mri.model_copy(update={"protection": Protection(compression=Rotation(kind="rotation"))})
    assert written(changed)["protection"] == {"compression": {"kind": "rotation"}}
    assert study_sha256(changed) != study_sha256(mri)


def test_keys_that_differ_are_named_with_both_values() -> None:
    before, now = load_study(MRI).model_dump(), load_study(MRI, ["local.momentum=0.5", "seed=9"]).model_dump()
    assert differing(before, now) == "seed was 7 and is 9; local.momentum was 0.0 and is 0.5"
    assert differing({"a": 1, "b": {}}, {"b": {"c": 2}}) == "a is gone; b.c is new"
    assert differing(before, before) == ""
