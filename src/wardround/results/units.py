"""Bytes, seconds and nested settings as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from wardround.study.acquisitions import AcquisitionSettings


def human_bytes(count: float) -> str:
    """Bytes in decimal units: `12.3 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """A duration: `8.2 s`, `3 min 20 s`, `1 h 5 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def ranges(numbers: list[int]) -> str:
    """Sorted whole numbers in short: `1–3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{low}" if low == high else f"{low}–{high}" for low, high in runs)


def in_rounds(numbers: list[int]) -> str:
    """`round 6` or `rounds 1–3, 7`, in order and without repeats."""
    found = sorted(set(numbers))
    return f"round{'s' if len(found) != 1 else ''} {ranges(found)}"


def flat(settings: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as (dotted key, text) pairs, in their order."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(settings, list | tuple):
        yield prefix, ", ".join(str(item) for item in settings) or "none"
    else:
        yield prefix, "none" if settings is None else str(settings)


def protocol(acquisition: AcquisitionSettings | None) -> str:
    """A protocol in a few words: `4× random, 8 coils, noise 0.005`, `fan_arc, 96 views, 30000 photons`."""
    return "" if acquisition is None else acquisition.describe()


def protocol_head(scanner: AcquisitionSettings) -> str:
    """How a table calls what a site's scanner does, or what is done with what it measured."""
    return "what is done with raw data" if scanner.measured else "simulated protocol"


def protocol_note(scanner: AcquisitionSettings) -> str:
    """What a reader must know of the raw data first."""
    if scanner.measured:
        return "Raw data measured by scanners."
    return "Simulated acquisitions, not raw data measured by a scanner."
