"""How a CT image was acquired, as far as its header says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import asdict, dataclass
from typing import TypeVar

from pydantic import ValidationError
from pydicom.dataset import Dataset

from wardround.errors import DataError
from wardround.imaging.readers.dicom_file import number, path_of, text
from wardround.study.ct import CTAcquisition
from wardround.study.protocols import HeaderFacts

Value = TypeVar("Value", str, float)
# No scanner or kernel is called like this; a name or an identifier that somebody typed into the field may be.
_NO_DEVICE = re.compile(r"\^|\d{6}")
# Whoever typed a name into the field of a device typed it into its own, too.
_NAMES = (
    "PatientName",
    "PatientID",
    "PatientBirthName",
    "OtherPatientNames",
    "OtherPatientIDs",
    "ReferringPhysicianName",
    "PerformingPhysicianName",
    "PhysiciansOfRecord",
    "OperatorsName",
)


@dataclass(frozen=True)
class CTProtocol:
    """Acquisition facts of a CT header; None where it says nothing.

    kVp in kV, tube current in mA, lengths in mm. `source_distance` is source to isocentre, `detector_distance`
    isocentre to detector. No fact identifies a patient.
    """

    vendor: str | None = None
    model: str | None = None
    kvp: float | None = None
    tube_current: float | None = None
    slice_thickness: float | None = None
    kernel: str | None = None
    source_distance: float | None = None
    detector_distance: float | None = None
    reconstruction_diameter: float | None = None

    @property
    def stated(self) -> tuple[str, ...]:
        """Names of the facts that the header states."""
        return tuple(name for name, value in asdict(self).items() if value is not None)

    @property
    def scanner(self) -> str | None:
        """Vendor and model in one text, as far as stated."""
        return " ".join(filter(None, (self.vendor, self.model))) or None


def protocol_of(header: Dataset) -> CTProtocol:
    """Read the acquisition facts of a CT header (DICOM PS3.3, C.8.2.1); zero stands for unknown, as vendors write it.

    Raises DataError where a number is none, or where the distances contradict each other.
    """
    source = _positive(header, "DistanceSourceToPatient")  # to the isocentre, by its definition
    whole = _positive(header, "DistanceSourceToDetector")
    if source is not None and whole is not None and whole <= source:
        raise DataError(
            f"a CT header says that the detector is nearer to the source ({whole:g} mm) than the isocentre "
            f"({source:g} mm); its distances are wrong",
            detail=str(path_of(header)),
        )
    named = {word for name in _NAMES for word in _words(text(header, name) or "")}

    def device(name: str) -> str | None:
        value = text(header, name)
        return None if value is None or named & _words(value) else value

    return CTProtocol(
        vendor=device("Manufacturer"),
        model=device("ManufacturerModelName"),
        kvp=_positive(header, "KVP"),
        tube_current=_positive(header, "XRayTubeCurrent"),
        slice_thickness=_positive(header, "SliceThickness"),
        kernel=device("ConvolutionKernel"),
        source_distance=source,
        detector_distance=None if source is None or whole is None else whole - source,
        reconstruction_diameter=_positive(header, "ReconstructionDiameter"),
    )


def _words(value: str) -> set[str]:
    """The words of a text that are long enough to name somebody."""
    return {word for word in re.split(r"[\W_]+", value.casefold()) if len(word) > 2}


def acquisition_from_header(header: Dataset | CTProtocol, default: CTAcquisition | None = None) -> CTAcquisition:
    """Return `default` with what the header states: kVp, slice thickness, kernel and, for fans, the distances.

    An image's header does not tell views, bins or dose: those stay the default's (by default, a new
    `CTAcquisition`). `protocol_of(header).stated` tells what came from the header.
    Raises DataError where a stated value is none that a scanner has.
    """
    protocol = header if isinstance(header, CTProtocol) else protocol_of(header)
    base = default or CTAcquisition()
    stated: dict[str, object] = {
        name: getattr(protocol, name)
        for name in ("kvp", "slice_thickness", "kernel")
        if getattr(protocol, name) is not None
    }
    if base.geometry.kind != "parallel" and protocol.source_distance and protocol.detector_distance:
        distances = {
            "source_distance": protocol.source_distance,
            "detector_distance": protocol.detector_distance,
        }
        stated["geometry"] = base.geometry.model_dump() | distances
    try:
        return CTAcquisition.model_validate(base.model_dump() | stated)
    except ValidationError as error:
        keys = ", ".join(".".join(str(part) for part in fault["loc"]) for fault in error.errors())
        raise DataError(f"a CT header describes no real scanner: see {keys}", detail=str(error)) from error


def facts_of(patients: Iterable[Set[CTProtocol]], minimum: int) -> HeaderFacts:
    """What a site's headers say of its scanners: each value that at least `minimum` patients have, sorted.

    `patients` are the protocols of each patient's images. How many have a value, and who, is not told.
    """
    seen = list(patients)

    def common(values: Iterable[Set[Value | None]]) -> tuple[Value, ...]:
        counts = Counter(value for of_patient in values for value in of_patient if value is not None)
        shown = (value for value, count in counts.items() if count >= minimum)
        return tuple(sorted(v for v in shown if not (isinstance(v, str) and _NO_DEVICE.search(v))))

    return HeaderFacts(
        scanners=common({one.scanner for one in protocols} for protocols in seen),
        kvp=common({one.kvp for one in protocols} for protocols in seen),
        slice_thickness=common({one.slice_thickness for one in protocols} for protocols in seen),
        kernels=common({one.kernel for one in protocols} for protocols in seen),
    )


def _positive(header: Dataset, keyword: str) -> float | None:
    value = number(header, keyword)
    if value is not None and value < 0:
        raise DataError(f"a CT header's {keyword} is negative ({value:g})", detail=str(path_of(header)))
    return value or None
