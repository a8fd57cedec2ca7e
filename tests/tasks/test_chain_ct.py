"""A chain that begins with sinograms: what is scanned and where, what the second network sees, a run, a clinic's CT."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from pydantic import ValidationError
from pydicom.uid import CTImageStorage
from safetensors.numpy import save_file
from scipy import ndimage
from tests.ct_files import setting, write_series
from tests.ct_hospitals import GEOMETRY, SIZE, make_ct_hospitals
from tests.devices import DEVICES, device_named
from tests.dicom_series import mr_series, seg_of
from tests.imaging.test_ct_projections import SHORT, scan, write_projections
from tests.laws.test_devices import _steps_and_evaluation
from tests.lungs import AS_DICOM, SPACING, ct_chain, lungs, make_lungs, save
from tests.outlines import make_outlines
from tests.tasks.test_chain import BOTH, chain_study, reached, write_study

import wardround
from wardround.errors import DataError, StudyError
from wardround.federation.release import FORMAT
from wardround.imaging.datasets.ct import Grid
from wardround.imaging.readers.cases import Case
from wardround.imaging.readers.labelled import read_image
from wardround.runs.explain import explain
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.tasks.build import build_task
from wardround.tasks.chain import Chain
from wardround.tasks.chain_ct import Hounsfield, windowed
from wardround.tasks.chained import ChainBatch, ChainDataset

EXAMPLES = Path(__file__).parents[2] / "examples"


def chain_of(root: Path, patients: int = 5, **changes: Any) -> tuple[Chain, ChainDataset]:
    sites = make_lungs(root, {"A": patients})
    task = build_task(ct_chain(**changes))
    assert isinstance(task, Chain)
    return task, task.dataset("A", sites.of("A").data)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Chain, ChainDataset]:
    return chain_of(tmp_path_factory.mktemp("one"))


def batch_of(data: ChainDataset, seed: int = 3) -> ChainBatch:
    return data.batch([0, 1], np.random.default_rng(seed))


def agreement(a: Any, b: Any) -> float:
    """Dice of two masks."""
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def thin(batch: ChainBatch) -> Any:
    """Where the image of a batch is nearer to lung than to tissue, away from the skin: (B, H, W)."""
    body = ndimage.binary_erosion(batch.scans.body.numpy() > 0, np.ones((1, 3, 3)))
    return (batch.scans.target.numpy() < 0.6) & body


# What is scanned ------------------------------------------------------------------------------------------------------


def test_a_scan_fits_its_image_and_the_mask_lies_on_the_lungs(one: tuple[Chain, ChainDataset]) -> None:
    _, data = one
    batch = batch_of(data)
    (part,) = batch.scans.parts  # type: ignore[attr-defined]
    assert part.data.shape == (2, 24, 48)
    assert batch.masks.shape == (2, 1, SIZE, SIZE)
    noise = (part.operator.A(part.target) - part.data).norm() / part.data.norm()
    assert 0.005 < noise < 0.1
    # Attenuation relative to water: 0.13 to 0.2 in the lungs, partial pixels apart.
    assert agreement(thin(batch), batch.masks[:, 0].numpy() > 0) > 0.93


def test_a_training_example_is_scanned_anew_and_one_of_evaluation_never(
    one: tuple[Chain, ChainDataset], tmp_path: Path
) -> None:
    _, data = one
    _, again = chain_of(tmp_path)
    same, other = (batch_of(data, seed).scans.parts[0].data for seed in (3, 4))  # type: ignore[attr-defined]
    assert torch.equal(same, batch_of(again, 3).scans.parts[0].data)  # type: ignore[attr-defined]
    assert not torch.equal(same, other)
    for (_, a), (_, b) in zip(data.evaluation("test"), again.evaluation("test"), strict=True):
        assert torch.equal(a.scans.parts[0].data, b.scans.parts[0].data)  # type: ignore[attr-defined]
    assert data.fingerprint() == again.fingerprint()


def test_images_are_changed_with_air_around_them(tmp_path: Path) -> None:
    """What a shift leaves empty is air, not water, and the mask moves along."""
    shift = {"name": "RandAffined", "prob": 1.0, "translate_range": [[8, 8], [0, 0]], "padding_mode": "zeros"}
    _, data = chain_of(tmp_path, task={"augment": [shift]})
    batch = batch_of(data)
    target = batch.scans.target
    assert float(target[:, :2].max()) < 0.05
    assert agreement(thin(batch), batch.masks[:, 0].numpy() > 0) > 0.9


def test_series_of_ct_train_as_the_same_voxels_in_nifti_do(tmp_path: Path) -> None:
    """Stored as whole numbers with a slope and an intercept, and the mask as a DICOM SEG."""
    for number in range(4):
        image, mask = lungs(number)
        whole, place = np.rint(image).clip(-1024, 3071), tmp_path / "dicom" / "A" / f"P{number}"
        save(tmp_path / "nifti" / "A" / f"P{number}", whole, mask)
        sides = {"spacing": (f"{SPACING:g}", f"{SPACING:g}"), "step": AS_DICOM[2, 2], "corner": (0.0, 0.0, 0.0)}
        headers = mr_series(place / "ct", whole + 1024, axes=((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)), **sides)
        for path in (place / "ct").iterdir():
            header = pydicom.dcmread(path)
            header.Modality, header.RescaleSlope, header.RescaleIntercept = "CT", 1, -1024
            header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = CTImageStorage
            header.save_as(path, enforce_file_format=True)
        seg_of(headers, mask[None] > 0, place / "lung.dcm")
    task = build_task(ct_chain())
    one, other = (task.dataset("A", (tmp_path / form / "A",)) for form in ("nifti", "dicom"))
    assert one.fingerprint() == other.fingerprint()
    first, second = (data.batch([0, 1], np.random.default_rng(0)) for data in (one, other))
    assert torch.equal(first.masks, second.masks)
    assert torch.equal(first.scans.target, second.scans.target)


def test_volumes_of_any_axes_lie_as_dicom_shows_them(tmp_path: Path) -> None:
    """Rows to the back: the spine is in the lower half, whatever the order of the file's axes."""
    image, mask = lungs(3)
    turned = np.array([[SPACING, 0, 0, 0], [0, SPACING, 0, 0], [0, 0, 5.0, 0], [0, 0, 0, 1.0]])
    frame = Hounsfield(Grid((2 * SIZE, 2 * SIZE), 6.0, 190.0))
    found = []
    for name, affine, turn in (
        ("dicom", AS_DICOM, lambda array: array),
        ("ras", turned, lambda array: array[::-1, ::-1].swapaxes(0, 1)),
    ):
        save(tmp_path / name, turn(image), turn(mask), affine)
        read = read_image(Case("p", "", (tmp_path / name / "ct.nii.gz",), tmp_path / name / "lung.nii.gz"))
        placed = frame.placed(read, "")
        assert placed.channels[0, SIZE:].max() > 200 > placed.channels[0, :SIZE].max()
        assert placed.space.spacing == (6.0, 6.0, 5.0)
        found.append(placed)
    np.testing.assert_array_equal(found[0].channels, found[1].channels)
    np.testing.assert_array_equal(found[0].labels, found[1].labels)  # type: ignore[arg-type]
    assert 0.1 < np.mean(found[0].labels) < 0.3  # type: ignore[arg-type]


def test_the_window_says_what_the_second_network_sees() -> None:
    hu = torch.tensor([-1024.0, -1000.0, -300.0, 400.0, 2000.0])
    seen = windowed(1.0 + hu / 1000.0, (-1000.0, 400.0))
    torch.testing.assert_close(seen, torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0]), atol=1e-5, rtol=0)
    task = build_task(ct_chain(task={"window": [0, 100]}))
    assert isinstance(task, Chain)
    assert task.scans.seen(torch.tensor([1.05])).tolist() == pytest.approx([0.0], abs=1e-5)


def test_the_loss_of_the_outlines_reaches_the_reconstruction_in_a_joint_phase_alone(
    one: tuple[Chain, ChainDataset],
) -> None:
    task, data = one
    batch = batch_of(data)
    assert reached(task, batch, train=BOTH, weights={"reconstruction": 0.0, "diagnosis": 1.0}) == set(BOTH)
    assert reached(task, batch, train=["diagnosis"]) == {"diagnosis"}
    assert reached(task, batch, train=["reconstruction"]) == {"reconstruction"}


def test_sites_of_unlike_scanners_are_pooled(tmp_path: Path) -> None:
    sites = make_lungs(tmp_path, {"A": 4, "B": 4})
    task = build_task(ct_chain())
    assert isinstance(task, Chain)
    parts = [task.dataset(name, sites.of(name).data) for name in "AB"]
    pooled = task.pooled(parts)
    batch = pooled.batch([0, len(parts[0]), 1], np.random.default_rng(0))
    model = task.build_model()
    assert torch.isfinite(task.loss(model, batch))
    alone = [
        task.reconstruct(model, ChainBatch(batch.scans.part(i, i + 1), batch.masks, batch.known)) for i in range(3)
    ]
    torch.testing.assert_close(task.reconstruct(model, batch), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_network_that_gives_the_truth_is_right_on_whole_volumes(one: tuple[Chain, ChainDataset]) -> None:
    task, data = one

    class Truth(torch.nn.Module):
        def forward(self, scans: Any, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
            return scans.target[:, None], self.logits

    network = Truth()
    for _, batch in data.evaluation("test"):
        network.logits = batch.masks * 2 - 1
        scores = task.score(network, batch)
        assert (float(scores["dice"]), float(scores["hd95"]), float(scores["rmse_hu"])) == (1.0, 0.0, 0.0)
        shown = task.illustrate(None, batch)
        assert shown.picture.shape == (320, 320, 3)


def test_a_volume_of_one_slice_is_measured_as_a_picture(tmp_path: Path) -> None:
    sites = make_lungs(tmp_path, {"A": 4}, slices=1)
    task = build_task(ct_chain())
    assert isinstance(task, Chain)
    data = task.dataset("A", sites.of("A").data)
    (_, batch), *_ = data.evaluation("test")
    assert batch.spacing == (5.0, 6.0, 6.0)
    scores = task.score(task.build_model(), batch)
    assert scores.keys() == {spec.name for spec in task.metrics}
    assert np.isfinite(float(scores["hd95"]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.slow
def test_a_step_and_an_evaluation_on_any_device(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    local = {"steps": 1, "batch": 2, "optimizer": "adam", "optimizer_state": "keep", "clip_norm": 1.0}
    folder = make_lungs(tmp_path / "data", {"A": 5}).of("A").data[0]
    _steps_and_evaluation(ct_chain(local=local), folder, device_named(device, monkeypatch), tmp_path)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": {"channels": 2}}, "task.channels is 2, and a scan of CT is of one"),
        ({"task": {"seen": "zero_filled"}}, "task.seen: zero_filled is none of CT; take fbp"),
        ({"task": {"size": [64, 64]}}, r"the geometry of site A has size \[32, 32\] and the task \[64, 64\]"),
        (
            {"model": {"kind": "redcnn", "preset": "tiny", "anatomy": {"dimension": 8}}},
            "model.anatomy: a chain takes no embeddings",
        ),
    ],
)
def test_a_study_that_does_not_fit(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError, match=says):
        build_task(ct_chain(**changes))


def test_what_is_of_one_modality_is_refused_in_the_other() -> None:
    with pytest.raises(StudyError, match=r"task\.window is of images in HU"):
        build_task(chain_study(task={"window": [-1000, 400]}))
    with pytest.raises(StudyError, match=r"task\.seen: fbp is none of MRI; take zero_filled"):
        build_task(chain_study(task={"seen": "fbp"}))
    with pytest.raises(ValidationError, match="give the lower end first"):
        ct_chain(task={"window": [400, -1000]})
    with pytest.raises(ValidationError, match="'zero_filled' is none of CT"):
        ct_chain(task={"evaluation": {"baselines": ["zero_filled"]}})


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda image: image + 1024, "wrong rescale: a CT volume is not in HU"),
        (lambda image: np.where(image > -500, image, 30), "wrong rescale"),
    ],
)
def test_values_that_are_no_hu_are_refused_without_a_name(tmp_path: Path, changed: Any, says: str) -> None:
    make_lungs(tmp_path, {"A": 4})
    image, mask = lungs(1)
    save(tmp_path / "A" / "DOE-01", changed(image).astype(np.int16), mask)
    task = build_task(ct_chain())
    with pytest.raises(DataError, match=says) as caught:
        task.dataset("A", (tmp_path / "A",))
    assert "DOE" not in str(caught.value)


def test_a_body_beyond_the_field_of_view_is_refused(tmp_path: Path) -> None:
    sites = make_lungs(tmp_path, {"A": 4})
    task = build_task(ct_chain(acquisition={"kind": "ct", "geometry": GEOMETRY | {"pixel": 6.0, "bin": 9.0}}))
    with pytest.raises(
        DataError, match=r"does not fit the field of view: it reaches 1\d\d mm .* the scanner sees 96 mm"
    ):
        task.dataset("A", sites.of("A").data)


def test_pictures_have_no_place_in_mm(tmp_path: Path) -> None:
    from PIL import Image

    for patient in range(4):
        folder = tmp_path / f"p{patient}"
        folder.mkdir()
        for name in ("ct", "lung"):
            Image.fromarray(np.full((32, 32), 7, np.uint8)).save(folder / f"{name}.png")
    with pytest.raises(DataError, match="does not say how large its voxels are"):
        build_task(ct_chain(task={"distances": "pixels"})).dataset("A", (tmp_path,))


# A whole run and its release ------------------------------------------------------------------------------------------


def test_check_says_what_is_scanned(tmp_path: Path) -> None:
    text = " ".join(explain(write_study(tmp_path / "study.yaml", ct_chain()), None, (), ()).split())
    for said in (
        "chain: simulated scans of ct -> image of 32 x 32 pixels -> outlines of structure by monai_unet",
        "fan_flat, 24 views, 100000 photons",
        "Matrices of the simulated scanners",
        "Compared with, nothing learned: fbp.",
    ):
        assert said in text


@pytest.mark.slow
def test_a_run_finds_lungs_in_images_that_it_reconstructed(tmp_path: Path) -> None:
    sites = make_lungs(tmp_path / "data", {"A": 8, "B": 4}, slices=1)
    study = ct_chain(
        task={"split": {"validation": 0.1, "test": 0.4}, "augment": "none"},
        local={"steps": 6, "batch": 2, "optimizer": "adam", "lr": 0.01, "optimizer_state": "keep"},
        schedule={"rounds": 3, "validate_every": 3},
    )
    result = wardround.run(study, sites, tmp_path / "out", engine="local")
    federated, fbp = result.metrics["federated"]["mean"], result.metrics["fbp"]["mean"]
    assert federated["dice"].value > 0.4
    assert federated["psnr"].value > 0 < fbp["psnr"].value
    assert fbp.get("dice") is None
    page = result.report.read_text(encoding="utf-8")
    assert "soft tissue" in page
    assert "Worst test patient" in page
    image, _ = lungs(7)
    save(tmp_path / "clinic", image, None)
    found = wardround.predict(
        tmp_path / "out" / "models" / "federated.safetensors", tmp_path / "clinic" / "ct.nii.gz", tmp_path / "predicted"
    )
    assert found.outlines[0].structures[0].voxels > 0


class Thin(torch.nn.Module):
    """Marks what is thinner than -400 HU, in images of the default window: a stand-in for a network."""

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        hu = (seen + 1.0) / 2.0 * 1400.0 - 1000.0
        return (-400.0 - hu) / 100.0


def released(folder: Path, **changes: Any) -> tuple[Study, Path]:
    """An untrained chain as `wardround run` writes it."""
    study = ct_chain(**changes)
    torch.manual_seed(3)
    model = build_task(study).build_model().eval()
    path = folder / "model.safetensors"
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"format": FORMAT, "study": study.model_dump_json()})
    return study, path


@pytest.mark.parametrize("affine", [AS_DICOM, np.diag([SPACING, SPACING, 5.0, 1.0])])
def test_outlines_and_hu_come_back_to_the_grid_of_the_image(affine: np.ndarray, tmp_path: Path) -> None:
    """The image that was scanned, on another grid, and what is thin in it, lie where they were."""
    image, mask = lungs(5)
    image, mask = (np.roll(each, 6, axis=1)[3:] for each in (image, mask))
    if affine is not AS_DICOM:
        image, mask = (np.ascontiguousarray(each[::-1, ::-1].swapaxes(0, 1)) for each in (image, mask))
    save(tmp_path, image, None, affine)
    task = build_task(ct_chain(task={"seen": "full"}))
    assert isinstance(task, Chain)
    model = task.build_model()
    model.diagnosis = Thin()
    read = read_image(Case("p", "", (tmp_path / "ct.nii.gz",)))
    found = task.predict(model, read)
    assert found.images is not None
    marked, hu = (read.space.restored(each[0]) for each in (found.marked, found.images))
    assert hu.shape == marked.shape == image.shape
    around = ndimage.binary_dilation(mask > 0, np.ones((5, 5, 1)))
    assert agreement(marked & around, mask > 0) > 0.93
    inside = np.abs(image - hu)[mask > 0]
    assert np.median(inside) < 20.0


def test_a_release_takes_nifti_and_no_array(tmp_path: Path) -> None:
    _, model = released(tmp_path)
    image, _ = lungs(4)
    save(tmp_path / "nifti", image, None)
    found = wardround.predict(model, tmp_path / "nifti" / "ct.nii.gz", tmp_path / "out", site="B")
    (done,) = found.outlines
    assert "simulated scanner first (fan_arc, 16 views, 30000 photons) and reconstructed: ct-image.nii.gz." in done.said
    made = nibabel.load(tmp_path / "out" / "ct-image.nii.gz")
    np.testing.assert_allclose(made.affine, AS_DICOM)
    hu = np.asarray(made.dataobj)
    assert made.shape == image.shape
    assert hu.min() >= -1000.5
    assert np.corrcoef(hu.ravel(), image.ravel())[0, 1] > 0.8
    np.save(tmp_path / "sinogram.npy", np.zeros((24, 48), np.float32))
    with pytest.raises(DataError, match="a chain of CT reads no raw data of this kind; give it images, which are"):
        wardround.predict(model, tmp_path / "sinogram.npy", tmp_path / "none")


def test_a_series_in_dicom_is_scanned_and_measured_projections_are_not_read(tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    _, model = released(tmp_path)
    series = write_series(tmp_path / "series", change=setting(PixelSpacing=["4", "4"]))
    (done,) = wardround.predict(model, series, tmp_path / "out").outlines
    assert done.output.name == "series.dcm"
    assert (tmp_path / "out" / "series-image.nii.gz").exists()
    raw = tmp_path / "raw"
    write_projections(raw, scan(SHORT), SHORT)
    with pytest.raises(DataError, match="a chain of CT reads no raw data of this kind"):
        wardround.predict(model, raw, tmp_path / "none")


def test_mri_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Images without HU, as those of MRI, do not become a chain of CT by their names."""
    sites = make_outlines(tmp_path, {"A": 4}, slices=1)
    for folder in (tmp_path / "A").iterdir():
        (folder / "image.nii.gz").rename(folder / "ct.nii.gz")
        (folder / "mask.nii.gz").rename(folder / "lung.nii.gz")
    with pytest.raises(DataError, match="not in HU"):
        build_task(ct_chain()).dataset("A", sites.of("A").data)


def test_patients_whose_values_are_no_hu_are_counted_where_a_site_goes_on_without_them(tmp_path: Path) -> None:
    sites = make_lungs(tmp_path, {"A": 6})
    image, mask = lungs(1)
    save(tmp_path / "A" / "DOE-01", image + 1024, mask)
    task = build_task(ct_chain())
    assert isinstance(task, Chain)
    task.set_aside_by(lambda site, total, aside: None)
    data = task.dataset("A", sites.of("A").data)
    assert sum(data.set_aside().values()) == 1
    assert sum(map(data.patients, ("train", "validation", "test"))) == 5


def test_the_example_s_script_makes_masks_that_its_study_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = importlib.import_module("luad_lungs")
    source = make_ct_hospitals(tmp_path / "in")["A"]
    assert script.convert(source, tmp_path / "out") == 7
    patient = tmp_path / "out" / "A" / "Doe-Jane-0"
    hu, lung = (np.asarray(nibabel.load(patient / f"{name}_0.nii.gz").dataobj)[..., 0] for name in ("ct", "lung"))
    inside = ndimage.binary_erosion(hu > -500, np.ones((3, 3)))
    assert 0.1 < lung.mean() < 0.3
    assert not (lung.astype(bool) & inside).any()
    task = build_task(load_study(EXAMPLES / "luad-chain.yaml"))
    assert isinstance(task, Chain)
    data = task.dataset("Pittsburgh", (tmp_path / "out" / "A",))
    (_, batch), *_ = data.evaluation("test")
    assert batch.masks.shape[2:] == (256, 256)
    assert 0.02 < float(batch.masks.mean()) < 0.3
