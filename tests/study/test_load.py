"""The study file: what is accepted, what is refused and how, what is hashed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wardround.errors import StudyError
from wardround.learning.methods.fedavg import FedAvgSettings as FedAvg
from wardround.models.cnn import UNetSettings as UNet
from wardround.models.unrolled import MoDLSettings as MoDL
from wardround.study.load import FOREIGN, load_study, plan_sha256, study_sha256
from wardround.study.schema import Local, Study

MINIMAL: dict[str, Any] = {"name": "trial", "sites": {"CS": {}, "DU": {}, "EZ": {"role": "unseen"}}}


def write(folder: Path, text: str) -> Path:
    path = folder / "study.yaml"
    path.write_text(text)
    return path


def refusal(source: Path | dict[str, Any], *overrides: str) -> str:
    with pytest.raises(StudyError) as caught:
        load_study(source, overrides)
    return str(caught.value)


def test_a_file_and_its_content_are_the_same_study(tmp_path: Path) -> None:
    path = write(tmp_path, "name: trial\nsites: {CS: {}, DU: {}, EZ: {role: unseen}}\n")
    assert load_study(path) == load_study(MINIMAL)
    assert load_study(MINIMAL).unseen_sites == ("EZ",)


def test_yaml_reads_numbers_and_site_names_as_people_mean_them(tmp_path: Path) -> None:
    path = write(tmp_path, "name: trial\nlocal: {lr: 1e-4}\nsites:\n  NO: {}\n  off: {}\n")
    study = load_study(path)
    assert study.training_sites == ("NO", "off")
    assert study.local.lr == 1e-4
    options = load_study(MINIMAL, ["method={kind: custom, factory: 'a:b', options: {rate: 2e-3}}"]).method
    assert options.model_dump()["options"] == {"rate": 0.002}


def test_every_problem_is_listed_with_its_key_and_fix() -> None:
    text = refusal(
        {
            "name": "trial",
            "sites": {"CS": {"acquisition": {"mask": {"famly": "random"}}}, "DU": {"role": "unsen"}},
            "model": {"kind": "unet", "norms": "none"},
            "method": {"kind": "fedporx"},
            "task": {"loss": {"kind": "l2"}},
            "local": {"lr": 0},
            "shedule": {},
        }
    )
    lines = text.splitlines()
    assert lines[0] == "the study file has 7 problems:"
    assert "  - sites.CS.acquisition.mask.famly: unknown key; did you mean `family`?" in lines
    assert "  - sites.DU.role: must be 'train', 'evaluate' or 'unseen', not 'unsen'; did you mean `unseen`?" in lines
    assert "  - model.norms: unknown key; did you mean `norm`?" in lines
    assert "  - method.kind: unknown kind 'fedporx'; did you mean `fedprox`?" in lines
    assert "  - task.loss.kind: must be 'l1', 'mse', 'ssim', 'l1_ssim' or 'psnr', not 'l2'" in lines
    assert "  - local.lr: must be greater than 0, not 0" in lines
    assert "  - shedule: unknown key; did you mean `schedule`?" in lines


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"name": None}, "name: must be a valid string"),
        ({"sites": {"mean": {}}}, "'mean' is a reserved name"),
        ({"sites": {"a b": {}}}, "sites.a b: must match"),
        ({"sites": {"EZ": {"role": "unseen"}}}, "no site has `role: train`"),
        ({"acquisition": {"mask": {"acceleration": 30}}}, "acquisition.mask: calibration=0.08 alone exceeds"),
        ({"task": {"kind": "custom"}}, "task.factory: is missing; add it"),
        ({"local": {"lr": float("nan")}}, "local.lr"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], expected: str) -> None:
    assert expected in refusal({**MINIMAL, **change})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", "key 'name' is given twice (line 2, column 1)"),
        ("name: a\nsites: {CS: {}, CS: {}}\n", "key 'CS' is given twice (line 2, column 17)"),
        ("name: [", "the study file is not valid YAML"),
        ("- name\n", "must hold `key: value` lines"),
        ("", "must hold `key: value` lines"),
        ("? [1]\n: 2\n", "the study file is not valid YAML"),
        ("name: !!timestamp foo\n", "the study file is not valid YAML"),
        ("name: !!bool foo\n", "the study file is not valid YAML"),
        ("name: !!float ''\n", "the study file is not valid YAML"),
        ("name: !!python/object/apply:os.getcwd []\n", "the study file is not valid YAML"),
    ],
)
def test_broken_yaml_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refusal(write(tmp_path, text))


def test_a_missing_file_keeps_its_path_in_the_detail(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="study file cannot be read") as caught:
        load_study(tmp_path / "absent.yaml")
    assert str(tmp_path) not in str(caught.value)
    assert "absent.yaml" in caught.value.detail


def test_overrides_come_before_validation_and_hashing() -> None:
    study = load_study(
        MINIMAL, ["model.kind=unet", "local.lr=1e-2", "task.contrasts=[flair, t1ce]", "sites.DU.role=unseen"]
    )
    assert isinstance(study.model, UNet)
    assert study.local.lr == 0.01
    assert study.task.model_dump()["contrasts"] == ("flair", "t1ce")
    assert study.training_sites == ("CS",)
    assert study_sha256(load_study(MINIMAL, ["seed=1"])) == study_sha256(load_study({**MINIMAL, "seed": 1}))
    assert MINIMAL == {"name": "trial", "sites": {"CS": {}, "DU": {}, "EZ": {"role": "unseen"}}}


def test_parts_without_a_kind_are_of_the_default_kind() -> None:
    study = load_study(MINIMAL, ["model.preset=tiny", "method.weights=equal"])
    assert study.model == MoDL(preset="tiny")
    assert study.method == FedAvg(weights="equal")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("local.lrr=1", "local.lrr: unknown key; did you mean `lr`?"),
        ("sites.DV.role=unseen", "the study has no site 'DV'; known are `CS`, `DU`, `EZ`"),
        ("local", "is not of the form a.b.c=value"),
        ("a..b=1", "is not of the form a.b.c=value"),
        ("task.contrasts.0=flair", "unknown key|must be a valid tuple"),
        ("name.x=1", "`name` has no keys below it; set it as a whole"),
        ("seed=[", "value of override seed is not valid YAML"),
        ("seed=-1", "seed: must be greater than or equal to 0, not -1"),
    ],
)
def test_bad_overrides_are_refused(override: str, expected: str) -> None:
    text = refusal(dict(MINIMAL), override)
    assert any(part in text for part in expected.split("|"))


def test_threads_are_the_machine_s_and_the_error_says_where_they_went() -> None:
    assert "`threads` is the machine's choice" in refusal({**MINIMAL, "local": {"threads": 2, "steps": 3}})
    assert "sites.NAME.threads" in refusal(dict(MINIMAL), "local.threads=1")
    # A model that was released before is read all the same.
    assert load_study({**MINIMAL, "local": {"threads": 2, "steps": 3}}, reading=FOREIGN).local == Local(steps=3)


@given(st.permutations(["name", "sites", "seed", "local", "model"]))
def test_the_plan_ignores_the_order_of_keys_and_written_defaults(order: list[str]) -> None:
    full = {**MINIMAL, "seed": 0, "local": {"steps": 20}, "model": {"kind": "modl", "preset": "small_complex"}}
    assert plan_sha256(load_study({key: full[key] for key in order})) == plan_sha256(load_study(MINIMAL))


@pytest.mark.parametrize("override", ["seed=1", "local.lr=0.002", "sites.CS.acquisition={coils: 4}", "name=other"])
def test_the_hash_sees_every_change(override: str) -> None:
    for hash_of in (study_sha256, plan_sha256):
        assert hash_of(load_study(MINIMAL, [override])) != hash_of(load_study(MINIMAL))


def test_the_hash_is_the_same_tomorrow() -> None:
    study = Study.model_validate({"name": "trial", "sites": {"CS": {}}})
    assert plan_sha256(study) == plan_sha256(Study.model_validate(study.model_dump(mode="json")))
    assert len(study_sha256(study)) == 64


@pytest.mark.parametrize("value", [".nan", "2026-01-01", "!!binary aGk="])
def test_options_that_json_cannot_hold_are_refused(value: str) -> None:
    study = load_study(MINIMAL, [f"method={{kind: custom, factory: 'a:b', options: {{x: {value}}}}}"])
    with pytest.raises(StudyError, match="JSON cannot hold"):
        study_sha256(study)


def test_privacy_takes_the_methods_that_say_they_are_covered() -> None:
    privacy = {"preset": "moderate"}
    study = MINIMAL | {"protection": {"privacy": privacy}, "schedule": {"release": "last"}}
    said = refusal(study | {"method": {"kind": "hyperfed"}})
    assert "method.kind=hyperfed cannot be combined" in said
    assert "choose fedadam, fedavg, fedavgm, fedbn, fedmri, fedper, fedpr, fedprox" in said
    for kind in ("fedadam", "fedavg", "fedavgm", "fedbn", "fedprox"):
        assert load_study(study | {"method": {"kind": kind, "weights": "equal"}}).method.kind == kind
    rules = {"privacy": privacy | {"noise": "distributed", "delta": 1e-5}, "secure": True}
    shared = study | {"protection": rules, "sites": {"A": {}, "B": {}, "C": {}}}
    assert "set it to `fedavg`" in refusal(shared | {"method": {"kind": "fedprox", "weights": "equal"}})
