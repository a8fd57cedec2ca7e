"""Small hospitals of made-up thoraxes in Hounsfield units, and a CT study that trains on them in seconds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SIZE = 32
GEOMETRY = {
    "kind": "fan_flat",
    "size": [SIZE, SIZE],
    "pixel": 12.0,
    "views": 24,
    "bins": 48,
    "bin": 18.0,
    "source_distance": 595.0,
    "detector_distance": 490.6,
}
OTHER = GEOMETRY | {"kind": "fan_arc", "views": 16, "bins": 56, "bin": 16.0}
STUDY: dict[str, Any] = {
    "name": "tiny-ct",
    "seed": 5,
    "sites": {
        "A": {},
        "B": {"acquisition": {"kind": "ct", "photons": 3e4, "geometry": OTHER}},
        "New": {"role": "unseen", "scans": ["A", "B"], "acquisition": {"kind": "ct", "geometry": GEOMETRY}},
    },
    "acquisition": {"kind": "ct", "photons": 1e5, "geometry": GEOMETRY},
    "task": {
        "kind": "reconstruction",
        "size": [SIZE, SIZE],
        "evaluation": {
            "tuning_slices": 1,
            "slices": {"per_patient": 1},
            "tv_weights": [0.0003, 0.001],
        },
    },
    "model": {"kind": "unet", "preset": "tiny"},
    "local": {"steps": 2},
    "schedule": {"rounds": 2},
}


def ct_study(**changes: Any) -> dict[str, Any]:
    """The study with some top-level keys replaced."""
    return copy.deepcopy(STUDY) | changes


def thorax(seed: int, size: int = 80, spacing: float = 4.5, shift: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """An ellipse of tissue with two lungs and a spine, HU as int16 (size, size); `shift` of its middle in mm."""
    random = np.random.default_rng(seed)
    y, x = np.meshgrid(*((np.arange(size) - (size - 1) / 2) * spacing - s for s in shift), indexing="ij")
    image = np.full((size, size), -1000.0)
    image[(x / 150) ** 2 + (y / 105) ** 2 < 1] = random.uniform(20, 60)
    for side in (-1, 1):
        image[((x - side * 65) / 45) ** 2 + ((y + 5) / random.uniform(55, 70)) ** 2 < 1] = random.uniform(-870, -800)
    image[x**2 + (y - 65) ** 2 < 20**2] = random.uniform(300, 700)
    return image.astype(np.int16)


def save_dicom(
    image: np.ndarray, path: Path, spacing: float = 4.5, intercept: float = -1024.0, kernel: str = "B30f"
) -> None:
    """Write one axial CT image."""
    header = pydicom.Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid()
    header.SeriesInstanceUID, header.StudyInstanceUID = generate_uid(), generate_uid()
    header.Modality, header.ImageType = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"]
    header.PatientName, header.PatientID = "Doe^Jane", "4711"
    header.Manufacturer, header.ManufacturerModelName = "SIEMENS", "Sensation 16"
    header.KVP, header.SliceThickness, header.ConvolutionKernel = "120", "5", kernel
    header.Rows, header.Columns = image.shape
    header.PixelSpacing = [spacing, spacing]
    header.ImageOrientationPatient, header.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 0]
    header.RescaleSlope, header.RescaleIntercept = 1.0, intercept
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 0
    header.PixelData = (image.astype(np.int32) + 1024).astype(np.uint16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(path, enforce_file_format=True)


def save_nifti(images: list[np.ndarray], path: Path, spacing: float = 4.5) -> None:
    """Write slices as a volume whose axes run as DICOM's rows and columns do."""
    affine = np.array([[0, -spacing, 0, 0], [-spacing, 0, 0, 0], [0, 0, 5.0, 0], [0, 0, 0, 1.0]])
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.stack(images, -1), affine), path)  # type: ignore[no-untyped-call]


def make_ct_hospitals(root: Path) -> dict[str, Path]:
    """A with five patients of one or two DICOM slices each, B with four patients' NIfTI volumes of two slices.

    Every patient of A has the kernel B30f, those with two slices another one that nobody else has.
    """
    for number in range(5):
        for slice_ in range(1 + number % 2):
            path = root / "A" / f"Doe-Jane-{number}" / f"{slice_}.dcm"
            save_dicom(thorax(10 * number + slice_), path, kernel=f"B{number}0s" if slice_ else "B30f")
    for number in range(4):
        images = [thorax(100 + 10 * number + slice_) for slice_ in range(2)]
        save_nifti(images, root / "B" / f"Roe-Jim-{number}" / "ct.nii.gz")
    return {site: root / site for site in "AB"}
