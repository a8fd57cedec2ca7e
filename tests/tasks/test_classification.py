"""Classification: the loss against its equations, what a patient adds, and a whole run on textures."""

from __future__ import annotations

import csv
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.devices import DEVICES, device_named, step_and_evaluation
from tests.diagnoses import CLASSES, diagnosis_study, make_diagnoses
from tests.dicom_series import mr_series

import wardround
from wardround.errors import DataError, StudyError
from wardround.imaging.readers.dicom_image import read_image_series
from wardround.learning.frozen import freeze
from wardround.models.classifiers import DenseNetSettings, EfficientNetSettings, ResNetSettings
from wardround.study.load import load_study
from wardround.tasks.build import build_task
from wardround.tasks.classes import diagnosis_loss
from wardround.tasks.classification import Classification, ClassificationTask
from wardround.tasks.diagnosed import DiagnosedBatch
from wardround.tasks.states import MetricState, patient_rows, value_of
from wardround.tasks.temperature import Calibration, kept_calibration

EXAMPLES = Path(__file__).parents[2] / "examples"


def examples(seed: int = 0, count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 3, generator=random)
    classes = torch.randint(0, 3, (count,), generator=random)
    return logits, classes, torch.tensor([0.7, 0.2, 0.1]).expand(count, -1)


def one_hot(classes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(classes, 3).float()


def test_losses_follow_their_equations() -> None:
    logits, classes, prior = examples()
    labels, entropy = one_hot(classes), torch.nn.functional.cross_entropy
    assert torch.isclose(diagnosis_loss(logits, labels, prior, "none", False), entropy(logits, classes))
    weighted = entropy(logits, classes, weight=1.0 / (3.0 * prior[0]))
    assert torch.isclose(diagnosis_loss(logits, labels, prior, "weighted", False), weighted)
    adjusted = entropy(logits + prior.log(), classes)
    assert torch.isclose(diagnosis_loss(logits, labels, prior, "logit_adjusted", False), adjusted)
    several = torch.nn.functional.binary_cross_entropy_with_logits
    assert torch.isclose(diagnosis_loss(logits, labels, prior, "none", True), several(logits, labels))
    positive = several(logits, labels, pos_weight=(1 - prior[0]) / prior[0])
    assert torch.isclose(diagnosis_loss(logits, labels, prior, "weighted", True), positive)


def test_a_class_that_a_site_does_not_have_gives_no_infinite_loss() -> None:
    logits, classes, _ = examples()
    prior = torch.tensor([1.0, 0.0, 0.0]).expand(len(logits), -1)
    for imbalance in ("weighted", "logit_adjusted"):
        assert torch.isfinite(diagnosis_loss(logits, one_hot(classes), prior, imbalance, False))


class Fixed(torch.nn.Module):
    """Logits by a picture's first value."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits[x[:, 0, 0, 0].long()]


def task_of(**changes: Any) -> Classification:
    study = diagnosis_study({"A": {}}, task=changes)
    assert isinstance(study.task, ClassificationTask)
    return Classification(study, study.task)


def test_a_patient_is_measured_once_by_the_mean_of_all_images() -> None:
    """Two patients of three and one images: macro figures by hand."""
    task = task_of()
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 9.0]])
    first = DiagnosedBatch(torch.arange(3.0).reshape(3, 1, 1, 1), one_hot(torch.tensor([0, 0, 0])), torch.ones(3, 3))
    second = DiagnosedBatch(torch.full((1, 1, 1, 1), 3.0), one_hot(torch.tensor([1])), torch.ones(1, 3))
    model = Fixed(logits)
    rows = patient_rows(task.metrics, iter([(0, first), (1, second)]), lambda b: task.score(model, b), lambda: False)
    mean = torch.softmax(logits[:3], dim=1).mean(dim=0)
    assert int(mean.argmax()) == 0
    by_name = {spec.name: (spec, rows[spec.name]) for spec in task.metrics}
    values = {}
    for name, (spec, of_patients) in by_name.items():
        count = spec.kind.counted(of_patients).sum()
        state = MetricState(of_patients.sum(axis=0), np.float64(count), np.float64(0))
        values[name] = float(spec.kind.value(spec, state))
    assert values["sensitivity_plain"] == 1.0
    assert values["sensitivity_striped"] == 0.0
    assert values["balanced_accuracy"] == 0.5
    assert values["auroc_plain"] == 1.0
    assert values["ece"] == pytest.approx((1.0 - float(mean[0])) / 2 + 0.5, abs=0.01)


def test_balanced_draws_are_of_all_classes_alike(tmp_path: Path) -> None:
    sites = make_diagnoses(tmp_path, {"A": (30, 4, 2)})
    task = task_of(imbalance="balanced", split={"validation": 0.0, "test": 0.0})
    data = task.dataset("A", sites.of("A").data)
    shares = data.batch([0] * 300, np.random.default_rng(0)).labels.mean(dim=0)
    # Three standard deviations of a share of a third among 300.
    assert torch.allclose(shares, torch.full((3,), 1 / 3), atol=3 * (2 / 9 / 300) ** 0.5)
    with pytest.raises(StudyError, match="privacy does not cover"):
        data.owners()


def test_images_of_one_patient_are_never_parted(tmp_path: Path) -> None:
    sites = make_diagnoses(tmp_path, {"A": (8, 8, 4)})
    data = task_of().dataset("A", sites.of("A").data)
    names = [set(data.names(split)) for split in ("train", "validation", "test")]
    assert sum(map(len, names)) == len(set().union(*names)) == 20
    assert len(data) > data.patients("train")
    batches = dict(data.evaluation("test"))
    assert {len(batch) for batch in batches.values()} == {1, 2}


@pytest.mark.parametrize("settings", [DenseNetSettings, ResNetSettings, EfficientNetSettings])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_networks_by_name(settings: Any, dimensions: int) -> None:
    network = settings(kind=settings.kinds()[0], preset="tiny").build_classifier(dimensions, 2, 5)
    assert network.eval()(torch.zeros(1, 2, *[32] * dimensions)).shape == (1, 5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_and_an_evaluation_on_any_device(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = device_named(device, monkeypatch)
    sites = make_diagnoses(tmp_path, {"A": (4, 4, 4)})
    study = diagnosis_study({"A": {}}, local={"steps": 1, "batch": 4})
    assert step_and_evaluation(study, sites.of("A").data[0], compute)


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"classes": ["a", "a"]}, "names a class twice"),
        ({"size": [8]}, "task.size needs 2 numbers"),
        ({"multi_label": True, "imbalance": "balanced"}, "is for one class a patient"),
    ],
)
def test_a_section_that_does_not_fit_together(task: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        diagnosis_study({"A": {}}, task=task)


def test_a_class_that_is_not_declared(tmp_path: Path) -> None:
    sites = make_diagnoses(tmp_path, {"A": (3, 3, 3)})
    with pytest.raises(DataError, match=r"names a class that task\.classes does not list") as caught:
        task_of(classes=["plain", "striped"]).dataset("A", sites.of("A").data)
    assert "DOE" not in str(caught.value)


def test_several_classes_a_patient(tmp_path: Path) -> None:
    sites = make_diagnoses(tmp_path, {"A": (3, 3, 3)})
    path = tmp_path / "A" / "labels.csv"
    rows = list(csv.reader(path.read_text().splitlines()))
    rows[1][2], rows[2][2] = "plain; bright", ""
    path.write_text("\n".join(",".join(row) for row in rows))
    task = task_of(multi_label=True, split={"validation": 0.0, "test": 0.0})
    data = task.dataset("A", sites.of("A").data)
    labels = data.batch(range(3), np.random.default_rng(0)).labels
    assert labels[0].tolist() == [1.0, 0.0, 1.0]
    assert labels[1].tolist() == [0.0, 0.0, 0.0]
    scores = task.score(task.build_model(), data.batch([0], np.random.default_rng(0)))
    assert {tuple(value.shape) for value in scores.values()} == {(1, 3, 2)}


def test_a_temperature_scales_what_a_site_measures_and_nothing_else() -> None:
    """A network that is sure of itself and right in three of four patients."""
    task = task_of()
    classes = torch.tensor([0, 1, 2, 0] * 4)
    logits = 8.0 * one_hot(torch.tensor([0, 1, 2, 1] * 4))
    model = Fixed(logits)
    batches = [
        (n, DiagnosedBatch(torch.full((1, 1, 1, 1), float(n)), one_hot(classes[n : n + 1]), torch.ones(1, 3)))
        for n in range(len(classes))
    ]
    own = task.calibration(model, batches)
    assert own is not None
    assert task.calibration(model, batches[:3]) is None

    def measured(scored: Classification) -> dict[str, float]:
        rows = patient_rows(scored.metrics, iter(batches), lambda batch: scored.score(model, batch))
        return {spec.name: value_of(spec, rows[spec.name]) for spec in scored.metrics}

    before, after = measured(task), measured(task.calibrated(own))
    assert np.isnan(before.pop("ece_scaled"))
    # Scaled, it says 3/4: within a bin of 1/200.
    assert after.pop("ece_scaled") <= 1 / 200
    assert before == after
    assert before["ece"] == pytest.approx(0.25, abs=1 / 200)
    assert task.classes.own is None


@pytest.mark.parametrize("imbalance", ["weighted", "balanced", "logit_adjusted"])
def test_what_training_took_out_of_the_logits_comes_back_where_the_site_calibrates(imbalance: str) -> None:
    """A network that cannot tell classes apart: a likeliest class at all comes of the site's shares alone."""
    task = task_of(imbalance=imbalance)
    classes = torch.tensor([0, 0, 1, 2] * 4)
    model = Fixed(torch.zeros(len(classes), 3))
    shares = torch.tensor([[0.5, 0.25, 0.25]])
    batches = [
        (n, DiagnosedBatch(torch.full((1, 1, 1, 1), float(n)), one_hot(classes[n : n + 1]), shares))
        for n in range(len(classes))
    ]
    own = task.calibration(model, batches)
    assert own is not None
    assert own.offsets == pytest.approx(np.log([0.5, 0.25, 0.25]))
    scored = task.calibrated(own)
    assert scored.classes.probabilities(torch.zeros(1, 3), own)[0].tolist() == pytest.approx([0.5, 0.25, 0.25])
    rows = patient_rows(scored.metrics, iter(batches), lambda batch: scored.score(model, batch))
    found = {spec.name: value_of(spec, rows[spec.name]) for spec in scored.metrics}
    # Half of the patients have the likeliest class: 1/3 is said of them without the shares, 1/2 with.
    assert found["ece"] == pytest.approx(1 / 2 - 1 / 3, abs=1 / 200)
    assert found["ece_scaled"] <= 1 / 200
    with pytest.raises(DataError, match="of another model"):
        task.calibrated(Calibration(1.0, (0.0, 0.0)))


def test_charts_and_pictures_say_who_was_called_what() -> None:
    task = task_of()
    classes, called = [0, 0, 1, 2], [0, 1, 1, 1]
    model = Fixed(3.0 * one_hot(torch.tensor(called)))
    batches = [
        DiagnosedBatch(torch.full((1, 3, 2, 2), float(n)), one_hot(torch.tensor([k])), torch.ones(1, 3))
        for n, k in enumerate(classes)
    ]
    rows = patient_rows(task.metrics, enumerate(batches), lambda batch: task.score(model, batch))
    found = task.charts(rows)
    assert found.confusion is not None
    assert found.confusion.counts == ((1, 1, 0), (0, 1, 0), (0, 1, 0))
    assert found.before is not None
    assert sum(found.before.true) == 2
    assert found.after is None
    merit = task.merit(rows)
    assert merit[0] == merit[2] > merit[1] == merit[3]
    assert task.illustrate(None, batches[3]).caption == "bright"
    assert task.illustrate(model, batches[3]).caption == f"striped {np.exp(3) / (np.exp(3) + 2):.2f}"
    assert task.illustrate(model, batches[3]).picture.shape == (2, 2, 3)


def test_the_study_of_skin_tumours_trains_the_last_layers_alone() -> None:
    study = load_study(EXAMPLES / "skin.yaml")
    model = build_task(study).build_model()
    freeze(model, study.parts.frozen)
    trained = {name.rsplit(".", 2)[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"blocks.15.layers.0", "blocks.15.layers.1", "blocks.15.layers.2", "head", "classifier"}


def test_series_are_classified_as_nifti_of_the_same_voxels(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    rows = [("image", "patient", "label")]
    for name in ("a", "b", "c"):
        mr_series(tmp_path / "dicom" / "images" / name, random.integers(0, 900, (12, 10, 4)))
        series = read_image_series(tmp_path / "dicom" / "images" / name)
        (tmp_path / "nifti" / "images").mkdir(parents=True, exist_ok=True)
        path = tmp_path / "nifti" / "images" / f"{name}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(series.data.astype(np.int16), series.affine), path)
        rows.append((name, f"P{name}", CLASSES[0]))
    for kind in ("nifti", "dicom"):
        with (tmp_path / kind / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    study = diagnosis_study({"A": {}}, task={"dimensions": 3, "size": [8, 8, 4], "channels": 1})
    task: Any = build_task(study)
    nifti, dicom = (task.dataset("A", tmp_path / kind) for kind in ("nifti", "dicom"))
    (_, one), (_, same) = (next(data.evaluation("test")) for data in (nifti, dicom))
    assert torch.equal(one.images, same.images)
    # What files are called is no part of a fingerprint, and what is in them is.
    before, folder = dicom.fingerprint(), tmp_path / "dicom" / "images" / "b"
    sorted(folder.iterdir())[0].rename(folder / "zz")
    assert task.dataset("A", tmp_path / "dicom").fingerprint() == before
    (folder / "zz").write_bytes((folder / "zz").read_bytes().replace(b"SIEMENS ", b"PHILIPS "))
    assert task.dataset("A", tmp_path / "dicom").fingerprint() != before


def test_a_run_tells_textures_apart(tmp_path: Path) -> None:
    sites = make_diagnoses(tmp_path / "data", {"A": (12, 12, 12), "B": (16, 10, 10), "C": (2, 2, 2)})
    split = {"validation": 0.3, "test": 0.3}
    study = diagnosis_study({"A": {}, "B": {}, "C": {"role": "unseen"}}, task={"split": split})
    result = wardround.run(study, sites, tmp_path / "out", engine="local")
    auroc = result.metrics["federated"]["mean"]["auroc"]
    assert auroc is not None
    assert auroc.value > 0.9
    assert result.metrics["federated"]["mean"][f"sensitivity_{CLASSES[0]}"] is not None
    # A temperature is a training site's own, and stays there; an unseen hospital labels no patient for the model.
    for site in ("A", "B"):
        assert result.metrics["federated"][site]["ece_scaled"] is not None
        own = kept_calibration(tmp_path / "out" / "models" / site / "federated")
        assert own is not None
        assert f"{own.temperature:.6f}" not in (tmp_path / "out" / "result.json").read_text()
    assert result.metrics["federated"]["C"]["ece_scaled"] is None
    page = result.report.read_text()
    assert "Class by class" in page
    assert "Worst test patient" in page
    assert "DOE0" not in page


def test_the_benchmarks_measure_what_sites_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site sums scores in bins: the same lesions and labels, with scores that are rounded alike."""
    monkeypatch.syspath_prepend(str(EXAMPLES.parent / "benchmarks"))
    skin, few = (importlib.import_module(name) for name in ("skin_sites", "pretrain"))
    sites = make_diagnoses(tmp_path, {"A": (12, 12, 12)})
    task = task_of(split={"validation": 0.2, "test": 0.6})
    data, network = task.dataset("A", sites.of("A").data), task.build_model()
    seen = skin.said(task, network, skin.lesions(data, "test"), Calibration(2.0, (0.0, 0.1, 0.2)))
    assert seen.plain.shape == seen.called.shape == (data.patients("test"), 3)
    assert not np.allclose(seen.plain, seen.called)
    rows = patient_rows(task.metrics, data.evaluation("test"), lambda batch: task.score(network, batch))
    spec = task.metrics[0]
    found = skin.everybody({"A": replace(seen, plain=np.floor(seen.plain * 200))}, skin.macro_auroc)
    assert found == pytest.approx(value_of(spec, rows[spec.name]), abs=1e-9)
    # Student's t of two degrees of freedom: 4.3027; the mean 2, the deviation 1.
    assert few.lower_bound(np.array([1.0, 2.0, 3.0])) == pytest.approx(2.0 - 4.3027 / 3**0.5, abs=1e-4)
