"""CT slices on a scanner's grid: resampled by area, centred on the body, refused where they cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from tests.ct_hospitals import make_ct_hospitals, save_dicom, save_nifti, thorax

from wardround.errors import DataError
from wardround.imaging.datasets import ct as ct_dataset
from wardround.imaging.datasets.ct import BodyOutline, CTFolder, CTIndex, Grid, Slice, on_grid, opened, read_ct_volume
from wardround.imaging.datasets.mri import SPLITS
from wardround.imaging.datasets.visits import Visits
from wardround.imaging.readers.dicom import CTSlice
from wardround.study.tasks import Slices, Split

GRID = Grid((64, 64), 6.0, 192.0)


def _index(folder: Path | tuple[Path, ...], grid: Grid = GRID, **changes: Any) -> CTIndex:
    options = {"slices": Slices(), "split": Split(), "seed": 3}
    return CTIndex(CTFolder(folder, "A"), grid, **{**options, **changes})


@given(
    st.integers(5, 40), st.floats(0.5, 3.0), st.integers(4, 30), st.floats(0.5, 6.0), st.floats(-3, 3), st.floats(-3, 3)
)
def test_resampling_keeps_a_ramp_and_pads_with_air(
    have: int, step: float, count: int, pixel: float, down: float, across: float
) -> None:
    """A linear image stays linear inside, wherever the middle is; outside is the padding value."""
    y, x = np.mgrid[:have, :have] * step
    middle = ((have - 1) / 2 + down, (have - 1) / 2 + across)
    grid = Grid((count, count), pixel, 1.0)
    found = on_grid(2.0 * y - x, (step, step), middle, grid, -7.0)
    at = (np.arange(count) - (count - 1) / 2) * pixel
    rows, columns = at[:, None] + middle[0] * step, at[None] + middle[1] * step
    # What a box over pixels loses at worst is linear interpolation's own: a box as wide as the larger pixel.
    width, edge = max(pixel, step), (have - 1) * step
    inside = np.ones((count, count), dtype=bool)
    outside = np.zeros((count, count), dtype=bool)
    for position in (rows, columns):
        inside &= (position - width / 2 > -step / 2) & (position + width / 2 < edge + step / 2)
        outside |= (position + width / 2 < -step / 2) | (position - width / 2 > edge + step / 2)
    expected = np.broadcast_to(2.0 * rows - columns, found.shape)
    assert np.abs(found - expected)[inside].max(initial=0.0) < 1.5 * step
    np.testing.assert_allclose(found[outside], -7.0, atol=1e-4)


def test_a_slice_that_is_not_in_memory_is_read_alone_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A patient of hundreds of slices would otherwise be read whole for every example."""
    for number in range(12):
        save_dicom(thorax(number), tmp_path / f"P{number // 4}" / f"{number % 4}.dcm")
    kept, anew = _index(tmp_path), _index(tmp_path, cache_bytes=0)
    read: list[str] = []
    reader = ct_dataset.read_slice

    def watched(path: Path, *, alone: bool = True) -> CTSlice:
        read.append(path.name)
        return reader(path, alone=alone)

    monkeypatch.setattr(ct_dataset, "read_slice", watched)
    examples = anew.examples("train")
    for example in examples:
        np.testing.assert_array_equal(anew.image(example), kept.image(example))
        np.testing.assert_array_equal(anew.mask(example), kept.mask(example))
    assert examples
    assert read == [f"{example.slice}.dcm" for example in examples]


def test_a_grid_of_the_same_pixels_changes_nothing() -> None:
    image = np.random.default_rng(0).normal(size=(12, 14))
    found = on_grid(image, (2.0, 2.0), (5.5, 6.5), Grid((12, 14), 2.0, 1.0), 0.0)
    np.testing.assert_allclose(found, image, atol=1e-6)


def test_a_body_is_found_and_put_in_the_middle_whatever_the_spacing(tmp_path: Path) -> None:
    save_dicom(thorax(1), tmp_path / "p0" / "a.dcm")
    save_dicom(thorax(1, size=160, spacing=2.25, shift=(25, -35)), tmp_path / "p1" / "1.2.3", spacing=2.25)
    index = _index(tmp_path, role="unseen")
    first, second = (index.image(example) for example in index.examples("test"))
    assert np.abs(first - second).mean() < 25  # edges of lungs and skin alone differ
    mask = index.mask(index.examples("test")[0])
    area = mask.sum() * GRID.pixel**2
    assert area == pytest.approx(np.pi * 150 * 105, rel=0.05)
    y, x = np.nonzero(mask)
    assert abs((y.min() + y.max()) / 2 - 31.5) <= 1
    assert abs((x.min() + x.max()) / 2 - 31.5) <= 1


def test_tables_are_air_and_thin_things_no_body() -> None:
    image = thorax(1, size=100).astype(np.float32)
    image[85:87, 2:98] = 200.0  # a table of 9 mm, apart from the patient
    body = BodyOutline.of(Slice(image, (4.5, 4.5)))
    assert not body.mask[85:87].any()
    assert body.reach == pytest.approx(150, abs=6)
    empty = BodyOutline.of(Slice(np.full((20, 20), -1000, np.float32), (1.0, 1.0)))
    assert (empty.reach, empty.mask.any(), empty.middle) == (0.0, False, (9.5, 9.5))


def test_nothing_outside_the_field_of_view_is_scanned(tmp_path: Path) -> None:
    image = thorax(1, size=110)
    image[100:104, :] = 200
    save_dicom(image, tmp_path / "p" / "a.dcm")
    index = _index(tmp_path, role="unseen")
    (example,) = index.examples("test")
    assert (index.image(example)[~GRID.inside()] == -1024).all()


@given(
    st.integers(5, 40), st.integers(5, 40), st.integers(0, 4), st.integers(0, 4), st.floats(0.3, 1), st.integers(0, 99)
)
def test_opening_is_that_of_a_box(height: int, width: int, rows: int, columns: int, filled: float, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < filled
    box = (2 * rows + 1, 2 * columns + 1)
    expected = ndimage.binary_opening(mask, np.ones(box, dtype=bool))
    np.testing.assert_array_equal(opened(mask, box), expected)
    assert opened(mask, box).dtype == np.bool_


def test_a_body_too_large_is_refused_by_number_and_fix(tmp_path: Path) -> None:
    folder = make_ct_hospitals(tmp_path)["A"]
    with pytest.raises(
        DataError, match=r"site A: in 7 of 7 slices the body does not fit.*enlarge `geometry.pixel`"
    ) as error:
        _index(folder, Grid((64, 64), 2.0, 64.0))
    assert "Doe" not in str(error.value)


def test_patients_are_split_whole_and_kept_apart_over_several_folders(tmp_path: Path) -> None:
    folders = make_ct_hospitals(tmp_path)
    index = _index((folders["A"], folders["B"]))
    by_split = {split: {example.patient for example in index.examples(split)} for split in SPLITS}
    assert [set(index.patients(split)) for split in SPLITS] == list(by_split.values())
    assert set.union(*by_split.values()) == set(range(9))
    assert sum(map(len, by_split.values())) == 9
    (folders["B"] / "Doe-Jane-0").mkdir()
    with pytest.raises(DataError, match="1 patients are in several") as error:
        _index((folders["A"], folders["B"]))
    assert "Doe" not in str(error.value)


def test_visits_are_the_test_patients_of_all_members(tmp_path: Path) -> None:
    folders = make_ct_hospitals(tmp_path)
    members = [_index(folders[site]) for site in "AB"]
    visits = Visits("New", members)
    assert (visits.patients("train"), visits.examples("validation")) == ((), ())
    expected = [member.image(example) for member in members for example in member.examples("test")]
    for example, image in zip(visits.examples("test"), expected, strict=True):
        np.testing.assert_array_equal(visits.image(example), image)
    assert visits.patients("test") == tuple(range(sum(len(member.patients("test")) for member in members)))


def test_patients_of_a_split_that_is_not_served_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_ct_hospitals(tmp_path)["A"]
    whole, read = _index(folder), []
    slices = CTFolder.slices

    def noted(self: CTFolder, patient: int) -> list[Slice]:
        read.append(patient)
        return slices(self, patient)

    monkeypatch.setattr(CTFolder, "slices", noted)
    some = _index(folder, served=("test",))
    assert tuple(read) == some.patients("test") == whole.patients("test")
    assert some.examples("test") == whole.examples("test")
    assert (some.patients("train"), some.examples("train")) == ((), ())
    assert some.fingerprint() == whole.fingerprint()
    nobody = _index(folder, served=())
    assert not any(nobody.patients(split) for split in SPLITS)


def test_the_fingerprint_follows_content_and_not_names(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_ct_hospitals(tmp_path / name)
    one, two = tmp_path / "one" / "B", tmp_path / "two" / "B"
    two.rename(tmp_path / "elsewhere")
    before = _index(one).fingerprint()
    assert _index(one).fingerprint() == before
    assert _index(one, Grid((64, 64), 6.5, 200.0)).fingerprint() != before
    patient = next(one.iterdir())
    save_nifti([thorax(99), thorax(98)], patient / "ct.nii.gz")
    assert _index(one).fingerprint() != before


def test_a_memory_too_small_for_images_changes_nothing(tmp_path: Path) -> None:
    folder = make_ct_hospitals(tmp_path)["A"]
    roomy, tight = _index(folder), _index(folder, cache_bytes=10)
    for example in roomy.examples("train"):
        np.testing.assert_array_equal(roomy.image(example), tight.image(example))


def test_values_that_are_no_hounsfield_units_are_refused(tmp_path: Path) -> None:
    save_nifti([thorax(1) + 1024], tmp_path / "volume" / "Doe" / "ct.nii.gz")
    save_dicom(thorax(1), tmp_path / "slice" / "Doe" / "a.dcm", intercept=0.0)
    for folder in ("volume", "slice"):
        with pytest.raises(DataError, match="site A: wrong rescale") as error:
            _index(tmp_path / folder, role="unseen")
        assert "Doe" not in str(error.value)


def test_a_folder_without_patients_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "Doe").mkdir()
    (tmp_path / "Doe" / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"SITE/PATIENT/\*\.dcm or SITE/PATIENT/ct\.nii\.gz"):
        CTFolder(tmp_path, "A")
    with pytest.raises(DataError, match="does not exist"):
        CTFolder(tmp_path / "nowhere", "A")


def test_series_in_folders_of_their_own_are_the_patients_too(tmp_path: Path) -> None:
    """As archives export: PATIENT/STUDY/SERIES. A link that leads back up, or twice to one place, adds nothing."""
    folder = make_ct_hospitals(tmp_path)["A"]
    flat = CTFolder(folder, "A")
    expected = [[slice_.hu for slice_ in flat.slices(patient)] for patient in range(5)]
    for number, name in enumerate(("STUDY1/SER1", "SER1", "a/b/c/d")):
        patient = folder / f"Doe-Jane-{number}"
        (patient / name).mkdir(parents=True)
        for path in patient.glob("*.dcm"):
            path.rename(patient / name / path.name)
        (patient / "again").symlink_to(patient / name)
        (patient / name / "up").symlink_to(patient)
    deep = CTFolder(folder, "A")
    assert len(deep) == 5
    for patient in range(5):
        for found, image in zip(deep.slices(patient), expected[patient], strict=True):
            np.testing.assert_array_equal(found.hu, image)
        assert deep.place(patient) == str(folder / f"Doe-Jane-{patient}")


def test_volumes_count_once_wherever_they_lie(tmp_path: Path) -> None:
    """The uppermost volume is the patient's; DICOM beside or below it is what it was made of."""
    for series in range(2):
        save_nifti([thorax(series)], tmp_path / "p" / f"SER{series}" / "ct.nii.gz")
    save_dicom(thorax(5), tmp_path / "p" / "SER0" / "0.dcm")
    assert len(CTFolder(tmp_path, "A").slices(0)) == 2
    save_nifti([thorax(8), thorax(9), thorax(8)], tmp_path / "p" / "ct.nii.gz")
    assert len(CTFolder(tmp_path, "A").slices(0)) == 3


def test_folders_without_images_are_counted_and_not_named(tmp_path: Path) -> None:
    folder = make_ct_hospitals(tmp_path)["B"]
    assert _index(folder).remarks() == ()
    (folder / "Doe-Jim" / "SER1").mkdir(parents=True)
    (folder / "Doe-Jim" / "SER1" / "report.txt").write_text("nothing")
    assert _index(folder).remarks() == ("1 of 5 folders hold neither *.dcm nor ct.nii.gz; they are left out",)


def test_folders_of_one_person_are_told_of(tmp_path: Path) -> None:
    """A folder is a patient: one person in two of them could train and test, and is counted as two by privacy."""
    for number in range(4):
        save_dicom(thorax(number), tmp_path / f"Doe-{number}" / "0.dcm")
    (remark,) = _index(tmp_path).remarks()
    assert remark.startswith("4 of 4 patients' folders name a PatientID that another of them names")
    assert "4711" not in remark


def test_one_slice_of_another_rescale_or_no_tissue_is_refused(tmp_path: Path) -> None:
    for number in range(3):
        save_dicom(thorax(number), tmp_path / "one" / f"{number}.dcm", intercept=0.0 if number == 1 else -1024.0)
        save_dicom((thorax(number) + 1000) // 10 - 1000, tmp_path / "tenth" / f"{number}.dcm")
    for name, what in (("one", "the lowest value of one of its slices is"), ("tenth", "there is no tissue in it")):
        (tmp_path / name / name).mkdir()
        for path in (tmp_path / name).glob("*.dcm"):
            path.rename(path.parent / name / path.name)
        with pytest.raises(DataError, match=what):
            CTFolder(tmp_path / name, "A").slices(0)


def _spine(seed: int = 0) -> np.ndarray:
    """A zoomed field of soft tissue and bone without any air."""
    random = np.random.default_rng(seed)
    image = random.normal(45, 15, (80, 80))
    image[:20] -= 130  # fat
    image[35:50, 35:50] += 400
    return np.rint(image).astype(np.int16)


def test_a_slice_without_air_is_judged_with_the_patients_others(tmp_path: Path) -> None:
    save_dicom(thorax(1), tmp_path / "Doe" / "0.dcm")
    save_dicom(_spine(), tmp_path / "Doe" / "1.dcm")
    first, second = CTFolder(tmp_path, "A").slices(0)
    assert first.hu.min() == -1000
    assert second.hu.min() > -200
    # Its own rescale may be wrong all the same, and a patient without any air is refused.
    save_dicom(_spine(), tmp_path / "Doe" / "2.dcm", intercept=0.0)
    with pytest.raises(
        DataError, match=r"site A: wrong rescale: a CT image is not in HU, the lowest value of one of its slices is \d+"
    ):
        CTFolder(tmp_path, "A").slices(0)
    for name in ("0.dcm", "2.dcm"):
        (tmp_path / "Doe" / name).unlink()
    with pytest.raises(DataError, match=r"it shows no air near -1000, .*, or it is of soft tissue alone"):
        CTFolder(tmp_path, "A").slices(0)


@pytest.mark.parametrize(
    ("affine", "told"),
    [
        ([[-4.5, 0, 0, 0], [0, -4.5, 1.5, 0], [0, 0, 5, 0], [0, 0, 0, 1]], "not perpendicular, as after a gantry tilt"),
        ([[-4.5, 0.3, 0, 0], [0, -4.5, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1]], "not perpendicular"),
        # Turned in the room, and rounded.
        ([[-4.4, -0.94, 0, 0], [0.94, -4.4, 0.02, 0], [0, 0, 5, 0], [0, 0, 0, 1]], ""),
    ],
)
def test_sheared_volumes_are_refused_as_a_gantry_tilt_is(tmp_path: Path, affine: list[list[float]], told: str) -> None:
    data = np.stack([thorax(number) for number in range(3)], -1)
    nib.save(nib.Nifti1Image(data, np.array(affine)), tmp_path / "ct.nii.gz")  # type: ignore[no-untyped-call]
    if told:
        with pytest.raises(DataError, match=told):
            read_ct_volume(tmp_path / "ct.nii.gz")
    else:
        assert read_ct_volume(tmp_path / "ct.nii.gz").spacing == pytest.approx((4.5, 4.5, 5.0), rel=1e-3)
