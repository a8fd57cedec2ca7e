"""`wardround predict` with models of images: what a clinic puts in, what it gets, and what is wrong with an input."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from typer.testing import CliRunner

import wardround
from tests.diagnoses import CLASSES, diagnosis_study, make_diagnoses
from tests.dicom_series import MR_IMAGE, mr_series
from tests.outlines import SIZE, blob, make_outlines, outline_study
from wardround.cli import app
from wardround.errors import DataError, MissingExtra, StudyError
from wardround.federation.release import FORMAT
from wardround.imaging.readers.cases import Case
from wardround.imaging.readers.labelled import read_image
from wardround.runs.inputs import find_inputs
from wardround.runs.releases import ReleasedModel
from wardround.study.schema import Study
from wardround.tasks.build import build_task
from wardround.tasks.predictions import Masks
from wardround.tasks.temperature import Calibration, keep_calibration

STRUCTURES = {"organ": [1, 2], "tumour": [2]}


def release(path: Path, study: Study) -> Path:
    """A model as `wardround run` writes it, untrained; it marks about a third of each structure's voxels."""
    torch.manual_seed(3)
    model = build_task(study).build_model().eval()
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": FORMAT, "study": study.model_dump_json()})
    return path


def segmenter(folder: Path, **task: Any) -> tuple[Study, Path]:
    study = outline_study({"A": {}}, task={"structures": STRUCTURES, **task})
    return study, release(folder / "model.safetensors", study)


def expected(study: Study, model: Path, image: Any) -> np.ndarray:
    """What the task marks, by its own way of evaluating a whole image."""
    task: Any = build_task(study)
    network = ReleasedModel.opened(model).network(task.build_model, None, None)
    said = task.predict(network, image)
    assert isinstance(said, Masks)
    return said.marked


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


# Segmentation ---------------------------------------------------------------------------------------------------------


def test_a_folder_of_patients_gives_masks_where_the_images_lie(tmp_path: Path) -> None:
    """The masks are those of an evaluation, turned back to the axes of files that run to the left and back."""
    study, model = segmenter(tmp_path)
    turned = np.array([[0, -1.0, 0, 20], [-2.0, 0, 0, 7], [0, 0, 3.0, -5], [0, 0, 0, 1]])
    folders = tmp_path / "in"
    for number in range(2):
        image, mask = blob(number, 3)
        for name, array in (("image", image), ("mask", mask)):
            path = folders / f"P{number}" / f"{name}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array[:, :20], turned), path)
    done = run(model, folders, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "Research use only" in done.output
    # What came of it says which release it was.
    used = json.loads((tmp_path / "out" / "model.json").read_text())
    known = ReleasedModel.opened(model).used
    assert used == {"model_sha256": known.sha256, "release": known.short, "study": study.name, "number": None}
    assert f"By release {used['release']} of study {study.name}" in done.output
    task: Any = build_task(study)
    data = task.dataset("A", (folders,))
    network = ReleasedModel.opened(model).network(task.build_model, None, None)
    evaluated = {name: batch for split in ("train", "validation", "test")
                 for name, (_, batch) in zip(data.names(split), data.evaluation(split), strict=True)}  # fmt: skip
    table = rows(tmp_path / "out" / "volumes.csv")
    for number in range(2):
        name = f"P{number}"
        made = nibabel.load(tmp_path / "out" / f"{name}.nii.gz")
        np.testing.assert_allclose(made.affine, turned)
        assert made.shape == (SIZE, 20, 3)
        assert made.get_data_dtype() == np.uint8
        logits = task.logits(network, evaluated[name])
        marked = (logits > 0).permute(1, 2, 3, 0).numpy()
        assert 0 < marked.mean() < 1
        labels = np.where(marked[1], 2, marked[0])
        # Its axes run to the back and left: (right, front, head) of the array are (-second, -first, third) of the file.
        np.testing.assert_array_equal(np.asarray(made.dataobj), labels[::-1, ::-1].swapaxes(0, 1))
        for structure, which in zip(STRUCTURES, marked, strict=True):
            (row,) = (row for row in table if (row["patient"], row["structure"]) == (name, structure))
            assert int(row["voxels"]) == which.sum()
            assert float(row["volume_ml"]) == pytest.approx(which.sum() * 6 / 1000, abs=1e-4)
        with Image.open(tmp_path / "out" / "overlays" / f"{name}.png") as picture:
            assert picture.size == (round(512 * 20 / 64), 512 + 32)
            colours = {colour for _, colour in picture.getcolors(1 << 20) or []}
        assert {(230, 159, 0), (86, 180, 233)} <= colours


def test_labels_of_structures_that_overlap() -> None:
    masks = Masks(("organ", "tumour"), np.array([[[True, True, False]], [[False, True, False]]]))
    assert masks.labels().tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("given", ["file", "patient"])
def test_one_patient_is_a_file_or_a_folder(given: str, tmp_path: Path) -> None:
    _, model = segmenter(tmp_path)
    sites = make_outlines(tmp_path / "in", {"A": 2}, slices=1)
    patient = sites.of("A").data[0] / "DOE-01"
    source = patient / "image.nii.gz" if given == "file" else patient
    found = wardround.predict(model, source, tmp_path / "out")
    assert not found.failed
    (one,) = found.outlines
    assert one.output.name == ("image.nii.gz" if given == "file" else "DOE-01.nii.gz")
    assert [each.name for each in one.structures] == list(STRUCTURES)
    assert one.overlay.is_file()


def test_pictures_side_by_side(tmp_path: Path) -> None:
    _, model = segmenter(tmp_path, distances="pixels")
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(blob(number, 1)[0][..., 0]).save(folder / f"eye{number}.png")
    found = wardround.predict(model, folder, tmp_path / "out")
    assert [one.output.name for one in found.outlines] == ["eye0.png", "eye1.png"]
    with Image.open(tmp_path / "out" / "eye0.png") as labels:
        assert labels.size == (SIZE, SIZE)
    assert {row["volume_ml"] for row in rows(tmp_path / "out" / "volumes.csv")} == {""}


def test_what_is_damaged_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    _, model = segmenter(tmp_path)
    folder = make_outlines(tmp_path / "in", {"A": 3}, slices=1).of("A").data[0]
    (folder / "DOE-00" / "image.nii.gz").write_bytes(b"damaged")
    done = run(model, folder, tmp_path / "absent", "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert "2 of 4 inputs could not be used" in done.stderr
    assert "an image file is damaged or not NIfTI" in done.stderr
    assert "DOE-00" in done.stderr
    assert "the input does not exist" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == ["DOE-01.nii.gz", "DOE-02.nii.gz"]
    assert {row["patient"] for row in rows(tmp_path / "out" / "volumes.csv")} == {"DOE-01", "DOE-02"}


def test_a_model_of_two_files_names_a_patient_who_lacks_one(tmp_path: Path) -> None:
    _, model = segmenter(tmp_path, images=["image", "t1"], channels=2)
    folder = make_outlines(tmp_path / "in", {"A": 2}, slices=1).of("A").data[0]
    (folder / "DOE-00" / "t1.nii.gz").write_bytes((folder / "DOE-00" / "image.nii.gz").read_bytes())
    found = wardround.predict(model, folder, tmp_path / "out")
    assert [one.patient for one in found.outlines] == ["DOE-00"]
    (failure,) = found.failed
    assert (failure.patient, "lacks the file 't1'" in failure.reason) == ("DOE-01", True)
    with pytest.raises(DataError, match="an image has 1 channels, and the study's have 2"):
        wardround.predict(model, folder / "DOE-00" / "image.nii.gz", tmp_path / "out")


def test_what_does_not_fit_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    study, model = segmenter(tmp_path)
    folder = make_outlines(tmp_path / "in", {"A": 2}, slices=1).of("A").data[0]
    image = folder / "DOE-00" / "image.nii.gz"
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, says in (
        ((folder, tmp_path / "out.nii.gz"), "give a folder as the output"),
        ((folder / "DOE-00", folder / "DOE-01", folder / "DOE-00"), "choose another folder"),
        ((folder, tmp_path / "out", "--dose", "0.5"), "--dose: this model does not reconstruct (segmentation)"),
        ((image, folder / "DOE-01" / "image.nii.gz", tmp_path / "out"), "several inputs have one name"),
        ((empty, tmp_path / "out"), "neither files that match {patient}/image"),
        ((folder, tmp_path / "out", "--site", "Z"), "has no such site, only A"),
        ((folder,), "give one input and the output"),
    ):
        done = run(model, *arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert says in done.stderr, (arguments, done.stderr)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in (folder / "DOE-00").iterdir()) == ["image.nii.gz", "mask.nii.gz"]
    with pytest.raises(StudyError, match="does not reconstruct images"):
        wardround.reconstruct(model, image, tmp_path / "out.nii.gz")
    assert study.task.kind == "segmentation"


# DICOM ----------------------------------------------------------------------------------------------------------------


def test_a_dicom_series_gives_a_seg_that_lies_on_it(tmp_path: Path) -> None:
    highdicom = pytest.importorskip("highdicom")
    study, model = segmenter(tmp_path)
    array = blob(1, 4)[0][:, :24]
    slices = mr_series(tmp_path / "scan", array)
    found = wardround.predict(model, tmp_path / "scan", tmp_path / "out")
    (one,) = found.outlines
    assert one.output == tmp_path / "out" / "scan.dcm"
    seg = highdicom.seg.segread(one.output)
    assert seg.FrameOfReferenceUID == slices[0].FrameOfReferenceUID
    assert seg.ContentDescription == f"{found.release.short}, study {study.name}"
    assert (seg.StudyInstanceUID, seg.PatientID) == (slices[0].StudyInstanceUID, "PAT-7731")
    assert seg.SeriesInstanceUID != slices[0].SeriesInstanceUID
    assert [seg.get_segment_description(number).segment_label for number in (1, 2)] == list(STRUCTURES)
    uids = [str(header.SOPInstanceUID) for header in slices]
    referenced = {
        str(item.ReferencedSOPInstanceUID) for item in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    }
    assert referenced <= set(uids)
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == slices[0].SeriesInstanceUID
    masks = seg.get_pixels_by_source_instance(uids, ignore_spatial_locations=True, assert_missing_frames_are_empty=True)
    # The same voxels as NIfTI, whose affine says where they lie, give the same masks.
    opened = find_inputs(tmp_path / "scan", build_task(study).patterns())  # type: ignore[attr-defined]
    read = opened.patients["scan"][0].read()
    assert read.series is not None
    assert nibabel.aff2axcodes(read.series.affine) == ("P", "L", "S")
    nibabel.save(nibabel.Nifti1Image(array, read.series.affine), tmp_path / "same.nii.gz")
    wardround.predict(model, tmp_path / "same.nii.gz", tmp_path / "nifti")
    marked = expected(study, model, read.image)
    in_file = read.image.space.restored(marked)
    assert masks.shape == (4, SIZE, 24, 2)
    np.testing.assert_array_equal(masks.astype(bool), np.moveaxis(in_file, (0, 3), (3, 0)))
    labels = np.where(in_file[1], 2, in_file[0])
    np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "nifti" / "same.nii.gz").dataobj), labels)
    assert one.structures[0].volume_ml == pytest.approx(in_file[0].sum() * 1.5 * 1.25 * 3 / 1000)


def test_folders_of_dicom_as_a_hospital_trained_on_them(tmp_path: Path) -> None:
    """What is outlined lies on the first channel's series, and is read back as a mask of training."""
    pytest.importorskip("highdicom")
    study, model = segmenter(tmp_path, images=["flair", "t1"], channels=2)
    for number in range(2):
        folder, (image, _) = tmp_path / "in" / f"P{number}", blob(number, 3)
        headers = mr_series(folder / "flair", image)
        mr_series(folder / "t1", image[::-1], frame=headers[0].FrameOfReferenceUID)
    found = wardround.predict(model, tmp_path / "in", tmp_path / "out")
    assert [one.output.name for one in found.outlines] == ["P0.dcm", "P1.dcm"]
    for one in found.outlines:
        case = Case("", "", (one.source / one.patient / "flair", one.source / one.patient / "t1"), one.output)
        read = read_image(case)
        marked = expected(study, model, read)
        assert 0 < marked.mean() < 1
        for number, mask in enumerate(marked, 1):
            values = [number, *(value for value, numbers in read.combined.items() if number in numbers)]
            np.testing.assert_array_equal(np.isin(read.labels, values), mask)  # type: ignore[arg-type]


def test_a_series_that_lacks_a_slice_is_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    _, model = segmenter(tmp_path)
    mr_series(tmp_path / "scan", blob(1, 5)[0], leave_out=2)
    done = run(model, tmp_path / "scan", tmp_path / "out")
    assert done.exit_code == 2
    assert "1 of 5 slices of a series are missing" in done.stderr.split("\n")[0]
    assert "MUELLER" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"SOPClassUID": f"{MR_IMAGE}.1"}, "enhanced multi-frame MR"),
        ({"Modality": "US"}, r"mixes MR with files|neither MR nor CT"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "stored inverted"),
        ({"SeriesInstanceUID": "1.2.3"}, "2 series are mixed"),
        ({"FrameOfReferenceUID": ""}, "no FrameOfReferenceUID"),
    ],
)
def test_series_that_cannot_be_used(change: dict[str, str], says: str, tmp_path: Path) -> None:
    pytest.importorskip("highdicom")
    _, model = segmenter(tmp_path)
    mr_series(tmp_path / "scan", blob(1, 3)[0])
    path = sorted((tmp_path / "scan").iterdir())[1]
    header = pydicom.dcmread(path)
    for keyword, value in change.items():
        setattr(header, keyword, value)
    header.save_as(path)
    with pytest.raises(DataError, match=says):
        wardround.predict(model, tmp_path / "scan", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_library_a_series_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = segmenter(tmp_path)
    mr_series(tmp_path / "scan", blob(1, 2)[0])
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(MissingExtra, match=r"pip install 'wardround\[seg\]'"):
        wardround.predict(model, tmp_path / "scan", tmp_path / "out")


# Classification -------------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_gives_probabilities(tmp_path: Path) -> None:
    study = diagnosis_study({"A": {}})
    model = release(tmp_path / "model.safetensors", study)
    folder = make_diagnoses(tmp_path / "in", {"A": (2, 1, 1)}).of("A").data[0]
    (folder / "labels.csv").write_text((folder / "labels.csv").read_text().replace(",label", ",unsaid"))
    found = wardround.predict(model, folder, tmp_path / "out")
    assert found.table == tmp_path / "out" / "probabilities.csv"
    table = rows(found.table)
    assert len(table) == 5
    images: dict[str, list[np.ndarray]] = {}
    task: Any = build_task(study)
    network = ReleasedModel.opened(model).network(task.build_model, None, None)
    for row in table:
        values = np.array([float(row[name]) for name in CLASSES])
        alone = task.predict(network, read_image(Case("", "", (folder / "images" / f"{row['image']}.png",))))
        np.testing.assert_allclose(values, alone.values, atol=1e-6)
        assert values.sum() == pytest.approx(1.0, abs=1e-5)
        assert row["called"] == CLASSES[int(values.argmax())]
        images.setdefault(row["patient"], []).append(values)
    for row in rows(tmp_path / "out" / "patients.csv"):
        mean = np.mean(images[row["patient"]], axis=0)
        np.testing.assert_allclose([float(row[name]) for name in CLASSES], mean, atol=2e-6)
    assert len(found.diagnoses) == 4
    assert set(found.diagnoses[0].probabilities) == set(CLASSES)
    # Without the table, and without the folder of the study's pattern, each picture is another patient's.
    beside = wardround.predict(model, folder / "images", tmp_path / "beside")
    assert [one.patient for one in beside.diagnoses] == sorted(row["image"] for row in table)
    assert not (tmp_path / "beside" / "patients.csv").exists()


def test_a_site_s_temperature_calibrates_its_probabilities(tmp_path: Path) -> None:
    """Logits over a temperature: the log of a ratio of two probabilities is divided by it."""
    model = release(tmp_path / "model.safetensors", diagnosis_study({"A": {}}))
    picture = next((make_diagnoses(tmp_path / "in", {"A": (1, 1, 1)}).of("A").data[0] / "images").iterdir())
    keep_calibration(tmp_path / "A" / "model", Calibration(4.0))
    found = [wardround.predict(model, picture, tmp_path / "out", site=site) for site in (None, "A")]
    assert [each.temperature for each in found] == [None, 4.0]
    plain, calibrated = (each.diagnoses[0].whole.values for each in found)
    np.testing.assert_allclose(np.log(plain[0] / plain[1]), 4 * np.log(calibrated[0] / calibrated[1]), rtol=1e-4)
    assert calibrated.max() < plain.max()


def test_names_of_a_table_stay_in_the_folder(tmp_path: Path) -> None:
    _, model = segmenter(tmp_path, images=["{id}"], table={"file": "whose.csv"}, distances="pixels")
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):
        Image.fromarray(blob(1, 1)[0][..., 0]).save(folder / f"{name}.png")
    (folder / "whose.csv").write_text("image,patient\na,../../x\nb,../../x\n")
    found = wardround.predict(model, folder, tmp_path / "out")
    assert [one.output.parent for one in found.outlines] == [tmp_path / "out"] * 2
    assert not (tmp_path / "x").exists()
