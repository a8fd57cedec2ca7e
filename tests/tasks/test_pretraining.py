"""Pretraining without labels: the error against its equation, masks, few labels, and an encoder that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.numpy import load_file
from tests.devices import DEVICES, arm_specs_of, device_named, step_and_evaluation
from tests.diagnoses import SIZE, diagnosis_study, make_diagnoses
from tests.outlines import image_study

import wardround
from wardround.errors import StudyError
from wardround.plan.arm_specs import ArmSpecs
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.study.start import FromRelease
from wardround.tasks.build import build_task
from wardround.tasks.classification import ClassificationTask
from wardround.tasks.masked import MaskedBatch
from wardround.tasks.pretraining import Pretraining, PretrainingTask

EXAMPLES = Path(__file__).parents[2] / "examples"
TABLE = {"file": "labels.csv", "id": "image", "patient": "patient"}
VIT = {"kind": "vit", "preset": "tiny"}


def pretraining_study(sites: dict[str, Any], **changes: Any) -> Study:
    task = {
        "kind": "pretraining",
        "images": ["images/{id}"],
        "table": TABLE,
        "channels": 3,
        "size": [SIZE, SIZE],
        "augment": "none",
        "split": {"validation": 0.2, "test": 0.3},
    }
    return image_study(
        task,
        changes,
        name="patches",
        sites=sites,
        model={"kind": "mae_vit", "preset": "tiny"},
        local={"steps": 6, "batch": 8, "optimizer": "adam", "lr": 0.003, "optimizer_state": "keep"},
        schedule={"rounds": 4},
    )


def task_of(study: Study) -> Pretraining:
    task = build_task(study)
    assert isinstance(task, Pretraining)
    return task


def test_the_error_is_that_of_hidden_patches_on_their_own_scale() -> None:
    task = task_of(pretraining_study({"A": {}}))
    random = torch.Generator().manual_seed(0)
    images, kept = torch.randn(2, 3, SIZE, SIZE, generator=random), torch.tensor([[0, 5, 9, 15], [1, 2, 3, 4]])
    said = torch.randn(2, 16, 48, generator=random)
    expected = []
    for image, seen, patches in zip(images, kept, said, strict=True):
        errors = []
        for number in range(16):
            if number not in seen:
                row, column = 4 * (number // 4), 4 * (number % 4)
                true = image[:, row : row + 4, column : column + 4].flatten().double()
                scaled = (true - true.mean()) / (true.var(correction=0) + 1e-6).sqrt()
                errors.append(float((patches[number] - scaled).square().mean()))
        expected.append(np.mean(errors))
    # Means of at most 12 x 48 float32 numbers.
    assert task.errors(said, MaskedBatch(images, kept)).tolist() == pytest.approx(expected, rel=1e-5)
    # A patch's mean says nothing: an error of 1.
    assert task.errors(torch.zeros_like(said), MaskedBatch(images, kept)).tolist() == pytest.approx(
        [1.0, 1.0], rel=1e-4
    )


@pytest.mark.parametrize(("hidden", "seen"), [(0.75, 4), (0.6, 6), (0.99, 1), (0.01, 15)])
def test_a_share_of_the_patches_is_hidden(tmp_path: Path, hidden: float, seen: int) -> None:
    sites = make_diagnoses(tmp_path, {"A": (3, 3, 3)})
    task = task_of(pretraining_study({"A": {}}, task={"hidden": hidden}))
    data = task.dataset("A", sites.of("A").data)
    first, again, other = (data.batch([0, 1, 0], np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.kept, again.kept)
    assert not torch.equal(first.kept, other.kept)
    assert first.kept.shape == (3, seen)
    assert (first.kept.diff(dim=1) > 0).all()
    assert len({tuple(places) for places in first.kept.tolist()}) > 1


def test_a_patient_is_measured_with_the_same_patches_whatever_else_is_there(tmp_path: Path) -> None:
    """Nothing but the study's seed and what the image holds chooses them."""
    sites = make_diagnoses(tmp_path, {"A": (3, 3, 3), "B": (1, 1, 1)})
    study = pretraining_study({"A": {}, "B": {}})
    shown = {}
    for _ in range(2):
        task = task_of(study)
        data = task.dataset("A", sites.of("A").data)
        batches = [batch for split in ("validation", "test") for _, batch in data.evaluation(split)]  # type: ignore[arg-type]
        found = {batch.images.numpy().tobytes(): batch.kept for batch in batches}
        assert all(torch.equal(shown.setdefault(image, kept), kept) for image, kept in found.items())
    part = task.dataset("B", sites.of("B").data)
    pooled = task.pooled([part, data])
    for _, batch in pooled.evaluation("test"):
        if (image := batch.images.numpy().tobytes()) in shown:
            assert torch.equal(batch.kept, shown[image])
    assert len({tuple(row) for kept in shown.values() for row in kept.tolist()}) > 1
    reseeded = task_of(pretraining_study({"A": {}}, seed=6)).dataset("A", sites.of("A").data)
    batches = [batch for split in ("validation", "test") for _, batch in reseeded.evaluation(split)]  # type: ignore[arg-type]
    known = [(b.kept, shown[b.images.numpy().tobytes()]) for b in batches if b.images.numpy().tobytes() in shown]
    assert known
    assert not all(torch.equal(*pair) for pair in known)


def test_no_label_is_read_and_images_of_one_patient_are_never_parted(tmp_path: Path) -> None:
    sites = make_diagnoses(tmp_path, {"A": (5, 5, 5)})
    path = tmp_path / "A" / "labels.csv"
    path.write_text("\n".join(line.rpartition(",")[0] for line in path.read_text().splitlines()))
    data = task_of(pretraining_study({"A": {}})).dataset("A", sites.of("A").data)
    names = [set(data.names(split)) for split in ("train", "validation", "test")]
    assert sum(map(len, names)) == len(set().union(*names)) == 15
    assert len(data) > data.patients("train")
    assert len(set(data.owners())) == data.patients("train")


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_and_an_evaluation_on_any_device(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = device_named(device, monkeypatch)
    sites = make_diagnoses(tmp_path, {"A": (3, 3, 3)})
    local = {"steps": 1, "batch": 4}
    for study in (pretraining_study({"A": {}}, local=local), diagnosis_study({"A": {}}, local=local, model=VIT)):
        assert step_and_evaluation(study, sites.of("A").data[0], compute)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"size": [16]}, "task.size needs 2 numbers"),
        ({"table": None}, "no pattern has {patient}"),
        ({"hidden": 1.0}, "less than 1"),
    ],
)
def test_a_section_that_does_not_fit_together(task: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        pretraining_study({"A": {}}, task=task)


def test_patches_that_do_not_fit_are_refused_before_anything_is_read() -> None:
    for study in (
        pretraining_study({"A": {}}, task={"size": [16, 18]}),
        diagnosis_study({"A": {}}, model=VIT, task={"size": [16, 18]}),
    ):
        with pytest.raises(StudyError, match=r"16 x 18 is no whole number of patches of 4"):
            build_task(study).build_model()
    with pytest.raises(StudyError, match="an image is one patch of 16"):
        build_task(pretraining_study({"A": {}}, model={"kind": "mae_vit", "preset": "tiny", "patch": 16}))
    with pytest.raises(ValidationError, match=r"model\.kind: vit does not fit task.kind: pretraining; take mae_vit"):
        pretraining_study({"A": {}}, model=VIT)


# Few labels ---------------------------------------------------------------------------------------------------------


def test_few_labels_are_drawn_of_those_who_train_and_nobody_else_moves(tmp_path: Path) -> None:
    sites = make_diagnoses(tmp_path, {"A": (14, 14, 12)})

    def names(share: float, draw: int = 0) -> list[tuple[str, ...]]:
        task: Any = build_task(diagnosis_study({"A": {}}, task={"labels": {"share": share, "draw": draw}}))
        data = task.dataset("A", sites.of("A").data)
        assert data.patients("train") == len(data.names("train"))
        assert set(data.owners()) <= set(range(40))
        return [data.names(split) for split in ("train", "validation", "test")]

    everyone, few = names(1.0), names(0.3)
    assert [len(part) for part in everyone] == [20, 8, 12]
    assert few[1:] == everyone[1:]
    assert len(few[0]) == 6
    assert set(few[0]) < set(everyone[0])
    assert names(0.3) == few
    assert names(0.3, draw=1)[0] != few[0]
    # A larger share has the patients of a smaller one, and the least share is a patient.
    assert set(few[0]) < set(names(0.6)[0])
    assert len(names(0.001)[0]) == 1
    said = diagnosis_study({"A": {}}, task={"labels": {"share": 0.05, "draw": 2}}).task.describe()
    assert said.endswith(", labels of 0.05 of the training patients (draw 2)")
    assert "labels" not in diagnosis_study({"A": {}}).task.describe()


# The encoder goes on ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_encoder_of_a_pretraining_is_what_a_classification_starts_from(tmp_path: Path) -> None:
    """Across two sites: the error falls below that of patches' means, and the decoder is left out by one rule."""
    sites = make_diagnoses(tmp_path / "data", {"A": (8, 12, 12), "B": (6, 10, 10)})
    result = wardround.run(
        pretraining_study({"A": {}, "B": {}}, schedule={"rounds": 6}), sites, tmp_path / "first", engine="local"
    )
    error = result.metric("federated", "mean", "hidden_error")
    assert error < 0.95
    page = result.report.read_text()
    assert "Error of hidden patches" in page
    assert "Worst test patient" in page
    assert "DOE0" not in page

    def begun(**start: Any) -> dict[str, Any]:
        whole = {"kind": "release", "file": "first", "sha256": result.model_sha256, **start}
        study = diagnosis_study({"A": {}, "B": {}}, model=VIT, start=whole)
        return ArmSpecs(study, (), places=study.places(tmp_path)).model_context.initial_values()

    fresh = arm_specs_of(diagnosis_study({"A": {}}, model=VIT)).model_context.initial_values()
    found = begun(only=["encoder.*"], partial=True)
    released = load_file(tmp_path / "first" / "models" / "federated.safetensors")
    for name, value in found.items():
        assert np.array_equal(value, (released if name.startswith("encoder.") else fresh)[name])
    assert not np.array_equal(found["encoder.patch.weight"], fresh["encoder.patch.weight"])
    for start, says in (
        ({"partial": True}, "holds values that the model lacks: decoder"),
        ({"only": ["encoder.*"]}, "has no values for head.weight, head.bias; set `start.partial: true`"),
        ({"only": ["encoders.*"], "partial": True}, r"start.only: 'encoders.\*' matches no value of first, which has"),
    ):
        with pytest.raises(StudyError, match=says):
            begun(**start)


def test_the_studies_of_skin_fit_each_other() -> None:
    """Who tests the second has pretrained nothing, and the first has the encoder that the second asks for."""
    first, second = (load_study(EXAMPLES / f"skin-{name}.yaml") for name in ("pretrain", "few-labels"))
    before, after = first.task, second.task
    assert isinstance(before, PretrainingTask)
    assert isinstance(after, ClassificationTask)
    assert before.table is not None
    assert (first.seed, first.sites, before.split) == (second.seed, second.sites, after.split)
    assert (before.images, before.table.patient) == (after.images, after.table.patient)
    assert (before.size, before.channels, after.labels.share) == (after.size, after.channels, 0.05)
    with torch.device("meta"):
        released, begun = (build_task(study).build_model().state_dict() for study in (first, second))
    taken = {name: value.shape for name, value in released.items() if name.startswith("encoder.")}
    assert taken == {name: value.shape for name, value in begun.items() if name.startswith("encoder.")}
    assert isinstance(second.start, FromRelease)
    assert second.start.only == ("encoder.*",)
