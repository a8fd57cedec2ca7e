"""A chain that ends in a class: which loss reaches which network, what a patient adds, a run, a clinic's image."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.numpy import save_file
from tests.ct_hospitals import GEOMETRY
from tests.devices import DEVICES, device_named
from tests.laws.test_devices import _steps_and_evaluation
from tests.lungs import lungs, save
from tests.outlines import SIZE, image_study
from tests.runs.test_predict_chain import kspace_of
from tests.tasks.test_chain import BOTH, reached

import wardround
from wardround.federation.release import FORMAT
from wardround.study.hashes import study_sha256
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile
from wardround.tasks.build import build_task
from wardround.tasks.chain_class import ChainToClass, ClassedDataset
from wardround.tasks.classes import diagnosis_loss
from wardround.tasks.states import patient_rows, value_of
from wardround.tasks.temperature import Calibration

CLASSES = ("plain", "spot")


def class_study(**changes: Any) -> Study:
    """A study of pictures with or without a spot; `changes` replace parts of the task (`task`), or of the study."""
    return image_study(
        {
            "kind": "chain_to_class",
            "classes": CLASSES,
            "size": [SIZE, SIZE],
            "classifier": {"kind": "resnet", "preset": "tiny"},
            "augment": "none",
            "split": {"validation": 0.2, "test": 0.3},
        },
        changes,
        name="to-class",
        sites={"A": {}, "B": {}},
        acquisition={"coils": 2, "mask": {"acceleration": 3, "calibration": 0.15}},
        model={"kind": "modl", "preset": "tiny"},
        local={"steps": 2, "batch": 4, "optimizer": "adam", "lr": 0.01, "optimizer_state": "keep"},
        schedule={"rounds": 1},
    )


def picture(kind: int, seed: int) -> np.ndarray:
    """A disc of noise, with a bright spot for the second class: (SIZE, SIZE), uint8."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    image = ((y - SIZE / 2) ** 2 + (x - SIZE / 2) ** 2 < 14**2) * (90 + 10 * random.standard_normal((SIZE, SIZE)))
    if kind:
        image[10:16, 12:18] += 140
    return np.clip(image, 0, 255).astype(np.uint8)


def write_table(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "patient", "label"), *rows])


def make_pictures(root: Path, sites: dict[str, int]) -> SitesFile:
    """A folder a site with so many patients of each class, every other one with two pictures."""
    for number, (site, patients) in enumerate(sites.items()):
        (root / site / "images").mkdir(parents=True)
        rows = []
        for kind, name in enumerate(CLASSES):
            for patient in range(patients):
                for which in range(1 + patient % 2):
                    image = f"i{kind}{patient}{which}"
                    array = picture(kind, 1000 * number + 100 * kind + 10 * patient + which)
                    Image.fromarray(array).save(root / site / "images" / f"{image}.png")
                    rows.append((image, f"DOE{kind}{patient}", name))
        write_table(root / site, rows)
    return SitesFile(sites={site: SiteData(data=root / site) for site in sites})


def task_of(**changes: Any) -> ChainToClass:
    task = build_task(class_study(**changes))
    assert isinstance(task, ChainToClass)
    return task


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[ChainToClass, ClassedDataset]:
    sites = make_pictures(tmp_path_factory.mktemp("one"), {"A": 6})
    task = task_of()
    return task, task.dataset("A", sites.of("A").data)


def test_few_labels_let_fewer_patients_train(tmp_path: Path) -> None:
    sites = make_pictures(tmp_path, {"A": 6})
    whole, few = (task_of(task={"labels": {"share": share}}).dataset("A", sites.of("A").data) for share in (1.0, 0.5))
    assert (whole.patients("train"), few.patients("train")) == (6, 3)
    assert set(few.names("train")) < set(whole.names("train"))
    assert few.names("test") == whole.names("test")


# Losses ---------------------------------------------------------------------------------------------------------------


def test_the_loss_of_the_class_reaches_the_reconstruction_in_a_joint_phase_alone(
    one: tuple[ChainToClass, ClassedDataset],
) -> None:
    task, data = one
    batch: Any = data.batch([0, 1, 2], np.random.default_rng(3))
    no_images = {"reconstruction": 0.0, "diagnosis": 1.0}
    assert reached(task, batch, train=BOTH, weights=no_images) == set(BOTH)  # type: ignore[arg-type]
    assert reached(task, batch, train=["diagnosis"]) == {"diagnosis"}  # type: ignore[arg-type]
    assert reached(task, batch, train=["reconstruction"]) == {"reconstruction"}  # type: ignore[arg-type]


@pytest.mark.parametrize("imbalance", ["none", "weighted", "logit_adjusted"])
def test_each_loss_is_its_equation(imbalance: str, one: tuple[ChainToClass, ClassedDataset]) -> None:
    data, task = one[1], task_of(task={"imbalance": imbalance, "losses": {"reconstruction": {"kind": "mse"}}})
    batch, model = data.batch([0, 1, 2, 3], np.random.default_rng(3)), task.build_model().eval()
    images, logits = model(batch.scans, 1)
    found = task.losses(model, batch)
    error = (images[:, 0] - batch.scans.target).square()
    assert torch.isclose(found["reconstruction"], error.mean(), rtol=1e-5)
    expected = diagnosis_loss(logits, batch.labels, batch.prior, imbalance, False)
    assert torch.isclose(found["diagnosis"], expected, rtol=1e-5)
    assert torch.isclose(task.loss(model, batch), found["reconstruction"] + expected, rtol=1e-5)


# What a patient adds --------------------------------------------------------------------------------------------------


def test_a_patient_is_measured_once_and_images_as_those_of_a_reconstruction(
    one: tuple[ChainToClass, ClassedDataset],
) -> None:
    task, data = one
    assert [spec.name for spec in task.metrics][:3] == ["auroc", "balanced_accuracy", "auprc"]
    assert [spec.name for spec in task.metrics][-6:] == [spec.name for spec in task.scans.metrics]
    model, sizes = task.build_model(), []
    for _, batch in data.evaluation("test"):
        scores = task.score(model, batch)
        assert scores["probability"].shape == (1, 2, 2)
        assert scores["psnr"].shape == (1,)
        _, logits = task.both(model, batch)
        expected = torch.softmax(logits, 1).mean(0)
        torch.testing.assert_close(scores["probability"][0, :, 0], expected)
        sizes.append(len(batch))
    assert set(sizes) == {1, 2}
    assert data.patients("test") == len(sizes)


def test_a_network_that_knows_has_an_auroc_of_one_and_a_classical_image_has_none(
    one: tuple[ChainToClass, ClassedDataset],
) -> None:
    task, data = one

    class Knows(torch.nn.Module):
        def forward(self, scans: Any, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
            # The spot is the maximum, so what is left of the disc is dark beside it.
            dark = (scans.target.sum((1, 2)) / (scans.target > 0.05).sum((1, 2)))[:, None] - 0.55
            return scans.target[:, None], 50.0 * torch.cat([dark, -dark], 1)

    auroc, psnr = task.metrics[0], next(spec for spec in task.metrics if spec.name == "psnr")
    rows = patient_rows(task.metrics, data.evaluation("test"), lambda batch: task.score(Knows(), batch))
    assert value_of(auroc, rows["auroc"]) == 1.0
    classical = patient_rows(
        task.metrics,
        data.evaluation("test"),
        lambda batch: task.score_images(task.baseline("zero_filled", None, batch), batch),
    )
    assert np.isnan(value_of(auroc, classical["auroc"]))
    assert value_of(psnr, classical["psnr"]) > 10.0


def test_a_site_s_temperature_is_the_classification_s(one: tuple[ChainToClass, ClassedDataset]) -> None:
    task, data = one
    model = task.build_model()
    ((_, batch), *_) = data.evaluation("test")
    warm = task.calibrated(Calibration(2.0))
    _, logits = task.both(model, batch)
    before, after = (each.score(model, batch)["scaled"] for each in (task, warm))
    assert torch.isnan(before[..., 1]).all()
    assert float(after[0, 0, 0]) == pytest.approx(float(torch.softmax(logits / 2.0, 1).mean(0).max()), rel=1e-5)
    # Fewer validation patients than ten make none.
    assert task.calibration(model, data.evaluation("validation")) is None


def test_slices_of_a_volume_are_examples_of_its_class_and_those_of_nothing_are_not(tmp_path: Path) -> None:
    rows = []
    for patient in range(4):
        image, _ = lungs(patient, 3)
        image[..., 2] = -1000
        save(tmp_path / f"p{patient}", image, None)
        rows.append((f"p{patient}", f"DOE{patient}", CLASSES[patient % 2]))
    write_table(tmp_path, rows)
    task = task_of(
        task={"images": ["{id}/ct"]}, acquisition={"kind": "ct", "geometry": GEOMETRY}, model={"kind": "learn"}
    )
    data = task.dataset("A", (tmp_path,))
    assert len(data) == 2 * data.patients("train")
    ((_, batch), *_) = data.evaluation("test")
    assert len(batch) == 2
    assert {"auroc", "psnr_lung"} <= {spec.name for spec in task.metrics}
    batch = data.batch([0, 1], np.random.default_rng(0))
    assert reached(task, batch, train=BOTH, weights={"reconstruction": 0.0, "diagnosis": 1.0}) == set(BOTH)  # type: ignore[arg-type]
    picture = task.illustrate(None, batch)
    assert picture.caption in CLASSES or "," in picture.caption


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
def test_a_step_and_an_evaluation_on_any_device(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    local = {"steps": 1, "batch": 2, "optimizer": "adam", "optimizer_state": "keep", "clip_norm": 1.0}
    folder = make_pictures(tmp_path / "data", {"A": 3}).of("A").data[0]
    _steps_and_evaluation(class_study(local=local), folder, device_named(device, monkeypatch), tmp_path)


# What a study says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ({"classifier": {"kind": "monai_unet"}}, "monai_unet names no class; take densenet"),
        ({"classes": ["a", "a"]}, "names a class twice"),
        ({"imbalance": "balanced"}, "imbalance"),
        ({"multi_label": True, "imbalance": "logit_adjusted"}, "logit_adjusted is for one class a patient"),
        ({"augment": [{"name": "RandGaussianNoised"}]}, "'RandGaussianNoised' does not only move voxels"),
        ({"mask": "seg"}, "mask"),
    ],
)
def test_a_section_that_does_not_fit_together(task: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        class_study(task=task)


def test_a_study_is_known_by_what_was_written() -> None:
    study = class_study()
    assert study_sha256(study) != study_sha256(class_study(task={"classifier": {"kind": "resnet", "preset": "small"}}))
    assert study.task.describe().startswith(
        "chain: simulated scans of images/{id} -> image of 32 x 32 pixels -> 2 classes by resnet"
    )


# A whole run and its release ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_in_two_phases_tells_spots_and_a_clinic_gets_probabilities(tmp_path: Path) -> None:
    sites = make_pictures(tmp_path / "data", {"A": 8, "B": 4})
    phases = [
        {"rounds": 1, "train": ["reconstruction"]},
        {"train": BOTH, "weights": {"reconstruction": 10.0, "diagnosis": 1.0}},
    ]
    study = class_study(
        task={"split": {"validation": 0.1, "test": 0.4}},
        local={"steps": 6, "batch": 6, "optimizer": "adam", "lr": 0.01, "optimizer_state": "keep"},
        schedule={"rounds": 3, "validate_every": 3, "phases": phases},
    )
    result = wardround.run(study, sites, tmp_path / "out", engine="local")
    federated, zero_filled = result.metrics["federated"]["mean"], result.metrics["zero_filled"]["mean"]
    assert federated["auroc"].value > 0.8
    assert federated["psnr"].value > 0
    assert zero_filled.get("auroc") is None
    page = result.report.read_text(encoding="utf-8")
    assert "Example reconstructions" in page
    assert "Worst test patient" in page
    model = tmp_path / "out" / "models" / "federated.safetensors"
    Image.fromarray(picture(1, 77)).save(tmp_path / "spot.png")
    found = wardround.predict(model, tmp_path / "spot.png", tmp_path / "predicted", site="A")
    (said,) = found.diagnoses
    assert sum(said.probabilities.values()) == pytest.approx(1.0)
    assert "scanned by the study's simulated scanner first (3× random, 2 coils, noise 0.005)." in said.said


def test_raw_data_of_several_slices_are_one_patient_s(tmp_path: Path) -> None:
    study = class_study()
    torch.manual_seed(3)
    network = build_task(study).build_model().eval()
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    save_file(tensors, path, metadata={"format": FORMAT, "study": study.model_dump_json()})
    np.save(tmp_path / "scan.npy", kspace_of(3, 2)[0])
    (said,) = wardround.predict(path, tmp_path / "scan.npy", tmp_path / "out").diagnoses
    assert list(said.probabilities) == list(CLASSES)
    assert "simulated" not in said.said
    with (tmp_path / "out" / "probabilities.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["patient"] == "scan"
