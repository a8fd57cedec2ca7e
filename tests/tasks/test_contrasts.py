"""Contrasts that a site or a patient does not have: what is read, what a network sees, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from tests.diagnoses import diagnosis_study
from tests.outlines import SIZE, blob, image_study, outline_study

import wardround
from wardround.errors import DataError
from wardround.imaging.readers.cases import sort_cases
from wardround.imaging.readers.labelled import read_image
from wardround.runs.explain import explain
from wardround.runs.inputs import find_inputs
from wardround.study.hashes import written
from wardround.study.sites import SiteData, SitesFile
from wardround.tasks.build import build_task
from wardround.tasks.contrasts import dropped, without
from wardround.wire.random import public_generator

CONTRASTS = ["flair", "t1ce"]


def make(root: Path, sites: Mapping[str, tuple[str, ...]], patients: int = 6) -> SitesFile:
    """A folder a site; each patient has the contrasts that are named, all of the same ball, and a mask."""
    for number, (site, contrasts) in enumerate(sites.items()):
        for patient in range(patients):
            folder = root / site / f"DOE-{patient:02d}"
            folder.mkdir(parents=True)
            image, mask = blob(1000 * number + patient, 3)
            noise = np.random.default_rng(patient).normal(0, 6, image.shape)
            made = {"flair": image, "t1ce": np.clip(255.0 - image + noise, 1, 255).astype(np.uint8)}
            for name in contrasts:
                nibabel.save(nibabel.Nifti1Image(made[name], np.diag([1.0, 1.0, 3.0, 1.0])), folder / f"{name}.nii.gz")
            nibabel.save(nibabel.Nifti1Image(mask, np.diag([1.0, 1.0, 3.0, 1.0])), folder / "mask.nii.gz")
    return SitesFile(sites={site: SiteData(data=root / site) for site in sites})


def study_of(sites: Mapping[str, Any], **task: Any) -> Any:
    task = {"images": CONTRASTS, "channels": 2, "augment": "standard", **task}
    return outline_study(sites, task=task, local={"steps": 2, "batch": 2, "lr": 0.01}, schedule={"rounds": 1})


BOTH: Mapping[str, tuple[str, ...]] = {"A": ("flair", "t1ce"), "B": ("flair",)}
LACKING: Mapping[str, Any] = {"A": {}, "B": {"missing": ["t1ce"]}}


# What a network sees --------------------------------------------------------------------------------------------------


def test_the_channel_of_a_missing_contrast_is_exactly_0(tmp_path: Path) -> None:
    """In training, where brightness and noise change what is there, and in evaluation."""
    sites, study = make(tmp_path, BOTH), study_of(LACKING)
    dataset = build_task(study).dataset("B", sites.of("B").data)
    batch = dataset.batch(range(8), public_generator(1, "x"))
    assert not batch.images[:, 1].any()
    assert batch.images[:, 0].any()
    for _, whole in dataset.evaluation("test"):
        assert not whole.images[:, 1].any()
        assert whole.images[:, 0].any()


def test_the_first_contrast_may_be_the_missing_one(tmp_path: Path) -> None:
    sites = make(tmp_path, {"A": ("flair", "t1ce"), "B": ("t1ce",)})
    task = build_task(study_of({"A": {}, "B": {"missing": ["flair"]}}))
    dataset = task.dataset("B", sites.of("B").data)
    batch = dataset.batch([0, 1], public_generator(1, "x"))
    assert not batch.images[:, 0].any()
    assert batch.images[:, 1].any()
    assert task.illustrate(None, dataset.tested(0)).picture.any()


def test_a_site_that_has_all_sees_the_same_bits_whatever_others_lack(tmp_path: Path) -> None:
    sites = make(tmp_path, {"A": ("flair", "t1ce"), "B": ("flair", "t1ce")})
    batches = [
        build_task(study_of(each)).dataset("A", sites.of("A").data).batch(range(6), public_generator(2, "x"))
        for each in ({"A": {}, "B": {}}, LACKING)
    ]
    assert torch.equal(batches[0].images, batches[1].images)


@pytest.mark.parametrize("absent", [(), (1,), (0, 2)])
def test_of_what_is_there_a_share_is_dropped_and_one_stays(absent: tuple[int, ...]) -> None:
    channels, random = torch.ones(3, 2, 2), np.random.default_rng(0)
    seen = np.array([dropped(channels, absent, 0.4, random)[:, 0, 0].numpy() for _ in range(4000)])
    assert not seen[:, list(absent)].any()
    assert seen.any(1).all()
    there = [n for n in range(3) if n not in absent]
    # Kept by itself with 0.6, or as the one that stays where all would go: alike for each, so 1/n of 0.4 ** n.
    expected = 0.6 + 0.4 ** len(there) / len(there)
    assert np.allclose(seen[:, there].mean(0), expected, atol=4 * np.sqrt(0.25 / 4000))
    assert channels.all()


def test_nothing_is_drawn_where_nothing_is_dropped() -> None:
    one, other = np.random.default_rng(3), np.random.default_rng(3)
    channels = torch.randn(2, 4)
    assert dropped(channels, (), 0.0, one) is channels
    assert torch.equal(dropped(channels, (1,), 0.0, one), without(channels, (1,)))
    assert one.random() == other.random()


def test_dropping_changes_training_alone(tmp_path: Path) -> None:
    sites = make(tmp_path, {"A": ("flair", "t1ce")})
    dataset = build_task(study_of({"A": {}}, drop_contrasts=0.5)).dataset("A", sites.of("A").data)
    batch = dataset.batch(range(8), public_generator(1, "x"))
    there = batch.images.flatten(2).any(2)
    assert not there.all()
    assert there.any(1).all()
    assert all(whole.images.flatten(2).any(2).all() for _, whole in dataset.evaluation("test"))


# In a chain -----------------------------------------------------------------------------------------------------------


def chain_of(root: Path, drop: float = 0.0) -> tuple[Any, Any]:
    """A chain's task and the data of a site without the second contrast."""
    sites = make(root, BOTH)
    task = {
        "kind": "chain",
        "images": CONTRASTS,
        "channels": 2,
        "size": [SIZE, SIZE],
        "segmenter": {"preset": "tiny"},
        "split": {"validation": 0.2, "test": 0.3},
        "drop_contrasts": drop,
    }
    made = build_task(
        image_study(
            task,
            {},
            name="chain",
            sites=LACKING,
            acquisition={"coils": 2, "mask": {"acceleration": 3, "calibration": 0.15}},
            model={"kind": "modl", "preset": "tiny"},
        )
    )
    return made, {site: made.dataset(site, sites.of(site).data) for site in "AB"}


def test_in_a_chain_the_diagnosis_sees_0_of_a_missing_contrast(tmp_path: Path) -> None:
    """Its scan shows noise, which reaches nothing: no image, no loss, no score."""
    task, data = chain_of(tmp_path)
    torch.manual_seed(0)
    model = task.build_model().eval()
    batch = data["B"].batch([0, 1], public_generator(1, "x"))
    assert batch.there.tolist() == [[1.0, 0.0]] * 2
    images, _ = task.both(model, batch)
    assert not images[:, 1].any()
    assert images[:, 0].any()
    assert not batch.scans.target[1::2].any()
    _, whole = next(data["B"].evaluation("test"))
    scores = task.score(model, whole)
    alone = replace(whole, scans=type(whole.scans)(*(part[::2] for part in vars(whole.scans).values())), there=None)
    seen = task.image_scores(task.both(model, whole)[0][:, 0], alone)
    for name, value in seen.items():
        assert torch.isclose(scores[name], value, rtol=1e-5), name
    whole_there = task.losses(model, data["A"].batch([0, 1], public_generator(1, "x")))
    assert all(torch.isfinite(loss) for loss in (*task.losses(model, batch).values(), *whole_there.values()))
    assert data["A"].batch([0, 1], public_generator(1, "x")).there is None
    assert len(list(task.examples(data["B"]))) == 1


def test_a_chain_drops_contrasts_and_predicts_without_one(tmp_path: Path) -> None:
    task, data = chain_of(tmp_path, 0.6)
    there = data["A"].batch(range(6), public_generator(1, "x")).there
    assert there.any(1).all()
    assert not there.all()
    case = sort_cases(tmp_path / "B", "", task.patterns()).cases["DOE-00"][0]
    assert case.absent == (1,)
    said = task.predict(task.build_model(), read_image(case))
    assert not said.images[1].any()
    assert said.images[0].any()


# Whole runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_site_without_a_contrast_trains_is_told_of_and_predicted_for(tmp_path: Path) -> None:
    sites = make(tmp_path / "data", {**BOTH, "C": ("flair",)})
    study = study_of({**LACKING, "C": {"role": "unseen", "missing": ["t1ce"]}}, drop_contrasts=0.3)
    result = wardround.run(study, sites, tmp_path / "out")
    assert set(result.participants) == {"A", "B"}
    assert any(note.startswith("B has no t1ce: there the network sees flair alone") for note in result.notes)
    assert "B has no t1ce" in (tmp_path / "out" / "report.html").read_text()
    model = tmp_path / "out" / "models" / "federated.safetensors"
    found = wardround.predict(model, tmp_path / "data" / "C" / "DOE-00", tmp_path / "predicted")
    assert not found.failed
    assert "no t1ce" in found.outlines[0].said


def test_a_model_that_never_did_without_refuses_a_patient_without(tmp_path: Path) -> None:
    """Its study has the patterns of a clinic's files: without dropout and without a site that lacks one, all are."""
    make(tmp_path, {"B": ("flair",)})

    def reason(study: Any) -> list[str]:
        return [one.reason for one in find_inputs(tmp_path / "B", build_task(study).patterns()).aside]

    (said, *rest) = reason(study_of({"A": {}}))
    assert "t1ce'; complete it; this model was not trained to do without" in said
    assert len(rest) == 5
    assert not reason(study_of({"A": {}}, drop_contrasts=0.2))
    assert not reason(study_of(LACKING))
    assert len(reason(study_of({"A": {}, "B": {"missing": ["flair"]}}))) == 6


def test_check_says_which_site_lacks_what(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(written(study_of(LACKING))))
    text = explain(tmp_path / "study.yaml", None, (), ())
    assert "trains, has no t1ce" in text


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "task", "said"),
    [
        ({"A": {"missing": ["t2"]}}, {}, r"sites.A.missing: 't2' is none of task.images \(flair, t1ce\)"),
        ({"A": {"missing": CONTRASTS}}, {}, "sites.A.missing: the site would have no image at all"),
        ({"A": {"missing": ["flair"]}}, {"channels": 3}, "sites.A.missing: .* not of several files, each a channel"),
        ({"A": {}}, {"images": ["flair"], "channels": 1, "drop_contrasts": 0.5}, "task.drop_contrasts: needs at least"),
    ],
)
def test_a_study_that_means_nothing_is_refused(sites: Any, task: Mapping[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        study_of(sites, **task)


def test_a_task_without_contrasts_refuses_a_site_that_lacks_one() -> None:
    with pytest.raises(ValidationError, match=r"sites.A.missing: the images of task.kind classification are not"):
        diagnosis_study({"A": {"missing": ["x"]}})


def test_a_file_of_several_channels_cannot_stand_beside_a_missing_one(tmp_path: Path) -> None:
    sites = make(tmp_path, {"A": ("flair",)}, patients=3)
    colour = np.zeros((SIZE, SIZE, 3, 2), np.float32)
    nibabel.save(nibabel.Nifti1Image(colour, np.eye(4)), tmp_path / "A" / "DOE-00" / "flair.nii.gz")
    task = build_task(study_of({"A": {"missing": ["t1ce"]}}))
    with pytest.raises(DataError, match="a file has 2 channels, and of an image that lacks a contrast"):
        task.dataset("A", sites.of("A").data)
