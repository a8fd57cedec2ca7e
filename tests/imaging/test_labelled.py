"""Images with masks: which files belong together, and what is read of them."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wardround.errors import DataError
from wardround.imaging.readers.aside import refuse
from wardround.imaging.readers.cases import Case, Patterns, sort_cases
from wardround.imaging.readers.labelled import read_case
from wardround.study.images import CaseTable


def find_cases(source: Path | list[Path], site: str, patterns: Patterns) -> dict[str, list[Case]]:
    """The images of a site by patient, of whom none may be set aside."""
    found = sort_cases(source, site, patterns)
    refuse(site, len(found.cases) + len(found.aside), found.aside)
    return found.cases


AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def picture(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def volume(seed: int = 0, shape: tuple[int, ...] = (6, 5, 4)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, shape).astype(np.int16)


# Which files belong together ------------------------------------------------------------------------------------------


def ids(cases: dict[str, list[Case]]) -> dict[str, list[str]]:
    return {patient: [case.id for case in of] for patient, of in cases.items()}


def test_a_folder_a_patient(tmp_path: Path) -> None:
    for patient in ("P2", "P1"):
        for name in ("flair", "t1ce", "seg"):
            nifti(tmp_path / patient / f"{name}.nii.gz", volume())
    nifti(tmp_path / ".hidden" / "flair.nii.gz", volume())
    cases = find_cases(tmp_path, "A", Patterns(("flair", "t1ce"), "seg"))
    assert list(cases) == ["P1", "P2"]
    (case,) = cases["P1"]
    assert [path.name for path in case.images] == ["flair.nii.gz", "t1ce.nii.gz"]
    assert case.mask == tmp_path / "P1" / "seg.nii.gz"


def test_brats_and_decathlon(tmp_path: Path) -> None:
    nifti(tmp_path / "b" / "B1" / "B1_t1ce.nii.gz", volume())
    nifti(tmp_path / "b" / "B1" / "B1_seg.nii.gz", volume())
    brats = find_cases(tmp_path / "b", "A", Patterns(("{patient}/{patient}_t1ce",), "{patient}/{patient}_seg"))
    assert list(brats) == ["B1"]
    for name in ("hippo_1", "hippo_2"):
        nifti(tmp_path / "m" / "imagesTr" / f"{name}.nii.gz", volume())
        nifti(tmp_path / "m" / "labelsTr" / f"{name}.nii.gz", volume())
    decathlon = find_cases(tmp_path / "m", "A", Patterns(("imagesTr/{patient}",), "labelsTr/{patient}"))
    assert list(decathlon) == ["hippo_1", "hippo_2"]


def test_several_pictures_of_a_person(tmp_path: Path) -> None:
    for eye in ("1", "2"):
        picture(tmp_path / "P" / f"{eye}.jpg", np.zeros((4, 4, 3), np.uint8))
        picture(tmp_path / "P" / f"{eye}_vessels.png", np.zeros((4, 4), np.uint8))
    cases = find_cases(tmp_path, "A", Patterns(("{patient}/{id}.jpg",), "{patient}/{id}_vessels"))
    assert ids(cases) == {"P": ["1", "2"]}


def skin(folder: Path, rows: list[tuple[str, str]], images: list[str]) -> Patterns:
    for name in images:
        picture(folder / "images" / f"{name}.jpg", np.zeros((4, 4, 3), np.uint8))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "lesion"), *rows])
    return Patterns(("images/{id}",), None, CaseTable(patient="lesion"))


def test_a_table_says_whose_each_image_is(tmp_path: Path) -> None:
    patterns = skin(tmp_path, [("i1", "L1"), ("i2", "L1"), ("i3", "L0")], ["i1", "i2", "i3"])
    assert ids(find_cases(tmp_path, "A", patterns)) == {"L0": ["i3"], "L1": ["i1", "i2"]}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("i1", "L1"), ("i1", "L2"), ("i2", "L3")], "labels.csv names an image a second time"),
        ([("i1", "L1")], "an image has no row in labels.csv"),
        ([("i1", "L1"), ("i2", "L1"), ("i9", "L2")], "a row of labels.csv has no image"),
        ([("i1", ""), ("i2", "L1")], "a row of labels.csv names no image, or no patient"),
    ],
)
def test_a_table_that_does_not_fit(tmp_path: Path, rows: list[tuple[str, str]], says: str) -> None:
    patterns = skin(tmp_path, rows, ["i1", "i2"])
    with pytest.raises(DataError, match=says) as caught:
        find_cases(tmp_path, "A", patterns)
    assert "L1" not in str(caught.value)


def test_an_image_without_its_mask_is_counted_and_not_named(tmp_path: Path) -> None:
    for patient in ("DOE", "ROE"):
        nifti(tmp_path / patient / "flair.nii.gz", volume())
    nifti(tmp_path / "ROE" / "seg.nii.gz", volume())
    with pytest.raises(DataError, match="site A: an image lacks the file 'seg'") as caught:
        find_cases(tmp_path, "A", Patterns(("flair",), "seg"))
    assert "DOE" not in str(caught.value)
    assert caught.value.detail == "DOE"
    found = sort_cases(tmp_path, "A", Patterns(("flair",), "seg"))
    assert list(found.cases) == ["ROE"]
    assert [one.patient for one in found.aside] == ["DOE"]


@pytest.mark.parametrize(
    ("rows", "kept", "aside"),
    [
        ([("i1", "L1"), ("i1", "L2"), ("i2", "L3")], {"L3": ["i2"]}, ["L1", "L2"]),  # it may be of either
        ([("i2", "L1")], {"L1": ["i2"]}, [""]),
        ([("i1", "L1"), ("i2", "L2"), ("i9", "L2")], {"L1": ["i1"]}, ["L2"]),
        ([("i1", ""), ("i2", "L1")], {"L1": ["i2"]}, [""]),
        ([("", "L1"), ("i1", "L1"), ("i2", "L2")], {"L2": ["i2"]}, ["L1"]),
    ],
)
def test_a_patient_is_set_aside_whole_and_once(
    tmp_path: Path, rows: list[tuple[str, str]], kept: dict[str, list[str]], aside: list[str]
) -> None:
    found = sort_cases(tmp_path, "A", skin(tmp_path, rows, ["i1", "i2"]))
    assert ids(found.cases) == kept
    assert [one.patient for one in found.aside] == aside


def test_nothing_matches_and_twice_the_same(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file in its data folder matches \\{patient\\}/flair"):
        find_cases(tmp_path, "A", Patterns(("flair",)))
    nifti(tmp_path / "P" / "flair.nii.gz", volume())
    nifti(tmp_path / "P" / "flair.nii", volume())
    with pytest.raises(DataError, match="several files of an image match"):
        find_cases(tmp_path, "A", Patterns(("flair",)))
    nifti(tmp_path / "two" / "P" / "t1.nii.gz", volume())
    nifti(tmp_path / "one" / "P" / "t1.nii.gz", volume())
    with pytest.raises(DataError, match="1 patients are in two of its data folders"):
        find_cases([tmp_path / "one", tmp_path / "two"], "A", Patterns(("t1",)))


# What is read ---------------------------------------------------------------------------------------------------------

AXES = st.permutations(range(3))
SIGNS = st.tuples(*[st.sampled_from((-1.0, 1.0))] * 3)


@given(AXES, SIGNS)
def test_axes_run_to_the_right_front_and_head_and_back_again(axes: list[int], signs: tuple[float, ...]) -> None:
    """However a file's axes lie, the array is the same anatomy; `restored` gives the file's own order."""
    import tempfile

    affine = np.eye(4)
    affine[:3, :3] = 0.0
    for column, (row, sign) in enumerate(zip(axes, signs, strict=True)):
        affine[row, column] = sign * (column + 1.0)
    array = volume()
    with tempfile.TemporaryDirectory() as folder:
        path = nifti(Path(folder) / "P" / "flair.nii.gz", array, affine)
        read = read_case(Case("P", "", (path,), path), "A")
    voxel = (1, 2, 3)
    assert read.space.spacing == tuple(float(axes.index(axis) + 1) for axis in range(3))
    index = []
    for axis in range(3):
        column = axes.index(axis)
        at = voxel[column]
        index.append(at if signs[column] > 0 else array.shape[column] - 1 - at)
    assert read.channels[(0, *index)] == array[voxel]
    assert np.array_equal(read.space.restored(read.channels)[0], array)
    assert read.labels is not None
    assert np.array_equal(read.space.restored(read.labels), array)


def test_channels_last_and_several_files(tmp_path: Path) -> None:
    four = nifti(tmp_path / "four.nii.gz", volume(shape=(6, 5, 4, 2)))
    one = nifti(tmp_path / "one.nii.gz", volume(1))
    read = read_case(Case("P", "", (four, one)), "A")
    assert read.channels.shape == (3, 6, 5, 4)
    assert read.channels.dtype == np.uint8
    assert read.space.spacing == (2.0, 2.0, 3.0)


def test_pictures_in_colour_and_grey(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (4, 6, 3)).astype(np.uint8)
    image = picture(tmp_path / "a.png", rgb)
    mask = picture(tmp_path / "m.png", np.where(rgb[..., 0] > 100, 255, 0).astype(np.uint8))
    read = read_case(Case("P", "", (image,), mask), "A")
    assert np.array_equal(read.channels, rgb.transpose(2, 0, 1))
    assert read.labels is not None
    assert set(np.unique(read.labels)) == {0, 255}
    assert read.space.spacing is None


def broken(tmp_path: Path, kind: str) -> Case:
    image = nifti(tmp_path / "P" / "image.nii.gz", volume())
    mask = tmp_path / "P" / "mask.nii.gz"
    match kind:
        case "shape":
            nifti(mask, volume(shape=(6, 5, 3)))
        case "place":
            moved = AFFINE.copy()
            moved[0, 3] = 5.0
            nifti(mask, volume(), moved)
        case "fractions":
            nifti(mask, (volume() / 3).astype(np.float32))
        case "nan":
            nifti(image, np.full((6, 5, 4), np.nan, np.float32))
            nifti(mask, volume())
        case "corrupt":
            nifti(mask, volume())
            image.write_bytes(image.read_bytes()[:100])
        case "picture":
            image = tmp_path / "P" / "image.png"
            image.write_bytes(b"\x89PNG nothing")
            nifti(mask, volume())
    return Case("DOE", "", (image,), mask)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("shape", "an image and its mask differ in shape \\(6 x 5 x 4 and 6 x 5 x 3\\)"),
        ("place", "lie in different places"),
        ("fractions", "a mask holds fractions"),
        ("nan", "NaN or infinite"),
        ("corrupt", "damaged"),
        ("picture", "damaged, or neither PNG nor JPEG"),
    ],
)
def test_bad_files_are_one_clear_error_without_a_name(tmp_path: Path, kind: str, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        read_case(broken(tmp_path, kind), "A")
    assert str(caught.value).startswith("site A: ")
    assert str(tmp_path) not in str(caught.value)
