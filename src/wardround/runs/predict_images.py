"""Applies a released model to a clinic's images: masks with volumes and pictures, or probabilities, a patient each."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from wardround.errors import DataError, StudyError, WardroundError
from wardround.imaging.readers.cases import Patterns
from wardround.imaging.readers.dicom import series_files
from wardround.imaging.readers.dicom_file import is_projection, open_dicom
from wardround.imaging.readers.dicom_inspect import find_dicom
from wardround.imaging.readers.labelled import LabelledImage
from wardround.imaging.readers.raw import is_raw
from wardround.imaging.readers.volume import Volume, space_of, write_nifti
from wardround.imaging.writers.dicom_seg import highdicom, write_seg
from wardround.runs.inputs import Input, Inputs, Opened, find_inputs
from wardround.runs.overlays import write_overlay
from wardround.runs.releases import USED, ReleaseUsed
from wardround.study.base import at
from wardround.tasks.contrasts import lacking
from wardround.tasks.predictions import Masks, Prediction, Probabilities
from wardround.tasks.task import Predicts, PredictsScans
from wardround.wire.files import reason, write_text, written

VOLUMES, PROBABILITIES, PATIENTS, OVERLAYS = "volumes.csv", "probabilities.csv", "patients.csv", "overlays"


@dataclass(frozen=True)
class Structure:
    """What was outlined of one structure: its number in the mask, voxels, and mL where a voxel's size is known."""

    name: str
    label: int
    voxels: int
    volume_ml: float | None


@dataclass(frozen=True)
class Outline:
    """The outlines in one image: the mask's file, a picture of them, and each structure's volume."""

    source: Path
    patient: str
    image: str
    output: Path
    overlay: Path
    structures: tuple[Structure, ...]
    minds: tuple[str, ...] = ()

    @property
    def said(self) -> str:
        """For people."""
        each = ", ".join(
            f"{one.name} " + (f"{one.voxels} pixels" if one.volume_ml is None else f"{one.volume_ml:.2f} mL")
            for one in self.structures
        )
        return "\n".join((f"Outlined {each}. Wrote {self.output}. Research use only.", *self.minds))


@dataclass(frozen=True)
class Diagnosis:
    """What a patient's images show: the mean of the probabilities of all of them, and those of each by its name."""

    source: Path
    patient: str
    whole: Probabilities
    images: Mapping[str, Probabilities]
    minds: tuple[str, ...] = ()

    @property
    def probabilities(self) -> dict[str, float]:
        """By class, of the patient."""
        return self.whole.by_name

    @property
    def called(self) -> tuple[str, ...]:
        """The likeliest class; where several are possible at once, those above a half."""
        return self.whole.called

    @property
    def said(self) -> str:
        """For people."""
        each = ", ".join(f"{name} {value:.3f}" for name, value in self.probabilities.items())
        called = f"{', '.join(self.called) or 'none of the classes'} ({each}). Research use only."
        return "\n".join((called, *self.minds))


@dataclass(frozen=True)
class Failure:
    """A patient whose images cannot be used: `reason` names no file or patient, `detail` may."""

    source: Path
    patient: str
    reason: str
    detail: str = ""


@dataclass
class ImagePredictor:
    """A released model of images, opened once, for any number of inputs; its results lie in the folder `out`.

    One of a chain takes raw data, too; `coils` are the numbers of coils that it was trained with.
    """

    task: Predicts
    network: nn.Module
    release: ReleaseUsed
    out: Path
    tell: Callable[[Outline | Diagnosis], None] = lambda _: None
    coils: tuple[int, ...] = ()
    done: list[Outline | Diagnosis] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)

    def __call__(self, sources: Sequence[Path]) -> Path | None:
        """Predict every patient of every source; returns the table, which lists what was done, where anything was.

        Who cannot be predicted is in `failed`, and the others go on. Raises `StudyError` where two inputs are named
        alike or results would lie over an input, and `MissingExtra` for a DICOM series without the library.
        """
        found: list[tuple[Path, str, Sequence[Input]]] = []
        patterns = self.task.patterns()
        for source in sources:
            try:
                inputs = self._inputs(source, patterns)
            except DataError as error:
                self.failed.append(Failure(source, "", str(error), error.detail))
                continue
            found += [(source, patient, images) for patient, images in inputs.patients.items()]
            self.failed += [Failure(source, one.patient, one.reason, one.detail) for one in inputs.aside]
        self._check([image for *_, images in found for image in images])
        for source, patient, images in found:
            try:
                results = self._patient(source, patient, images)
            except WardroundError as error:
                self.failed.append(Failure(source, patient, str(error), error.detail))
                continue
            self.done += results
            for result in results:
                self.tell(result)
        table = self._table()
        if table is not None:
            self.release.write(self.out / USED)
        return table

    def _inputs(self, source: Path, patterns: Patterns) -> Inputs:
        # An ending that a reader outside takes for images is one of images.
        if isinstance(self.task, PredictsScans) and source.suffix not in patterns.readers and _raw(source):
            scanning = self.task.scanning()
            if source.is_dir() or not scanning.raw:
                raise DataError(
                    f"a chain of {scanning.kind.upper()} reads no raw data of this kind; give it images, which are "
                    "scanned first",
                    detail=str(source),
                )
            return Inputs({source.stem: [at(scanning.raw)(source, self.coils, scanning)]})
        return find_inputs(source, patterns)

    def _said(self, opened: Opened) -> tuple[Opened, Prediction]:
        """What the model says, and with it the image that is shown: of a chain the one that it reconstructed."""
        if opened.scans is not None and isinstance(self.task, PredictsScans):
            said: Prediction = self.task.predict_scans(self.network, opened.scans)
        else:
            said = self.task.predict(self.network, opened.image)
        if isinstance(said, Masks) and said.images is not None:
            shown = np.ascontiguousarray(said.images * np.float32(opened.scale))
            return replace(opened, image=replace(opened.image, channels=shown)), said
        return opened, said

    def _check(self, images: Sequence[Input]) -> None:
        if any(image.dicom for image in images):
            highdicom()
        names = Counter(_safe(image.name).casefold() for image in images)
        if doubled := [image for image in images if names[_safe(image.name).casefold()] > 1]:
            raise StudyError(
                "several inputs have one name, and so would their results; predict them into folders of their own",
                detail=", ".join(str(image.source) for image in doubled[:10]),
            )
        if self.out.exists() and not self.out.is_dir():
            raise StudyError("the output of a model of images is a folder; give a folder", detail=str(self.out))
        if self.out.name.endswith((".nii", ".nii.gz", ".csv", ".dcm", ".png")):
            raise StudyError(
                "a model of images writes several files: give a folder as the output", detail=str(self.out)
            )
        folder = self.out.resolve()
        if over := [image for image in images if folder in (image.source.resolve(), image.source.resolve().parent)]:
            raise StudyError("the output would lie among the inputs; choose another folder", detail=str(over[0].source))

    def _patient(self, source: Path, patient: str, images: Sequence[Input]) -> list[Outline | Diagnosis]:
        """All images are predicted before anything of the patient is written."""
        found = []
        for image in images:
            found.append((image, *self._said(image.read())))
        outlines = [(image, opened, said) for image, opened, said in found if isinstance(said, Masks)]
        if outlines:
            return [self._outline(source, image, opened, masks) for image, opened, masks in outlines]
        named = {image.id: said for image, _, said in found if isinstance(said, Probabilities)}
        simulated = isinstance(self.task, PredictsScans) and any(opened.scans is None for _, opened, _ in found)
        minds = (f"{self._scanned}.",) if simulated else ()
        without = dict.fromkeys(mind for _, opened, _ in found for mind in (*opened.minds, *self._lacking(opened)))
        return [_diagnosis(source, patient, named, (*minds, *without))]

    def _outline(self, source: Path, image: Input, opened: Opened, masks: Masks) -> Outline:
        name, overlay = _safe(image.name), self.out / OVERLAYS / f"{_safe(image.name)}.png"
        minds: tuple[str, ...] = ()
        try:
            if opened.series is not None:
                output = self.out / f"{name}.dcm"
                minds = (f"Mind: slices may be missing: {opened.series.gaps}.",) if opened.series.gaps else ()
                frames = opened.image.space.restored(masks.marked)
                write_seg(
                    opened.series.headers,
                    frames,
                    masks.names,
                    output,
                    f"{self.release.short}, study {self.release.study}",
                )
            else:
                output = _write_labels(masks, opened.image, image.source, self.out / name)
            if masks.images is not None:
                minds = (*minds, self._reconstructed(opened, image, name))
            minds = (*minds, *opened.minds, *self._lacking(opened))
            write_overlay(opened.image, masks.marked, masks.names, overlay)
        except OSError as error:
            raise DataError(f"the output cannot be written ({reason(error)})", detail=str(self.out)) from error
        return Outline(source, image.patient, image.id, output, overlay, _measured(masks, opened.image), minds)

    def _lacking(self, opened: Opened) -> tuple[str, ...]:
        """What is said of an image that lacks contrasts; nothing of a whole one."""
        lacks = lacking(opened.image, self.task.patterns().images)
        return (f"Mind: the image has no {', no '.join(lacks)}; the model did without.",) if lacks else ()

    def _reconstructed(self, opened: Opened, image: Input, name: str) -> str:
        """Write what a chain reconstructed, a file a channel; returns what is said of it."""
        files = []
        for number, channel in enumerate(opened.image.channels, 1):
            part = f"-{number}" if len(opened.image.channels) > 1 else ""
            files.append(self.out / f"{name}-image{part}.nii.gz")
            volume = channel if channel.ndim == 3 else channel[..., None]
            _write_volume(volume, opened.image, image.source, files[-1], np.float32)
        where = ", ".join(file.name for file in files)
        if opened.scans is not None:
            return f"Reconstructed from k-space: {where}."
        return f"{self._scanned} and reconstructed: {where}."

    @property
    def _scanned(self) -> str:
        assert isinstance(self.task, PredictsScans)
        return f"The image was scanned by the study's simulated scanner first ({self.task.scanning().describe()})"

    def _table(self) -> Path | None:
        outlines = [one for one in self.done if isinstance(one, Outline)]
        diagnoses = [one for one in self.done if isinstance(one, Diagnosis)]
        if outlines:
            return _csv(self.out / VOLUMES, _VOLUME_COLUMNS, _volume_rows(outlines))
        if not diagnoses:
            return None
        classes = diagnoses[0].whole.names
        if any(len(one.images) > 1 for one in diagnoses):
            patients = ((one.patient, *_cells(one.whole)) for one in diagnoses)
            _csv(self.out / PATIENTS, ("patient", "called", *classes), patients)
        each = ((one.patient, name, *_cells(said)) for one in diagnoses for name, said in one.images.items())
        return _csv(self.out / PROBABILITIES, ("patient", "image", "called", *classes), each)


def _diagnosis(source: Path, patient: str, images: Mapping[str, Probabilities], minds: tuple[str, ...]) -> Diagnosis:
    first = next(iter(images.values()))
    mean = np.mean([one.values for one in images.values()], axis=0)
    return Diagnosis(source, patient, Probabilities(first.names, mean, first.exclusive), images, minds)


def _write_labels(masks: Masks, image: LabelledImage, source: Path, base: Path) -> Path:
    """The structures as one number a voxel, on the grid and place of the input: NIfTI, of a picture PNG."""
    labels = masks.labels()
    if labels.ndim == 2:
        output = base.with_name(f"{base.name}.png")
        buffer = io.BytesIO()
        Image.fromarray(labels.astype(np.uint8) if len(masks.names) < 256 else labels).save(buffer, "PNG")
        with written(output) as file:
            file.write(buffer.getbuffer())
        return output
    output = base.with_name(f"{base.name}.nii.gz")
    _write_volume(labels, image, source, output, np.uint8 if len(masks.names) < 256 else np.uint16)
    return output


def _write_volume(values: NDArray[Any], image: LabelledImage, source: Path, output: Path, dtype: type[Any]) -> None:
    """NIfTI of values (*shape) on the grid and place of the input."""
    space = image.space
    spacing = (*(space.spacing or ()), 1.0, 1.0, 1.0)[:3]
    affine = np.diag([*spacing, 1.0]) if space.affine is None else space.affine
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    header = space_of(source) if source.name.endswith((".nii", ".nii.gz")) else None
    restored = np.ascontiguousarray(space.restored(values), np.float32)
    write_nifti(Volume(restored, (sides[0], sides[1], sides[2]), affine, header), output, dtype)


def _measured(masks: Masks, image: LabelledImage) -> tuple[Structure, ...]:
    """Each structure counted whole, also where the mask shows another over it."""
    spacing = image.space.spacing
    voxel_ml = float(np.prod(spacing)) / 1000 if spacing is not None and len(spacing) == 3 else None
    counts = [int(mask.sum()) for mask in masks.marked]
    return tuple(
        Structure(name, number, count, None if voxel_ml is None else count * voxel_ml)
        for number, (name, count) in enumerate(zip(masks.names, counts, strict=True), 1)
    )


_VOLUME_COLUMNS = ("patient", "image", "structure", "label", "voxels", "volume_ml", "file")


def _volume_rows(outlines: Iterable[Outline]) -> Iterable[tuple[str, ...]]:
    for one in outlines:
        for each in one.structures:
            volume = "" if each.volume_ml is None else f"{each.volume_ml:.4f}"
            yield (one.patient, one.image, each.name, str(each.label), str(each.voxels), volume, one.output.name)


def _cells(said: Probabilities) -> tuple[str, ...]:
    return (";".join(said.called), *(f"{value:.6f}" for value in said.values))


def _csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Path:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    try:
        write_text(path, text.getvalue())
    except OSError as error:
        raise DataError(f"the table cannot be written ({reason(error)})", detail=str(path)) from error
    return path


def _raw(source: Path) -> bool:
    """Whether an input holds raw data: an array, or projections of CT in DICOM."""
    if not source.is_dir():
        return is_raw(source)
    first = next((path for path in series_files(source) if find_dicom(path)), None)
    return first is not None and is_projection(open_dicom(first, pixels=False))


def _safe(name: str) -> str:
    """A name of a file in the output's folder, whatever a table calls a patient."""
    return re.sub(r"[^\w.^ +=-]", "_", name).lstrip(".") or "_"
