"""A site's raw data as examples: on one grid and one scale, undersampled as the study says, patients kept apart."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.raw_files import SIZE, coil_images, root_sum_of_squares, transformed, write_fastmri

from wardround.errors import DataError, StudyError
from wardround.imaging.acquisition.mri.coils import low_resolution_maps
from wardround.imaging.acquisition.mri.masks import sampling_mask
from wardround.imaging.acquisition.mri.operator import ifft2c
from wardround.imaging.datasets.raw import RawIndex
from wardround.imaging.datasets.split import SPLIT_NAMES
from wardround.imaging.readers.aside import Aside
from wardround.study.load import load_study
from wardround.tasks.mri_raw import RawDataset, RawMRIReconstruction
from wardround.wire.random import public_generator

MASK = {"family": "random", "acceleration": 2, "calibration": 0.25}


def task_of(**changes: Any) -> RawMRIReconstruction:
    sections: dict[str, Any] = {
        "name": "raw",
        "sites": {"A": {}},
        "acquisition": {"kind": "mri_raw", "mask": MASK},
        "task": {"size": [SIZE, SIZE]},
        "model": {"preset": "tiny", "image": "complex"},
    }
    for section, values in changes.items():
        sections[section] = values if section == "acquisition" else {**sections[section], **values}
    return RawMRIReconstruction(load_study(sections))


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Four patients of two slices, in units of their own."""
    for number in range(4):
        np.save(_made(tmp_path / "A") / f"{number}.npy", 1e-3 * (number + 1) * transformed(coil_images(number)))
    return tmp_path / "A"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _first(dataset: RawDataset) -> tuple[int, Any]:
    """The first training example: its patient and its batch."""
    example = dataset._train[0]
    return example.patient, dataset.scan(example, False)


def test_a_full_scan_is_undersampled_as_the_study_says(site: Path) -> None:
    """By hand: peak of the volume's root sum of squares, the patient's public mask, maps of the calibration lines."""
    dataset = task_of().dataset("A", site)
    patient, batch = _first(dataset)
    images = coil_images(patient)
    reference = root_sum_of_squares(images)
    mask = sampling_mask(load_study(_study()).acquisition.mask, (SIZE, SIZE), public_generator(0, "A", "mask", patient))
    expected = mask * transformed(images)[0] / reference.max()
    np.testing.assert_allclose(batch.kspace[0], expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(batch.target[0], reference[0] / reference.max(), atol=1e-5)
    np.testing.assert_array_equal(batch.mask[0], mask)
    torch.testing.assert_close(batch.maps, low_resolution_maps(batch.kspace, batch.mask))
    assert batch.head.mean() > 0.2


def _study() -> dict[str, Any]:
    return {
        "name": "raw",
        "sites": {"A": {}},
        "acquisition": {"kind": "mri_raw", "mask": MASK},
        "task": {"size": [32, 32]},
    }


def test_the_combined_reference_is_what_the_maps_make_of_the_full_scan(site: Path) -> None:
    dataset = task_of(acquisition={"kind": "mri_raw", "mask": MASK, "reference": "combined"}).dataset("A", site)
    patient, batch = _first(dataset)
    images = torch.from_numpy(coil_images(patient))
    peak = float(root_sum_of_squares(images.numpy()).max())
    expected = (batch.maps.conj() * images[:1]).sum(1).abs() / peak
    torch.testing.assert_close(batch.target, expected, atol=1e-5, rtol=0)
    assert (batch.target <= torch.from_numpy(root_sum_of_squares(images.numpy()))[0] / peak + 1e-5).all()


def test_a_flip_turns_images_and_what_is_measured_of_them(site: Path) -> None:
    dataset = task_of().dataset("A", site)
    example = dataset._train[0]
    plain, flipped = dataset.scan(example, False), dataset.scan(example, True)
    torch.testing.assert_close(flipped.target, torch.roll(plain.target.flip(-1), 1, -1))
    torch.testing.assert_close(flipped.mask, plain.mask)
    error = (ifft2c(flipped.kspace).abs().square().sum(1).sqrt() - flipped.target).norm() / flipped.target.norm()
    assert error < 0.5


def test_other_sizes_are_cropped_and_padded_in_image_space(site: Path) -> None:
    for size in ((24, 40), (40, 20)):
        dataset = task_of(task={"size": list(size)}).dataset("A", site)
        patient, batch = _first(dataset)
        assert batch.target.shape[1:] == size
        image, crop = root_sum_of_squares(coil_images(patient))[0], batch.target[0].numpy()
        rows, columns = min(size[0], SIZE), min(size[1], SIZE)
        inner = crop[size[0] // 2 - rows // 2 :, size[1] // 2 - columns // 2 :][:rows, :columns]
        outer = image[SIZE // 2 - rows // 2 :, SIZE // 2 - columns // 2 :][:rows, :columns]
        assert np.corrcoef(inner.ravel(), outer.ravel())[0, 1] > 1 - 1e-6
    with pytest.raises(DataError, match="too far from the study's size"):
        task_of(task={"size": [96, 96]}).dataset("A", site)


def test_patients_are_kept_apart_and_files_of_one_together(tmp_path: Path) -> None:
    for number in range(8):
        write_fastmri(tmp_path / "A" / f"{number}.h5", coil_images(number, 1), patient=f"P{number // 2}")
    dataset = task_of().dataset("A", tmp_path / "A")
    assert sum(dataset.patients(split) for split in SPLIT_NAMES) == 4
    owners = dataset.owners()
    assert len(owners) == 2 * dataset.patients("train")
    assert len(set(owners)) == dataset.patients("train")


def test_the_fingerprint_is_of_content_alone(site: Path, tmp_path: Path) -> None:
    before = task_of().dataset("A", site).fingerprint()
    shutil.move(site, tmp_path / "elsewhere")
    for path in sorted((tmp_path / "elsewhere").iterdir()):
        path.rename(path.with_name(f"renamed-{path.name}"))
    assert task_of().dataset("A", tmp_path / "elsewhere").fingerprint() == before
    one = tmp_path / "elsewhere" / "renamed-0.npy"
    np.save(one, 2 * np.load(one))
    assert task_of().dataset("A", tmp_path / "elsewhere").fingerprint() != before


class _Quarantine:
    def __init__(self) -> None:
        self.aside: Sequence[Aside] = ()

    def __call__(self, site: str, total: int, aside: Sequence[Aside]) -> None:
        assert total == 4
        self.aside = aside


def test_a_patient_who_cannot_be_used_is_set_aside(site: Path) -> None:
    (site / "2.npy").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"site A: .*not a NumPy array"):
        task_of().dataset("A", site)
    task, quarantine = task_of(), _Quarantine()
    task.set_aside_by(quarantine)
    dataset = task.dataset("A", site)
    assert [one.patient for one in quarantine.aside] == ["2"]
    assert "2.npy" not in quarantine.aside[0].reason
    assert sum(dataset.set_aside().values()) == 1
    assert sum(dataset.patients(split) for split in SPLIT_NAMES) == 3


OWN = {"kind": "mri_raw", "sampling": "own", "reference": "file"}


def test_files_that_were_undersampled_use_their_own_mask_and_reference(tmp_path: Path) -> None:
    mask = np.zeros(SIZE)
    mask[::3], mask[12:20] = 1, 1
    for number in range(3):
        write_fastmri(tmp_path / "A" / f"{number}.h5", coil_images(number), mask=mask)
    dataset = task_of(acquisition=OWN, task={"size": [24, SIZE]}).dataset("A", tmp_path / "A")
    patient, batch = _first(dataset)
    np.testing.assert_array_equal(batch.mask[0], np.repeat(mask[None], 24, 0))
    reference = root_sum_of_squares(coil_images(patient))
    peak = reference[:, 4:28].max()
    np.testing.assert_allclose(batch.target[0], reference[0, 4:28] / peak, rtol=1e-5, atol=1e-6)
    rows = transformed(coil_images(patient)[0][:, 4:28]) * mask / peak
    np.testing.assert_allclose(batch.kspace[0], rows, atol=1e-4 * np.abs(rows).max())
    flipped = dataset.scan(dataset._train[0], True)
    np.testing.assert_array_equal(flipped.mask[0], np.roll(np.repeat(mask[None], 24, 0)[:, ::-1], 1, 1))


@pytest.mark.parametrize(
    ("acquisition", "kept", "message"),
    [
        (OWN, {}, "fully sampled, and acquisition.sampling is `own`"),
        ({"kind": "mri_raw"}, {"mask": True}, "undersampled as measured"),
        (OWN, {"mask": True, "reference": False}, "hold no reference image"),
    ],
)
def test_files_of_the_other_sampling_are_refused(
    acquisition: dict[str, Any], kept: dict[str, Any], message: str, tmp_path: Path
) -> None:
    lines = (np.arange(SIZE) % 3 == 0) | (np.abs(np.arange(SIZE) - 16) < 4)
    options = {**kept, **({"mask": lines} if kept.get("mask") else {})}
    for number in range(3):
        write_fastmri(tmp_path / "A" / f"{number}.h5", coil_images(number), **options)
    with pytest.raises(DataError, match=message):
        task_of(acquisition=acquisition).dataset("A", tmp_path / "A")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"acquisition": {"kind": "mri_raw", "sampling": "own"}}, "sampling: own has no full scan"),
        ({"acquisition": {**OWN, "mask": MASK}}, "each file's own mask"),
        ({"acquisition": {"kind": "mri_raw", "maps": "espirit"}}, "espirit needs 6 calibration lines, and 3 of 32"),
        ({"acquisition": {"kind": "mri_raw", "reference": "file"}}, "makes its reference of the full scan"),
        ({"acquisition": {**OWN, "reference": "none"}}, "come without true images"),
        ({"task": {"contrasts": ["flair"]}}, "task.contrasts names image files"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        task_of(**changes)


@pytest.mark.parametrize("acquisition", [OWN, {"kind": "mri_raw", "mask": MASK}])
def test_a_study_with_every_default_written_out_is_read_again(acquisition: dict[str, Any]) -> None:
    """So a released model's file holds it."""
    study = load_study({**_study(), "acquisition": acquisition})
    assert load_study(study.model_dump(mode="json")) == study


def test_an_unseen_site_can_undersample_the_test_patients_of_others(site: Path) -> None:
    sites = {"A": {}, "B": {"role": "unseen", "scans": ["A"]}}
    sites["B"]["acquisition"] = {"kind": "mri_raw", "mask": {**MASK, "acceleration": 3}}
    task = task_of(sites=sites)
    visits = task.visits("B", {"A": site})
    assert isinstance(visits, RawDataset)
    assert visits.patients("test") == task.dataset("A", site).patients("test")
    ((_, batch),) = list(visits.evaluation("test"))
    assert batch.mask.mean() == pytest.approx(round(SIZE / 3) / SIZE)


def test_an_index_without_reference_says_so_by_zeros(tmp_path: Path) -> None:
    from wardround.imaging.readers.raw.folder import RawFolder
    from wardround.study.tasks import Slices, Split

    lines = (np.arange(SIZE) % 3 == 0) | (np.abs(np.arange(SIZE) - 16) < 4)
    for number in range(3):
        write_fastmri(tmp_path / f"{number}.h5", coil_images(number), mask=lines, reference=False)
    index = RawIndex(
        RawFolder(tmp_path, "A"), size=(SIZE, SIZE), slices=Slices(), split=Split(), seed=0, sampling="own",
        reference=False,
    )  # fmt: skip
    found = index.raw(index.examples("train")[0])
    assert not found.reference.any()
    assert found.head.any()
    assert np.abs(found.kspace).max() > 0
