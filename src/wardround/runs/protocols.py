"""The scanners that a released model was trained on: put into its file, read back, compared with an input's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from pydantic import ValidationError

from wardround.errors import DataError
from wardround.federation.release import PROTOCOLS
from wardround.imaging.readers.ct_protocol import CTProtocol
from wardround.plan.arms import FEDERATED, every_arm
from wardround.results.units import protocol
from wardround.study.load import FOREIGN
from wardround.study.protocols import ModelProtocols
from wardround.study.registry import Reading
from wardround.study.schema import Study

# What is told of a scan, and in which unit; a text has none.
Facts = Mapping[str, float | str]
# The same of scans in training: all values, or the ends of a range.
_Ranges = Mapping[str, Sequence[float | str]]
_UNITS = {
    "pixel": " mm",
    "bin": " mm",
    "source to isocentre": " mm",
    "isocentre to detector": " mm",
    "tube voltage": " kV",
    "slice thickness": " mm",
}
_TOLERANCE = 0.01  # relative; distances of one scanner are written with so much difference
_TOLERANCES = {"acceleration": 0.1}  # lines are whole, and some masks come only near to what was asked
_SHOWN = 6


def read_protocols(metadata: Mapping[str, str], study: Study, reading: Reading = FOREIGN) -> ModelProtocols:
    """The scanners in a model's metadata; a file from before they were written has those of its study.

    `reading` says which of them, if they are of a package outside, are read by its settings.
    Raises `DataError` where they cannot be read.
    """
    if PROTOCOLS not in metadata:
        arms = {arm.name: arm for arm in every_arm(study)}
        members = arms[metadata.get("arm", FEDERATED)].members
        return ModelProtocols(scanners={site: study.acquisition_of(site) for site in members if study.scans})
    try:
        return ModelProtocols.model_validate_json(metadata[PROTOCOLS], context=reading)
    except ValidationError as error:
        raise DataError(
            "the model file's scanners cannot be read; use the version of Wardround that wrote it",
            detail=" ".join(str(error).split()),
        ) from error


def lines(protocols: ModelProtocols) -> list[str]:
    """Every training scanner in full, one a line, and what headers said, for people."""
    found = []
    for site, acquisition in protocols.scanners.items():
        what = "raw data" if acquisition.measured else "simulated scanner"
        found.append(f"{what} of {site}: {_listed(acquisition.trained()) or acquisition.describe()}")
        if site in protocols.headers:
            found.append(f"  headers of {site}: {protocols.headers[site].text}")
    return found


def summary(protocols: ModelProtocols) -> str:
    """The training scanners in one line."""
    if not protocols.scanners:
        return "On which scanners it was trained is not known."
    sites = [f"{site} ({protocol(a)})" for site, a in protocols.scanners.items()]
    more = f" and {len(sites) - _SHOWN} others" if len(sites) > _SHOWN else ""
    measured = all(acquisition.measured for acquisition in protocols.acquisitions)
    what = "raw data" if measured else "simulated scanners"
    return f"Trained on the {what} of {', '.join(sites[:_SHOWN])}{more}."


def stated(header: CTProtocol) -> dict[str, float | str]:
    """What a CT header says, by the same names."""
    found = {
        "scanner": header.scanner,
        "tube voltage": header.kvp,
        "slice thickness": header.slice_thickness,
        "kernel": header.kernel,
    }
    return {name: value for name, value in found.items() if value is not None}


def warning(protocols: ModelProtocols, scan: Facts, header: Facts) -> str:
    """One line where a scan lies outside the range of those that the model was trained on; else nothing.

    `scan` is compared with the simulated protocols, `header` with what the training images' headers say, as far as
    the model knows.
    """
    known = [acquisition.trained() for acquisition in protocols.acquisitions]
    departures = [said for name, value in scan.items() if (said := _departure(name, value, _values(known, name)))]
    for name, value in header.items():
        if said := _departure(name, value, _header_values(protocols, name)):
            departures.append(said)
    if not departures:
        return ""
    return f"Mind: unlike the scanners that the model was trained on: {'; '.join(departures)}. Untested there."


def _values(known: Iterable[_Ranges], name: str) -> list[float | str]:
    return [value for facts in known for value in facts.get(name, ())]


def _header_values(protocols: ModelProtocols, name: str) -> Sequence[float | str]:
    found: list[float | str] = []
    for facts in protocols.headers.values():
        of_site: Mapping[str, Sequence[float | str]] = {
            "scanner": facts.scanners,
            "tube voltage": facts.kvp,
            "slice thickness": facts.slice_thickness,
            "kernel": facts.kernels,
        }
        found.extend(of_site[name])
    return found


def _departure(name: str, value: float | str, known: Sequence[float | str]) -> str:
    """How a value differs from those that are known; nothing where it does not, or none is known."""
    if not known:
        return ""
    numbers = [other for other in known if not isinstance(other, str)]
    if isinstance(value, str) or not numbers:
        others = sorted({str(other) for other in known})
        return "" if str(value) in others else f"{name} {value} (trained on {', '.join(others[:_SHOWN])})"
    low, high = min(numbers), max(numbers)
    tolerance = _TOLERANCES.get(name, _TOLERANCE)
    if low * (1 - tolerance) <= value <= high * (1 + tolerance):
        return ""
    return f"{name} {_plain(value)}{_UNITS.get(name, '')} (trained on {_span(name, numbers)})"


def _span(name: str, values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    unit = _UNITS.get(name, "")
    return f"{_plain(low)}{unit}" if math.isclose(low, high) else f"{_plain(low)} to {_plain(high)}{unit}"


def _listed(facts: _Ranges) -> str:
    found = []
    for name, values in facts.items():
        numbers = [value for value in values if not isinstance(value, str)]
        found.append(f"{name} {_span(name, numbers) if numbers else ' or '.join(map(str, values))}")
    return ", ".join(found)


def _plain(number: float) -> str:
    return f"{number:.4g}" if abs(number) < 1e4 else f"{number:,.0f}"
