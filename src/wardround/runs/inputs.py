"""What a clinic gives a model of images: files, a patient's folder, a folder of patients or a DICOM series."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from wardround.errors import DataError
from wardround.imaging.readers.aside import Aside
from wardround.imaging.readers.cases import Case, NothingMatches, Patterns, sort_cases
from wardround.imaging.readers.dicom_image import ImageSeries, read_image_series
from wardround.imaging.readers.dicom_inspect import find_dicom
from wardround.imaging.readers.dicom_signs import holds_dicom
from wardround.imaging.readers.labelled import LabelledImage, placed_image, read_image
from wardround.tasks.scanning import ScanBatch


@dataclass(frozen=True, eq=False)
class Opened:
    """An image in memory; `series` where it came as DICOM.

    Of raw data it is the zero-filled one; `scans` are those of its slices, over `scale`. `minds` is what
    whoever uses the results must know.
    """

    image: LabelledImage
    series: ImageSeries | None = None
    scans: ScanBatch | None = None
    scale: float = 1.0
    minds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Input:
    """An image of a patient that is read when it is asked for; `source` is its file, or its folder of DICOM."""

    patient: str
    id: str
    source: Path
    read: Callable[[], Opened]
    dicom: bool = False

    @property
    def name(self) -> str:
        """What its results are named by."""
        return "_".join(part for part in (self.patient, self.id) if part)


@dataclass(frozen=True)
class Inputs:
    """Images by patient, and patients whose files are not complete."""

    patients: Mapping[str, Sequence[Input]]
    aside: tuple[Aside, ...] = ()


def find_inputs(source: Path, patterns: Patterns) -> Inputs:
    """The images that a path holds.

    A file is an image of one patient. A folder is looked through by the patterns of the model's study: as a folder of
    patients, then as the folder of one; then it may hold one DICOM series, or image files side by side, each another
    patient's where the study has one file an image. A table of the study says whose each image is where it lies there.
    Raises `DataError` where nothing is found.
    """
    if source.is_file():
        if source.suffix.lower() == ".dcm" or (not source.name.endswith(patterns.endings) and find_dicom(source)):
            raise DataError("this is one DICOM file; give the folder of its series", detail=str(source))
        name = next((end for end in patterns.endings if source.name.endswith(end)), source.suffix)
        patient = source.name.removesuffix(name)
        return Inputs({patient: [_of(Case(patient, "", (source,), readers=patterns.readers))]})
    if not source.is_dir():
        raise DataError("the input does not exist; check its path", detail=str(source))
    for found in (_by_patterns(source, patterns), _of_one(source, patterns)):
        if found is not None:
            return found
    if holds_dicom(source):
        patient = source.resolve().name
        return Inputs({patient: [Input(patient, "", source, partial(_series, source), dicom=True)]})
    beside = _beside(source, patterns)
    if beside is not None:
        return beside
    shown = ", ".join(patterns.whole(pattern) for pattern in patterns.images)
    raise DataError(
        f"the folder holds neither files that match {shown} ({', '.join(patterns.endings)}), nor one DICOM series",
        detail=str(source),
    )


def _by_patterns(folder: Path, patterns: Patterns) -> Inputs | None:
    table = patterns.table if patterns.table is not None and (folder / patterns.table.file).is_file() else None
    images = patterns.images
    if table is None and not any("{patient}" in patterns.whole(pattern) for pattern in images):
        # Without the table it is not known whose an image is: each is taken for another patient's.
        images = tuple(pattern.replace("{id}", "{patient}") for pattern in images)
    return _sorted(folder, replace(patterns, images=images, table=table))


def _of_one(folder: Path, patterns: Patterns) -> Inputs | None:
    """The images of the patient whose own folder it is."""
    whole = [patterns.whole(pattern) for pattern in patterns.images]
    if not all(pattern.startswith("{patient}/") for pattern in whole):
        return None
    patient = folder.resolve().name
    return _sorted(folder.resolve().parent, replace(patterns, images=tuple(whole), table=None, only=patient))


def _beside(folder: Path, patterns: Patterns) -> Inputs | None:
    return _sorted(folder, replace(patterns, images=("{patient}",), table=None)) if len(patterns.images) == 1 else None


def _sorted(folder: Path, patterns: Patterns) -> Inputs | None:
    try:
        found = sort_cases(folder, "", patterns)
    except NothingMatches:
        return None
    patients = {patient: [_of(case) for case in cases] for patient, cases in found.cases.items()}
    return Inputs(patients, found.aside)


def _of(case: Case) -> Input:
    if case.images[0].is_dir():
        return Input(case.patient, case.id, case.images[0], partial(_of_series, case), dicom=True)
    return Input(case.patient, case.id, case.images[0], lambda: Opened(read_image(case)))


def _of_series(case: Case) -> Opened:
    """An image whose first channel is a series: what is found lies on that."""
    first = _series(case.images[0])
    return first if len(case.images) == 1 else replace(first, image=read_image(case))


def _series(folder: Path) -> Opened:
    series = read_image_series(folder)
    return Opened(placed_image(series.data[None], series.spacing, series.affine), series)
