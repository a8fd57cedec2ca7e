"""A DICOM segmentation (SEG) as a mask: its frames put on an image's grid where they say that they lie.

A voxel's value is its segment's number. Several segments of a voxel are a value of their own, so that none is lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset

from wardround.errors import DataError
from wardround.imaging.readers.dicom import series_files
from wardround.imaging.readers.dicom_file import frames, guarded, number, open_dicom, path_of, required, text
from wardround.imaging.readers.places import UNEVEN

_SEG = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})  # the second: of label maps
_GROUPS = ("PlanePosition", "PlaneOrientation", "PixelMeasures")
_LARGEST = (1 << 16) - 1  # of a segment's number (VR US)
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
# Of a voxel: more than any rounding of positions, less than a grid that is shifted by half of one.
_OFF = 0.1
_AGAIN = "export it for this image, or resample one to the other"


@dataclass(frozen=True, eq=False)
class Grid:
    """Where an image's voxels lie: its file's shape, and the affine (4, 4) from indices to mm in RAS.

    `frame` is the identifier of its frame of reference, `None` for a file that knows of none (NIfTI).
    """

    shape: tuple[int, ...]
    affine: NDArray[np.float64]
    frame: str | None


@dataclass(frozen=True, eq=False)
class Segments:
    """What is drawn: `labels` int32 on an image's grid; `combined`: the segments of each value that means several."""

    labels: NDArray[np.int32]
    combined: Mapping[int, tuple[int, ...]]


def read_seg(path: Path, grid: Grid) -> Segments:
    """Read a SEG file, or the one in a folder, onto the grid of an image.

    Binary segments and label maps; frames may be of some slices only, and in any order. Raises DataError, whose message
    never names a patient, for a file of another kind or with fractions, for one of another frame of reference, and for
    frames that do not lie on the grid.
    """
    dataset = open_dicom(_one_file(path))
    mapped = _check_kind(dataset)
    if grid.frame is not None and (text(dataset, "FrameOfReferenceUID") or "") != grid.frame:
        raise DataError(
            "a DICOM SEG is of another frame of reference than its image, so it is not known where it lies on it; give "
            "the SEG that was drawn on this series",
            detail=str(path),
        )
    with guarded("an image's header gives no place to an axis; export it again", path):
        to_index: NDArray[np.float64] = np.asarray(np.linalg.inv(grid.affine) @ _LPS, np.float64)
    planes = list(_planes(dataset, to_index))
    _check_steps(planes, grid, path)
    marks = _Marks(np.zeros(grid.shape, np.int32))
    for plane, stored in zip(planes, frames(dataset, len(planes)), strict=True):
        for segment in np.unique(stored) if mapped else (plane.segment,):
            if segment:
                marked = stored == segment if mapped else stored != 0
                marks.add(plane.voxels(marked, grid.shape, path), int(segment))
    return marks.done()


def segment_names(path: Path) -> dict[int, str]:
    """Number and label of each segment of a SEG file, for people. Raises DataError."""
    dataset = open_dicom(path, pixels=False)
    _check_kind(dataset)
    with guarded("a DICOM SEG does not say what its segments are; export it again", path):
        items = dataset.get("SegmentSequence") or []
        return {int(item.SegmentNumber): text(item, "SegmentLabel") or "" for item in items}


def _one_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = series_files(path)
    if len(found) != 1:
        raise DataError(
            f"the folder of a mask holds {len(found)} files, and a mask is one DICOM SEG; keep that alone in it",
            detail=str(path),
        )
    return found[0]


def _check_kind(dataset: FileDataset) -> bool:
    """Whether it is a label map. Raises DataError for what is no SEG, or has fractions."""
    path = str(path_of(dataset))
    if text(dataset, "SOPClassUID") not in _SEG:
        modality = text(dataset, "Modality")
        shown = modality if modality and re.fullmatch("[A-Z]{2,8}", modality) else "missing or unknown"
        raise DataError(
            f"a mask in DICOM is no SEG (its modality is {shown}); export the outlines as DICOM SEG or NIfTI",
            detail=path,
        )
    kind = text(dataset, "SegmentationType")
    if kind is None:
        raise DataError("a DICOM SEG does not say what its values mean; copy or export it again", detail=path)
    if kind not in ("BINARY", "LABELMAP"):
        what = "fractions" if kind == "FRACTIONAL" else "segments of an unknown type"
        raise DataError(f"a DICOM SEG holds {what}; export its segments as binary", detail=path)
    return kind == "LABELMAP"


@dataclass(frozen=True, eq=False)
class _Frames:
    """How a frame's pixels lie on the image's voxels: the steps down its rows and along its columns, each one voxel.

    `off` (4, 3): by how much the corners of a frame miss voxels if its first pixel does not. `apart`: the distance of
    slices, over that of the image's, where it is said.
    """

    steps: NDArray[np.int64]
    off: NDArray[np.float64]
    apart: float | None

    @classmethod
    def of(cls, dataset: FileDataset, axes: Dataset, measures: Dataset, to_index: NDArray[np.float64]) -> _Frames:
        """Raises DataError for pixels of another size or direction than the image's."""
        directions = np.array(required(axes, "ImageOrientationPatient", 6)).reshape(2, 3)
        spacing = np.array(required(measures, "PixelSpacing", 2))
        # Going down the rows is going along a column.
        steps = directions[::-1] * spacing[:, None] @ to_index[:3, :3].T
        whole = np.rint(steps)
        if not np.array_equal(np.abs(whole) @ np.abs(whole).T, np.eye(2)):
            raise DataError(
                f"a DICOM SEG has another grid than its image: its pixels are of another size or direction; {_AGAIN}",
                detail=str(path_of(dataset)),
            )
        rows, columns = (number(dataset, keyword) or 1.0 for keyword in ("Rows", "Columns"))
        ends = np.array([[0, 0], [rows - 1, 0], [0, columns - 1], [rows - 1, columns - 1]])
        step, across = number(measures, "SpacingBetweenSlices"), np.cross(*directions)
        apart = abs(step) * float(np.linalg.norm(to_index[:3, :3] @ across)) if step else None
        return cls(whole.astype(np.int64), ends @ (steps - whole), apart)

    @property
    def normal(self) -> int:
        """The image's axis across the planes."""
        return int(np.flatnonzero(np.abs(self.steps).sum(0) == 0)[0])


@dataclass(frozen=True, eq=False)
class _Plane:
    """A frame's place: the voxel of its first pixel, and how the others follow. `segment` is 0 in a label map."""

    segment: int
    start: NDArray[np.int64]
    frames: _Frames

    def voxels(self, marked: NDArray[np.bool_], shape: tuple[int, ...], path: Path) -> tuple[NDArray[np.int64], ...]:
        """The indices of marked pixels (rows, columns). Raises DataError for one beyond the image."""
        found = self.start + np.argwhere(marked) @ self.frames.steps
        if ((found < 0) | (found >= shape)).any():
            raise DataError(f"a DICOM SEG marks voxels that its image does not have; {_AGAIN}", detail=str(path))
        return tuple(found.T)


def _planes(dataset: FileDataset, to_index: NDArray[np.float64]) -> Iterator[_Plane]:
    """Where each frame lies; `to_index` (4, 4) from mm in LPS to the image's voxels. Raises DataError."""
    path, unsaid = str(path_of(dataset)), "a DICOM SEG does not say where its frames lie; copy or export it again"
    with guarded(unsaid, path_of(dataset)):
        items = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])
    if not items:
        raise DataError(unsaid, detail=path)
    mapped, known = text(dataset, "SegmentationType") == "LABELMAP", dict[tuple[int, int], _Frames]()
    for item in items:
        place, axes, measures = (_group(dataset, item, f"{name}Sequence") for name in _GROUPS)
        # Most often the same of all frames.
        key = (id(axes), id(measures))
        frames_of = known.setdefault(key, known.get(key) or _Frames.of(dataset, axes, measures, to_index))
        corner = np.array(required(place, "ImagePositionPatient", 3))
        start = to_index[:3, :3] @ corner + to_index[:3, 3]
        nearest = np.rint(start)
        if np.abs(start - nearest + frames_of.off).max() > _OFF:
            raise DataError(
                f"a DICOM SEG has another grid than its image: its frames lie between the image's voxels; {_AGAIN}",
                detail=path,
            )
        segment = 0 if mapped else _segment(dataset, item)
        yield _Plane(segment, nearest.astype(np.int64), frames_of)


def _group(dataset: FileDataset, item: Dataset, name: str) -> Dataset:
    """What holds for a frame: said of itself, or of all."""
    with guarded(f"a DICOM SEG lacks the {name} of a frame; copy or export it again", path_of(dataset)):
        own = item.get(name) or dataset.SharedFunctionalGroupsSequence[0].get(name)
        group: Dataset = own[0]
    return group


def _segment(dataset: FileDataset, item: Dataset) -> int:
    found = number(_group(dataset, item, "SegmentIdentificationSequence"), "ReferencedSegmentNumber")
    if found is None or not 1 <= found <= _LARGEST:
        raise DataError(
            "a frame of a DICOM SEG names no segment; copy or export it again", detail=str(path_of(dataset))
        )
    return int(found)


def _check_steps(planes: Sequence[_Plane], grid: Grid, path: Path) -> None:
    """Raises DataError for a SEG of thicker slices: its planes may be some of the image's, and the rest seem empty."""
    at: dict[int, set[int]] = {}
    apart: set[float] = set()
    for plane in planes:
        axis = plane.frames.normal
        if grid.shape[axis] > 1:
            at.setdefault(axis, set()).add(int(plane.start[axis]))
            apart |= set() if plane.frames.apart is None else {plane.frames.apart}
    # Where it is not said: no gap is the least one.
    apart = apart or {float(np.diff(sorted(where)).min()) for where in at.values() if len(where) > 1}
    if any(abs(each - 1) > UNEVEN for each in apart):
        most = max(apart, key=lambda each: abs(each - 1))
        raise DataError(
            f"a DICOM SEG has another grid than its image: its slices stand {most:.3g} times as far apart; {_AGAIN}",
            detail=str(path),
        )


@dataclass
class _Marks:
    """Labels while frames are added; what several segments mark has a value above any segment's number."""

    labels: NDArray[np.int32]
    sets: dict[int, frozenset[int]] = field(default_factory=lambda: {0: frozenset()})
    values: dict[frozenset[int], int] = field(default_factory=dict)

    def add(self, where: tuple[NDArray[np.int64], ...], segment: int) -> None:
        here = self.labels[where]
        for old in np.unique(here).tolist():
            here[here == old] = self._value(self.sets[old] | {segment})
        self.labels[where] = here

    def _value(self, segments: frozenset[int]) -> int:
        if segments not in self.values:
            (one, *others) = segments
            value = one if not others else _LARGEST + 1 + len(self.values)
            self.values[segments], self.sets[value] = value, segments
        return self.values[segments]

    def done(self) -> Segments:
        """The values of several segments follow the last number, in an order that is not that of the frames."""
        final = np.zeros(1 + max(self.sets), np.int32)
        used = np.zeros(len(final), np.bool_)
        used[self.labels] = True
        held = {value: segments for value, segments in self.sets.items() if used[value]}
        several = sorted(tuple(sorted(segments)) for segments in held.values() if len(segments) > 1)
        first = 1 + max((max(segments) for segments in held.values() if segments), default=0)
        combined = {first + place: segments for place, segments in enumerate(several)}
        values = {frozenset(segments): value for value, segments in combined.items()}
        for value, segments in held.items():
            final[value] = values.get(segments, value)
        return Segments(final[self.labels], combined)
