"""Small MR series in DICOM with outlines as DICOM SEG, as scanners and viewers write them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from wardround.imaging.writers.dicom_seg import write_seg

MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"
OBLIQUE = ((0.8, 0.6, 0.0), (-0.6, 0.8, 0.0))
# Rows to the right, columns to the front, in DICOM's coordinates, which run to the left and back.
UPRIGHT = ((0.0, -1.0, 0.0), (-1.0, 0.0, 0.0))


def mr_series(
    folder: Path,
    array: np.ndarray,
    step: float = 3.0,
    leave_out: int | None = None,
    axes: tuple[Sequence[float], Sequence[float]] = OBLIQUE,
    corner: Sequence[float] = (-30.0, 12.0, -4.0),
    spacing: tuple[str, str] = ("1.5", "1.25"),
    frame: str | None = None,
) -> list[FileDataset]:
    """Slices (rows, columns, slices) as a scanner writes them, in no order of their names; their headers in order.

    `axes` are the directions along a row and along a column.
    """
    folder.mkdir(parents=True)
    series, study, frame = generate_uid(), generate_uid(), frame or generate_uid()
    made = []
    for number in range(array.shape[-1]):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MR_IMAGE
        header = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        header.SOPClassUID = MR_IMAGE
        header.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = generate_uid()
        header.Modality, header.PatientName, header.PatientID = "MR", "MUELLER^ANNA", "PAT-7731"
        header.PatientBirthDate, header.PatientSex, header.StudyDate, header.StudyTime = "19510423", "F", "", ""
        header.AccessionNumber = header.StudyID = header.ReferringPhysicianName = ""
        header.StudyInstanceUID, header.SeriesInstanceUID, header.FrameOfReferenceUID = study, series, frame
        header.SeriesNumber, header.InstanceNumber, header.Manufacturer = 4, number + 1, "SIEMENS"
        header.PixelSpacing, header.SliceThickness, header.PositionReferenceIndicator = list(spacing), f"{step:g}", ""
        header.ImageOrientationPatient = [*axes[0], *axes[1]]
        header.ImagePositionPatient = [float(value) for value in (*corner[:2], corner[2] + step * number)]
        header.Rows, header.Columns, header.SamplesPerPixel = *array.shape[:2], 1
        header.PhotometricInterpretation, header.PixelRepresentation = "MONOCHROME2", 0
        header.BitsAllocated, header.BitsStored, header.HighBit = 16, 12, 11
        header.PixelData = array[..., number].astype("<u2").tobytes()
        made.append(header)
        if number != leave_out:
            header.save_as(folder / f"{(7 * number) % 11:02d}.dcm", enforce_file_format=True)
    return made


def seg_of(headers: Sequence[FileDataset], masks: np.ndarray, path: Path, names: Sequence[str] = ()) -> Path:
    """Write masks (K, rows, columns, slices) on slices as one SEG, a segment each, numbered from 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_seg(headers, masks.astype(bool), names or [f"s{n}" for n in range(1, len(masks) + 1)], path, "test")
    return path


def as_dicom(root: Path, target: Path) -> None:
    """Copy `SITE/PATIENT/{image,mask}.nii.gz` of upright voxels as series `image/` and SEG `mask.dcm`."""
    for image in sorted(root.rglob("image.nii.gz")):
        folder = target / image.parent.relative_to(root)
        found: Any = nibabel.load(image)
        mask: Any = np.asarray(nibabel.load(image.with_name("mask.nii.gz")).dataobj)  # type: ignore[attr-defined]
        sides = np.diag(found.affine)
        place = {"corner": (0.0, 0.0, 0.0), "spacing": (f"{sides[0]:g}", f"{sides[1]:g}"), "step": float(sides[2])}
        headers = mr_series(folder / "image", np.asarray(found.dataobj), axes=UPRIGHT, **place)
        seg_of(headers, mask[None] > 0, folder / "mask.dcm")
