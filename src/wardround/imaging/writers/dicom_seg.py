"""Outlines as a DICOM segmentation (SEG) that refers to the series they were found in; made by highdicom."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset
from pydicom.uid import generate_uid

from wardround.errors import DataError, MissingExtra
from wardround.imaging.readers.dicom_file import path_of, text
from wardround.imaging.writers.dicom import PURPOSE
from wardround.version import __version__
from wardround.wire.files import written

_LABEL = 64  # characters of a segment's label (VR LO)


def highdicom() -> Any:
    """The library that makes them; raises `MissingExtra`."""
    try:
        import highdicom
    except ImportError as error:
        raise MissingExtra("writing DICOM SEG", "seg") from error
    return highdicom


def write_seg(
    headers: Sequence[FileDataset], masks: NDArray[np.bool_], names: Sequence[str], path: Path, description: str
) -> None:
    """Write masks (K, rows, columns, slices) of the slices of a series, a segment a name, as one SEG file.

    Segments may overlap. The file is of the same patient, study and frame of reference, refers to the slices on which
    something is marked, and appears whole or not at all. `description` says what made it, and must not name a patient.
    Raises `MissingExtra` without highdicom, and `DataError` for a series whose header lacks what a SEG must have.
    """
    made = highdicom()
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        if any(text(header, keyword) is None for header in headers):
            raise DataError(
                f"a DICOM series has no {keyword}, which a SEG refers to; export it again, or convert it to NIfTI",
                detail=str(path_of(headers[0]).parent),
            )
    segments = [_segment(made, number, name) for number, name in enumerate(names, 1)]
    # (slices, rows, columns, segments)
    frames = np.ascontiguousarray(np.moveaxis(masks, (0, 3), (3, 0)))
    with warnings.catch_warnings():
        # pydicom warns of values that it repairs and quotes them; they are the series' own.
        warnings.simplefilter("ignore")
        try:
            seg = made.seg.Segmentation(
                source_images=list(headers),
                pixel_array=frames,
                segmentation_type=made.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=segments,
                series_instance_uid=generate_uid(),
                series_number=_series_number(headers[0]),
                sop_instance_uid=generate_uid(),
                instance_number=1,
                manufacturer="Wardround",
                manufacturer_model_name="Wardround",
                software_versions=__version__,
                device_serial_number="0",
                content_description=description[:_LABEL],
                series_description=PURPOSE,
                omit_empty_frames=bool(masks.any()),
            )
            buffer = BytesIO()
            seg.save_as(buffer)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise DataError(
                "no DICOM SEG can be made of a series' header; export the series again, or convert it to NIfTI",
                detail=f"{path_of(headers[0]).parent}: {error}",
            ) from error
    with written(path) as file:
        file.write(buffer.getbuffer())


def _segment(made: Any, number: int, name: str) -> Any:
    """A structure's description. A study names it in its own words: the code is private, tissue the widest category."""
    from pydicom.sr.codedict import codes

    name = name.replace("\\", "_")  # which separates values
    concept = made.sr.CodedConcept(value=name[:16], meaning=name[:_LABEL], scheme_designator="99WARDROUND")
    return made.seg.SegmentDescription(
        segment_number=number,
        segment_label=name[:_LABEL],
        segmented_property_category=codes.SCT.Tissue,
        segmented_property_type=concept,
        algorithm_type=made.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=made.AlgorithmIdentificationSequence(
            name="Wardround", family=codes.DCM.ArtificialIntelligence, version=__version__
        ),
    )


def _series_number(header: FileDataset) -> int:
    """One that the scanner did not give, as far as the series itself says."""
    found = text(header, "SeriesNumber")
    return 1000 + int(found) if found and found.isdigit() and len(found) < 7 else 1000
