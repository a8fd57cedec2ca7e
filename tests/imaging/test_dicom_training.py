"""A hospital's own DICOM in training: series as images, SEG as masks, the same as NIfTI of the same voxels."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset
from tests.ct_files import write_series
from tests.dicom_series import UPRIGHT, mr_series, seg_of

from wardround.errors import DataError
from wardround.imaging.convert import inspect_path
from wardround.imaging.propose import propose_study
from wardround.imaging.readers.cases import Case, Patterns, sort_cases
from wardround.imaging.readers.dicom import read_series
from wardround.imaging.readers.dicom_seg import Grid, read_seg, segment_names
from wardround.imaging.readers.dicom_signs import holds_dicom
from wardround.imaging.readers.labelled import LabelledImage, read_case

highdicom = pytest.importorskip("highdicom")
SHAPE = (13, 10, 5)  # frames of 130 pixels, so that a frame of single bits begins within a byte


def volume(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2000, SHAPE)


def drawn(seed: int = 1, share: float = 0.3) -> np.ndarray:
    return np.random.default_rng(seed).random(SHAPE) < share


def read(image: Path | Sequence[Path], mask: Path | None) -> LabelledImage:
    images = (image,) if isinstance(image, Path) else tuple(image)
    return read_case(Case("DOE", "", images, mask), "A")


def as_nifti(folder: Path, array: np.ndarray, labels: np.ndarray, affine: np.ndarray) -> LabelledImage:
    for name, values in (("i", array.astype(np.int16)), ("m", labels.astype(np.uint8))):
        nibabel.save(nibabel.Nifti1Image(values, affine), folder / f"{name}.nii.gz")
    return read(folder / "i.nii.gz", folder / "m.nii.gz")


def assert_same(one: LabelledImage, other: LabelledImage) -> None:
    np.testing.assert_array_equal(one.channels, other.channels)
    np.testing.assert_array_equal(one.labels, other.labels)  # type: ignore[arg-type]
    assert one.channels.dtype == other.channels.dtype
    # A NIfTI header holds its affine in single precision.
    np.testing.assert_allclose(one.space.affine, other.space.affine, atol=1e-5)  # type: ignore[arg-type]
    np.testing.assert_allclose(one.space.spacing, other.space.spacing, rtol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_array_equal(one.space.orientation, other.space.orientation)  # type: ignore[arg-type]


def written(headers: Sequence[FileDataset], pixels: np.ndarray, path: Path, kind: str, **more: Any) -> Path:
    """A SEG by highdicom alone: pixels (frames, rows, columns) of segment numbers, or with an axis of segments."""
    numbers = range(1, 1 + (pixels.shape[-1] if pixels.ndim == 4 else int(pixels.max())))
    from pydicom.sr.codedict import codes

    segments = [
        highdicom.seg.SegmentDescription(n, f"part {n}", codes.SCT.Tissue, codes.SCT.Brain, "MANUAL") for n in numbers
    ]
    made = highdicom.seg.Segmentation(
        list(headers), pixels, kind, segments, pydicom.uid.generate_uid(), 9, pydicom.uid.generate_uid(), 1, "M", "M",
        "1", "0", **more,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path)
    return path


# The same voxels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ours", "label map", "compressed", "two slices", "folder", "no ending", "upright"])
def test_a_series_and_a_seg_are_nifti_of_the_same_voxels(how: str, tmp_path: Path) -> None:
    array = volume()
    axes = {"axes": UPRIGHT} if how == "upright" else {}
    headers = mr_series(tmp_path / "flair", array, **axes)
    labels = drawn().astype(np.uint8)
    labels[drawn(2)] = 2
    if how == "two slices":
        labels[..., [0, 1, 3]] = 0
    # In the order of the headers; a label map's frames are slices.
    frames = np.moveaxis(labels, -1, 0)
    if how in ("label map", "compressed"):
        syntax = {"transfer_syntax_uid": pydicom.uid.RLELossless} if how == "compressed" else {}
        mask = written(headers, frames, tmp_path / "seg.dcm", "LABELMAP", **syntax)
    else:
        name = {"folder": "seg/1", "no ending": "seg"}.get(how, "seg.dcm")
        mask = seg_of(headers, np.stack([labels == 1, labels == 2]), tmp_path / name)
        mask = mask.parent if how == "folder" else mask
    found = read(tmp_path / "flair", mask)
    series = found.space.affine
    assert series is not None
    # The reader sorts slices along their normal, which for upright ones runs to the feet.
    turn = slice(None, None, -1) if how == "upright" else slice(None)
    assert_same(found, as_nifti(tmp_path, array[..., turn], labels[..., turn], series))
    assert found.combined == {}


def test_a_series_of_ct_is_in_hounsfield_units(tmp_path: Path) -> None:
    series = read_series(write_series(tmp_path / "ct"))
    headers = [pydicom.dcmread(header.filename) for header in series.headers]
    bone = series.data > 500
    found = read(tmp_path / "ct", seg_of(headers, bone[None], tmp_path / "seg.dcm"))
    assert bone.any()
    assert_same(found, as_nifti(tmp_path, series.data, bone, series.affine))
    # A file of it, named with its ending, is a volume of one slice.
    one = read(Path(shutil.copy(series.headers[2].filename, tmp_path / "one.dcm")), None)
    np.testing.assert_array_equal(one.space.restored(one.channels)[0, ..., 0], series.data[..., 2])


def test_a_seg_lies_on_nifti_by_its_millimetres_and_a_nifti_mask_on_a_series(tmp_path: Path) -> None:
    array, labels = volume(), drawn()
    mask = seg_of(mr_series(tmp_path / "flair", array), labels[None], tmp_path / "seg.dcm")
    affine = read(tmp_path / "flair", None).space.affine
    assert affine is not None
    whole = as_nifti(tmp_path, array, labels, affine)
    assert_same(read(tmp_path / "i.nii.gz", mask), whole)
    assert_same(read(tmp_path / "flair", tmp_path / "m.nii.gz"), whole)
    # Of a file whose axes run the other way, too.
    turned = affine @ np.array([[0, -1, 0, 12], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(np.rot90(array, -1).astype(np.int16), turned), tmp_path / "t.nii.gz")
    other = read(tmp_path / "t.nii.gz", mask)
    assert other.labels is not None
    assert whole.labels is not None
    assert other.labels.sum() == labels.sum()
    np.testing.assert_array_equal(other.channels[0][other.labels > 0].sum(), whole.channels[0][whole.labels > 0].sum())


def test_segments_that_overlap_are_all_kept(tmp_path: Path) -> None:
    headers = mr_series(tmp_path / "flair", volume())
    masks = np.stack([drawn(seed, 0.5) for seed in (1, 2, 3)])
    for name, order in (("a", (0, 1, 2)), ("b", (2, 0, 1))):
        # The order in which a program wrote its frames makes no difference.
        path = seg_of(headers, masks, tmp_path / f"{name}.dcm")
        dataset = pydicom.dcmread(path)
        groups, bits = list(dataset.PerFrameFunctionalGroupsSequence), dataset.pixel_array
        number = [int(each.SegmentIdentificationSequence[0].ReferencedSegmentNumber) for each in groups]
        new = sorted(range(len(groups)), key=lambda n: order.index(number[n] - 1))
        dataset.PerFrameFunctionalGroupsSequence = [groups[n] for n in new]
        dataset.PixelData = pydicom.pixels.pack_bits(bits[new])
        dataset.save_as(path)
    found, other = (read(tmp_path / "flair", tmp_path / f"{name}.dcm") for name in "ab")
    assert found.labels is not None
    assert other.labels is not None
    np.testing.assert_array_equal(found.labels, other.labels)
    assert found.combined == other.combined == {4: (1, 2), 5: (1, 2, 3), 6: (1, 3), 7: (2, 3)}
    in_file = found.space.restored(found.labels)
    for segment, mask in enumerate(masks, 1):
        means = [segment, *(value for value, numbers in found.combined.items() if segment in numbers)]
        np.testing.assert_array_equal(np.isin(in_file, means), mask)


def test_inspection_and_init_know_series_of_mr_and_what_segments_are_called(tmp_path: Path) -> None:
    for patient in ("MUELLER", "DOE"):
        headers = mr_series(tmp_path / "A" / patient / "flair", volume())
        path = seg_of(headers, np.stack([drawn(), drawn(2)]), tmp_path / "A" / patient / "seg.dcm", ["whole", "core"])
    assert segment_names(path) == {1: "whole", 2: "core"}
    mr_series(tmp_path / "A" / "ROE" / "flair", volume(), leave_out=2)
    found = inspect_path(tmp_path / "A")
    assert found.kind == "MR images in DICOM and outlines in DICOM SEG"
    assert found.facts == (
        "14 files in 3 folders; 2 series of 1 patients can be read",
        "13 x 10 x 5 voxels of 1.5 x 1.25 x 3 mm (2 series)",
        "scanners SIEMENS (2)",
        "segment 1: whole (2 SEG)",
        "segment 2: core (2 SEG)",
    )
    (problem,) = found.problems
    assert problem.startswith("1 of 5 slices of a series are missing")
    assert inspect_path(path).kind == "outlines in DICOM SEG"
    assert "13 x 10 x 1 voxels" in str(inspect_path(tmp_path / "A" / "ROE" / "flair" / "00.dcm"))
    with pytest.raises(DataError, match=r"this is MR images in DICOM.*written by hand") as caught:
        propose_study(tmp_path)
    for secret in ("MUELLER", "DOE", "PAT-7731"):
        assert secret not in f"{found}{caught.value}"


# Which files belong together ------------------------------------------------------------------------------------------


def test_patterns_find_folders_of_dicom_and_segs(tmp_path: Path) -> None:
    for patient in ("P1", "P2"):
        headers = mr_series(tmp_path / patient / "flair", volume())
        nibabel.save(nibabel.Nifti1Image(volume().astype(np.int16), np.eye(4)), tmp_path / patient / "t1.nii.gz")
        seg_of(headers, drawn()[None], tmp_path / patient / ("seg.dcm" if patient == "P1" else "seg/one"))
    (tmp_path / "P1" / "notes").mkdir()
    (tmp_path / "P1" / "notes" / "seg.txt").write_text("none")
    found = sort_cases(tmp_path, "A", Patterns(("flair", "t1"), "seg"))
    assert {p: [i.name for i in c[0].images] for p, c in found.cases.items()} == {
        p: ["flair", "t1.nii.gz"] for p in ("P1", "P2")
    }
    assert [c[0].mask.name for c in found.cases.values() if c[0].mask] == ["seg.dcm", "seg"]
    # A folder may be the patient's own, and lie deeper; a file is named with its ending.
    assert list(sort_cases(tmp_path / "P1", "A", Patterns(("{patient}",))).cases) == ["flair", "t1"]
    assert list(sort_cases(tmp_path.parent, "A", Patterns((f"{tmp_path.name}/{{patient}}/fl*",))).cases) == ["P1", "P2"]
    slices = sort_cases(tmp_path / "P1", "A", Patterns(("{patient}/{id}.dcm",)))
    assert len(slices.cases["flair"]) == SHAPE[2]
    # Both kinds of one image are one too many.
    nibabel.save(nibabel.Nifti1Image(volume().astype(np.int16), np.eye(4)), tmp_path / "P2" / "flair.nii.gz")
    (aside,) = sort_cases(tmp_path, "A", Patterns(("flair",))).aside
    assert (aside.patient, "several files of an image match" in aside.reason) == ("P2", True)


def test_a_folder_holds_dicom_by_what_lies_in_it(tmp_path: Path) -> None:
    mr_series(tmp_path / "deep" / "series", volume())
    assert not holds_dicom(tmp_path / "deep")
    assert holds_dicom(tmp_path / "deep" / "series")
    for name in ("DICOMDIR", ".IM1"):
        (tmp_path / "deep" / name).write_bytes(b"\0" * 128 + b"DICM")
    assert not holds_dicom(tmp_path / "deep")
    (tmp_path / "deep" / "IM0001").write_bytes(b"\0" * 128 + b"DICM")
    assert holds_dicom(tmp_path / "deep")


# Bad input ------------------------------------------------------------------------------------------------------------

Spoil = Callable[[FileDataset], None]


def _measures(**values: Any) -> Spoil:
    def change(seg: FileDataset) -> None:
        for keyword, value in values.items():
            setattr(seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0], keyword, value)

    return change


def _moved(by: Sequence[float], only_first: bool = False) -> Spoil:
    def change(seg: FileDataset) -> None:
        for item in seg.PerFrameFunctionalGroupsSequence[: 1 if only_first else None]:
            place = item.PlanePositionSequence[0]
            place.ImagePositionPatient = [float(a) + b for a, b in zip(place.ImagePositionPatient, by, strict=True)]

    return change


def _set(**values: Any) -> Spoil:
    def change(seg: FileDataset) -> None:
        for keyword, value in values.items():
            setattr(seg, keyword, value)

    return change


def _every_other(seg: FileDataset) -> None:
    groups, bits = list(seg.PerFrameFunctionalGroupsSequence), seg.pixel_array
    kept = [n for n, item in enumerate(groups) if round(item.PlanePositionSequence[0].ImagePositionPatient[2]) % 2 == 0]
    seg.PerFrameFunctionalGroupsSequence = [groups[n] for n in kept]
    seg.NumberOfFrames, seg.PixelData = len(kept), pydicom.pixels.pack_bits(bits[kept])
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    if "SpacingBetweenSlices" in measures:
        del measures.SpacingBetweenSlices


def _without_places(seg: FileDataset) -> None:
    for item in seg.PerFrameFunctionalGroupsSequence:
        del item.PlanePositionSequence


BAD_SEGS: list[tuple[Spoil, str]] = [
    (_set(FrameOfReferenceUID="1.2.3.4"), "SEG is of another frame of reference than its image"),
    (_measures(PixelSpacing=[1.5, 1.5]), "its pixels are of another size or direction|lie between"),
    (_measures(PixelSpacing=[3.0, 2.5]), "its pixels are of another size or direction"),
    (_measures(SpacingBetweenSlices=6.0), "its slices stand 2 times as far apart"),
    (_every_other, "its slices stand 2 times as far apart"),
    (_moved((0.0, 0.0, 1.5), only_first=True), "its frames lie between the image's voxels"),
    (_moved((0.0, 0.0, 300.0)), "marks voxels that its image does not have"),
    (_set(SegmentationType="FRACTIONAL"), "holds fractions; export its segments as binary"),
    (_set(SOPClassUID="1.2.840.10008.5.1.4.1.1.481.3", Modality="RTSTRUCT"), r"no SEG \(its modality is RTSTRUCT\)"),
    (_set(NumberOfFrames=2), "holds 2 frames and describes 5"),
    (_set(Rows=5000, Columns=9000), "lie between|of another size|holds .* bytes of pixels"),
    (_set(PixelData=b"\0\0"), "damaged or cut short"),
    (_without_places, "lacks the PlanePositionSequence of a frame"),
    (_set(PerFrameFunctionalGroupsSequence=None), "does not say where its frames lie"),
]


@pytest.mark.parametrize(("spoil", "says"), BAD_SEGS)
def test_a_seg_that_does_not_fit_is_one_clear_error(spoil: Spoil, says: str, tmp_path: Path) -> None:
    path = seg_of(mr_series(tmp_path / "flair", volume()), drawn()[None], tmp_path / "PAT-7731" / "seg.dcm")
    seg = pydicom.dcmread(path)
    spoil(seg)
    seg.save_as(path)
    with pytest.raises(DataError, match=says) as caught:
        read(tmp_path / "flair", path)
    _silent(caught.value, seg)


def _silent(error: DataError, header: FileDataset) -> None:
    """The message names no patient, identifier or path; its detail, which stays at the site, may."""
    said = str(error)
    assert said.startswith("site A: ")
    for secret in ("MUELLER", "PAT-7731", "19510423", "/tmp", str(header.StudyInstanceUID)[:20]):
        assert secret not in said


def _cut(folder: Path) -> None:
    path = sorted(folder.iterdir())[1]
    path.write_bytes(path.read_bytes()[:-40])


def _text(folder: Path) -> None:
    (folder / "readme").write_text("no image")


def _mixed(folder: Path) -> None:
    path = sorted(folder.iterdir())[1]
    header = pydicom.dcmread(path)
    header.SeriesInstanceUID = pydicom.uid.generate_uid()
    header.save_as(path)


def _frames(folder: Path) -> None:
    path = sorted(folder.iterdir())[1]
    header = pydicom.dcmread(path)
    header.FrameOfReferenceUID = pydicom.uid.generate_uid()
    header.save_as(path)


def _large(folder: Path) -> None:
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        header.Rows = header.Columns = 20_000
        header.save_as(path)


def _lacks(folder: Path) -> None:
    for path in folder.iterdir():
        if pydicom.dcmread(path).InstanceNumber == 3:
            path.unlink()
            return


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_cut, "pixels are damaged or cut short|holds .* bytes of pixels"),
        (_text, "a file is not DICOM"),
        (_mixed, "2 series are mixed in one folder"),
        (_frames, "slices of one series are in 2 frames of reference"),
        (_lacks, "1 of 5 slices of a series are missing"),
        (_large, "at most 536,870,912 voxels are read"),
    ],
)
def test_a_series_that_cannot_be_used_is_one_clear_error(
    spoil: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    headers = mr_series(tmp_path / "MUELLER" / "flair", volume())
    spoil(tmp_path / "MUELLER" / "flair")
    with pytest.raises(DataError, match=says) as caught:
        read(tmp_path / "MUELLER" / "flair", None)
    _silent(caught.value, headers[0])


def test_channels_of_two_frames_of_reference_and_pictures_with_a_seg(tmp_path: Path) -> None:
    headers = mr_series(tmp_path / "flair", volume())
    mr_series(tmp_path / "t1", volume(1), frame=headers[0].FrameOfReferenceUID)
    mr_series(tmp_path / "t2", volume(2))
    assert read([tmp_path / "flair", tmp_path / "t1"], None).channels.shape[0] == 2
    with pytest.raises(DataError, match="two channels of an image are of unlike frames of reference"):
        read([tmp_path / "flair", tmp_path / "t2"], None)
    mask = seg_of(headers, drawn()[None], tmp_path / "seg" / "one")
    from PIL import Image

    Image.new("L", SHAPE[:2]).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="a mask is a DICOM SEG, and its image is a picture"):
        read(tmp_path / "a.png", mask)
    seg_of(headers, drawn()[None], tmp_path / "seg" / "two")
    with pytest.raises(DataError, match="the folder of a mask holds 2 files"):
        read(tmp_path / "flair", mask.parent)
    with pytest.raises(DataError, match=r"no SEG \(its modality is MR\)"):
        read(tmp_path / "flair", next((tmp_path / "t1").iterdir()))


def test_a_spoiled_seg_is_read_or_one_clear_error(tmp_path: Path) -> None:
    path = seg_of(mr_series(tmp_path / "flair", volume()), drawn()[None], tmp_path / "seg.dcm")
    space = read(tmp_path / "flair", None).space
    assert space.affine is not None
    grid, random, whole = Grid(SHAPE, space.affine, space.frame), np.random.default_rng(1), path.read_bytes()
    said = []
    for number in range(18):
        spoiled = bytearray(whole if number % 3 else whole[: random.integers(len(whole))])
        for place in random.integers(128, len(whole), 3):
            spoiled[place % len(spoiled)] = random.integers(256)
        path.write_bytes(bytes(spoiled))
        try:
            read_seg(path, grid)
        except DataError as error:
            said.append(str(error))
    # Every file that is cut short is refused.
    assert 6 <= len(said) < 18
    assert not any("seg.dcm" in each or "/" in each for each in said)


def test_a_folder_that_may_not_be_read_is_a_patient_s_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "DOE" / "flair"
    mr_series(folder, volume())
    listed = Path.iterdir

    def refuse(path: Path) -> Any:
        if path == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    (found,) = sort_cases(tmp_path, "A", Patterns(("flair",))).cases["DOE"]
    with pytest.raises(DataError, match=r"a series' folder cannot be read \(Permission denied\)"):
        read_case(found, "A")
