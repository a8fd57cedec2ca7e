"""Synthetic CT in DICOM: a phantom's slices as a scanner would write them, to be spoiled by tests."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

PATIENT = "MUELLER^ANNA"
PATIENT_ID = "PAT-7731"
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"

Change = Callable[[FileDataset], None]


def body(size: tuple[int, int] = (64, 64), seed: int = 0) -> NDArray[np.int16]:
    """An elliptic body of water with bone and lung in noisy air, whole HU."""
    random = np.random.default_rng(seed)
    y, x = (np.linspace(-1, 1, n) for n in size)
    y, x = y[:, None], x[None]
    hu = np.full(size, -1000.0)
    hu[(x / 0.7) ** 2 + (y / 0.5) ** 2 < 1] = 30
    hu[(x - 0.3) ** 2 + y**2 < 0.04] = -820
    hu[(x + 0.35) ** 2 + (y - 0.1) ** 2 < 0.01] = 900
    noisy = hu + random.normal(0, 8, size)
    return np.round(np.maximum(noisy, -1024)).astype(np.int16)


def ct_header(position: float = 0.0, number: int = 1) -> FileDataset:
    """A header with all a CT image needs, but pixels."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CT_IMAGE
    header = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    header.SOPClassUID = CT_IMAGE
    header.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = generate_uid()
    header.Modality = "CT"
    header.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    header.PatientName, header.PatientID, header.PatientSex = PATIENT, PATIENT_ID, "F"
    header.PatientBirthDate, header.StudyDate, header.StudyTime = "19510423", "20190214", "101500"
    header.AccessionNumber, header.StudyID, header.ReferringPhysicianName = "ACC-4471", "88", "DOE^JOHN"
    header.StudyInstanceUID, header.SeriesInstanceUID = "1.2.826.0.1.11", "1.2.826.0.1.22"
    header.FrameOfReferenceUID, header.PositionReferenceIndicator = "1.2.826.0.1.33", ""
    header.SeriesNumber, header.InstanceNumber, header.SeriesDescription = 3, number, "CHEST 5MM"
    header.Manufacturer, header.ManufacturerModelName = "SIEMENS", "Sensation 16"
    header.KVP, header.XRayTubeCurrent, header.ConvolutionKernel = "120", "251", "B20f"
    header.SliceThickness, header.ReconstructionDiameter = "5", "352"
    header.DistanceSourceToDetector, header.DistanceSourceToPatient = "1040", "570"
    header.GantryDetectorTilt, header.PatientPosition = "0.0", "HFS"
    header.PixelSpacing = ["0.8", "0.6"]
    header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    header.ImagePositionPatient = [-100, -120, position]
    return header


def set_pixels(header: FileDataset, hu: NDArray[np.int16], *, signed: bool = False, intercept: int = -1024) -> None:
    """Store whole HU as a scanner does."""
    stored = hu.astype(np.int32) - intercept
    header.Rows, header.Columns = hu.shape
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16 if signed else 12, 15 if signed else 11
    header.PixelRepresentation = int(signed)
    header.RescaleSlope, header.RescaleIntercept, header.RescaleType = "1", str(intercept), "HU"
    header.PixelData = stored.astype("<i2" if signed else "<u2").tobytes()


def write_slice(
    path: Path, hu: NDArray[np.int16] | None = None, *, position: float = 0.0, number: int = 1, change: Change = id
) -> Path:
    """Write one CT image; `change` may spoil it."""
    header = ct_header(position, number)
    set_pixels(header, body() if hu is None else hu)
    change(header)
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)
    return path


def write_series(folder: Path, positions: Sequence[float] = (0.0, 5.0, 10.0, 15.0), *, change: Change = id) -> Path:
    """Write a series, its files in an order that is not the slices'."""
    for number, position in enumerate(positions, start=1):
        name = f"IM{(7 * number) % 100:03d}"
        write_slice(folder / name, body(seed=number), position=position, number=number, change=change)
    return folder


def setting(**values: object) -> Change:
    """A change that sets elements of the header; None deletes one."""

    def change(header: Dataset) -> None:
        with warnings.catch_warnings():
            # pydicom warns of values that the standard forbids: those are the ones wanted here.
            warnings.simplefilter("ignore")
            for keyword, value in values.items():
                if value is None:
                    delattr(header, keyword)
                else:
                    setattr(header, keyword, value)

    return change
