"""A derived CT series: new images of a patient's study, in DICOM, that say what they are."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from io import BytesIO
from pathlib import Path
from textwrap import shorten

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from wardround.errors import DataError
from wardround.imaging.readers.dicom import CTSeries
from wardround.imaging.readers.dicom_file import guarded, path_of, text
from wardround.imaging.readers.hounsfield import AIR
from wardround.imaging.readers.volume import FloatArray

PURPOSE = "Wardround, research use only"
_INTERCEPT = -1024
_HIGHEST = 2**15 - 1 + _INTERCEPT

# What a derived image shares with its source (DICOM PS3.3, A.3): whose it is, of which study, where in space, and
# how it was acquired. Everything else, private elements above all, stays behind.
_KEPT = (
    # patient and study
    "SpecificCharacterSet",
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "ReferringPhysicianName",
    # place
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "SliceLocation",
    "PatientPosition",
    "Laterality",
    "BodyPartExamined",
    "InstanceNumber",
    # acquisition
    "AcquisitionNumber",
    "AcquisitionDate",
    "AcquisitionTime",
    "KVP",
    "XRayTubeCurrent",
    "ExposureTime",
    "Exposure",
    "FilterType",
    "DataCollectionDiameter",
    "ReconstructionDiameter",
    "DistanceSourceToDetector",
    "DistanceSourceToPatient",
    "GantryDetectorTilt",
    "TableHeight",
    "RotationDirection",
    "ConvolutionKernel",
    "ContrastBolusAgent",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)
# Of these, what a CT image must have though nobody may know it (type 2): empty where the source has none.
_EMPTY = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
    "PatientPosition",
    "SliceThickness",
    "InstanceNumber",
    "AcquisitionNumber",
    "KVP",
)
_EQUIPMENT = ("Manufacturer", "ManufacturerModelName", "InstitutionName", "StationName", "SoftwareVersions")


def write_derived(series: CTSeries, images_hu: FloatArray, folder: Path, description: str) -> tuple[Path, ...]:
    """Write images derived from a series as a new series of the same patient and study; return its files in order.

    `images_hu` (rows, columns, slices) in HU lie where the series' slices do. They are stored in whole HU, cut off
    below at -1024, uncompressed; an image whose source was once compressed with loss keeps saying so. `description`
    says what was done to them, and must not name a patient. Times are those of the source's time zone, or local where
    it names none. A source without a frame of reference shares none with other series, so the images get one of their
    own. The folder appears whole or not at all.
    Raises DataError where the folder exists, the source belongs to no study or to several, or the images have another
    shape or values that CT cannot have.
    """
    _check(series, images_hu, folder)
    new = _New.beside(series.headers[0])
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
    names = [f"slice_{index + 1:04d}.dcm" for index in range(len(series.headers))]
    try:
        for index, (header, name) in enumerate(zip(series.headers, names, strict=True)):
            image = _derived(header, series.lossy, new, description)
            _set_pixels(image, images_hu[..., index])
            (draft / name).write_bytes(_encoded(image, path_of(header)))
        draft.chmod(0o755)
        os.rename(draft, folder)
    except OSError as error:
        raise DataError(
            "a derived series cannot be written; see whether the disk is full", detail=str(error)
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return tuple(folder / name for name in names)


@dataclass(frozen=True)
class _New:
    """What all images of a derived series share and their source does not have."""

    series: str
    frame: str
    now: datetime
    offset: str | None

    @classmethod
    def beside(cls, source: FileDataset) -> _New:
        """Identifiers, and this moment in the source's time zone, which may be another than this machine's.

        An offset from UTC holds for all times of a header, those copied from the source, too.
        """
        series, frame = generate_uid(prefix=None), generate_uid(prefix=None)
        offset = re.fullmatch(r"([+-])(0\d|1[0-4])([0-5]\d)", text(source, "TimezoneOffsetFromUTC") or "")
        if offset is None:
            return cls(series, frame, datetime.now().astimezone(), None)
        east = timedelta(hours=int(offset[2]), minutes=int(offset[3])) * (-1 if offset[1] == "-" else 1)
        return cls(series, frame, datetime.now(timezone(east)), offset[0])


def _check(series: CTSeries, images_hu: FloatArray, folder: Path) -> None:
    if folder.exists():
        raise DataError("the folder of a derived series exists already; name a new one", detail=str(folder))
    studies = {text(header, "StudyInstanceUID") for header in series.headers}
    if None in studies or len(studies) > 1:
        count = "none" if None in studies else len(studies)
        raise DataError(
            f"a derived series must belong to one study, but its source's headers name {count} (StudyInstanceUID); "
            "export the series again, or write NIfTI",
            detail=str(path_of(series.headers[0]).parent),
        )
    if images_hu.shape != series.data.shape:
        raise DataError(f"derived images have shape {images_hu.shape}, their series {series.data.shape}")
    if not np.isfinite(images_hu).all():
        raise DataError("derived images hold NaN or infinite values; they are no CT")
    if images_hu.max() > _HIGHEST:
        raise DataError(f"derived images reach {images_hu.max():g} HU; DICOM CT holds {_HIGHEST} at most")


def _derived(source: FileDataset, lossy: bool, new: _New, description: str) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    with guarded("a derived DICOM image cannot be made: its source's header is broken", path_of(source)):
        for keyword in _KEPT:
            if keyword in source:
                image[keyword] = source[keyword]
        for keyword in _EMPTY:
            if keyword not in image:
                setattr(image, keyword, None)
        if not image.get("FrameOfReferenceUID"):
            image.FrameOfReferenceUID = new.frame
        image.SOPClassUID = meta.MediaStorageSOPClassUID = source.SOPClassUID
        image.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = generate_uid(prefix=None)
        image.SeriesInstanceUID = new.series
        image.SeriesNumber = int(source.get("SeriesNumber") or 0) + 9000
        image.SeriesDescription = f"{shorten(description, 32, placeholder='')} ({PURPOSE})"[:64]
        image.Modality, image.ImageType = "CT", ["DERIVED", "SECONDARY", "AXIAL"]
        image.DerivationDescription = f"{PURPOSE}: {description}"[:1024]
        image.SourceImageSequence = [_reference(source)]
        image.ContributingEquipmentSequence = [_wardround(new.now), _scanner(source)]
        image.Manufacturer, image.ManufacturerModelName = "Wardround", "Wardround"
        image.LossyImageCompression = "01" if lossy else "00"
        image.BurnedInAnnotation = "NO"
        image.ContentDate = image.InstanceCreationDate = image.SeriesDate = new.now.strftime("%Y%m%d")
        image.ContentTime = image.InstanceCreationTime = image.SeriesTime = new.now.strftime("%H%M%S")
        if new.offset:
            image.TimezoneOffsetFromUTC = new.offset
    return image


def _set_pixels(image: FileDataset, hu: FloatArray) -> None:
    stored = np.rint(np.maximum(hu, AIR)).astype(np.int32) - _INTERCEPT
    image.Rows, image.Columns = hu.shape
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
    image.RescaleSlope, image.RescaleIntercept, image.RescaleType = "1", str(_INTERCEPT), "HU"
    image.PixelData = stored.astype("<i2").tobytes()
    image["PixelData"].VR = "OW"


def _encoded(image: FileDataset, source: Path) -> bytes:
    buffer = BytesIO()
    with guarded("a derived DICOM image cannot be written: its source's header is broken", source):
        image.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def _reference(source: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    item.PurposeOfReferenceCodeSequence = [_code("121322", "Source image for image processing operation")]
    return item


def _wardround(now: datetime) -> Dataset:
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [_code("109102", "Processing Equipment")]
    item.Manufacturer, item.ContributionDescription = "Wardround", PURPOSE
    item.ContributionDateTime = now.strftime("%Y%m%d%H%M%S%z")
    return item


def _scanner(source: Dataset) -> Dataset:
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [_code("109101", "Acquisition Equipment")]
    for keyword in _EQUIPMENT:
        if keyword in source:
            item[keyword] = source[keyword]
    # Required, and may be empty only elsewhere.
    item.setdefault("Manufacturer", "unknown")
    return item


def _code(value: str, meaning: str) -> Dataset:
    """A code of DICOM's own terminology (PS3.16, CID 7202 and 7005)."""
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", meaning
    return code
