"""BART's pair of files: NAME.hdr says the dimensions, NAME.cfl holds complex64 in column-major order.

Of BART's sixteen dimensions these may be longer than one: 0 readout, 1 phase encode, 2 partition, 3 coil, 13 slice. A
scan with partitions is three-dimensional: see `wardround.imaging.readers.raw.slices`. Another dimension (echo, time,
average) is refused: one of it is taken with `bart slice`.

A scan along a trajectory has 1, samples, readouts in dimensions 0 to 2, and beside it NAME_traj.hdr and NAME_traj.cfl:
the points, three (x, y, z) in dimension 0, in cycles per field of view. x is along H.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wardround.imaging.readers.raw.slices import ComplexArray, RawSlices, check_centred, raw_error, to_positions
from wardround.imaging.readers.raw.trajectory import flat, points_file, scan_along
from wardround.wire.files import reason

_COIL, _SLICE = 3, 13
_USED = (0, 1, 2, _COIL, _SLICE)
_MOST_VOLUME = 1 << 29


def read_bart(path: Path) -> RawSlices:
    """Open NAME.cfl, or NAME.hdr. Raises DataError for a pair that is not complete or does not fit together."""
    header, samples = path.with_suffix(".hdr"), path.with_suffix(".cfl")
    sizes = _dimensions(header)
    others = [f"{number} has {size}" for number, size in enumerate(sizes) if size > 1 and number not in _USED]
    if others:
        raise raw_error(
            f"of BART's dimensions only {', '.join(map(str, _USED))} may be longer than 1, and {', '.join(others)}; "
            "take one of it with `bart slice`",
            samples,
        )
    points = points_file(samples)
    if points.exists() or (sizes[0] == 1 and sizes[1] > 1 and sizes[2] > 1):
        return _along(samples, header, sizes, points)
    whole = _mapped(samples, sizes)
    read, phase, partition, coils, count = (sizes[number] for number in _USED)
    array = whole.reshape((read, phase, partition, coils, -1), order="F")[..., :count]
    if partition == 1:

        def plane(number: int) -> ComplexArray:
            return np.ascontiguousarray(array[:, :, 0, :, number].transpose(2, 0, 1))

        check_centred(np.abs(plane(count // 2)), samples)
        return RawSlices("BART", (count, coils, read, phase), plane, files=(samples, header))
    if math.prod((read, phase, partition, coils)) > _MOST_VOLUME:
        raise raw_error(f"a three-dimensional scan has more than {_MOST_VOLUME:,} samples", samples)

    @lru_cache(maxsize=1)
    def volume(number: int) -> ComplexArray:
        return to_positions(np.asarray(array[..., number]), 0)

    def position(number: int) -> ComplexArray:
        return np.ascontiguousarray(volume(number // read)[number % read].transpose(2, 0, 1))

    shape = (count * read, coils, phase, partition)
    return RawSlices("BART, three-dimensional", shape, position, files=(samples, header))


def _along(samples: Path, header: Path, sizes: list[int], points: Path) -> RawSlices:
    """A scan along the trajectory of the pair `points`."""
    if not points.exists():
        raise raw_error(
            "BART's dimension 0 has length 1, as in scans along a trajectory, which is missing: put it beside as "
            "NAME_traj.cfl with NAME_traj.hdr",
            samples,
        )
    lengths = _dimensions(points.with_suffix(".hdr"))
    _, count, readouts, coils, slices = (sizes[number] for number in _USED)
    if sizes[0] != 1 or lengths[0] not in (2, 3) or lengths[1:3] != sizes[1:3] or lengths[_SLICE] not in (1, slices):
        raise raw_error(
            "a trajectory in BART has the dimensions 3, samples, readouts, and its k-space 1, as many samples, as many "
            f"readouts; they are {_listed(lengths)} and {_listed(sizes)}",
            samples,
        )
    stored = _mapped(points, lengths).reshape((*lengths[:3], -1), order="F")[..., : lengths[_SLICE]]
    if stored.shape[-1] * math.prod(lengths[:3]) != math.prod(lengths) or np.abs(stored.imag).max(initial=0.0) > 0:
        raise raw_error("a trajectory in BART holds real numbers, in dimensions 0, 1, 2 and 13 alone", points)
    # (slices, readouts, samples, axes)
    plane = flat(stored.real.transpose(3, 2, 1, 0), samples)
    whole = _mapped(samples, sizes).reshape((count, readouts, coils, -1), order="F")[..., :slices]
    return scan_along(whole.transpose(3, 2, 1, 0), plane, "BART", samples, header, points)


def _listed(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes[:_COIL]))


def _dimensions(header: Path) -> list[int]:
    try:
        lines = header.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        said = f"the header (.hdr) of a BART file (.cfl) cannot be read ({reason(error)})"
        raise raw_error(f"{said}; keep the two side by side", header) from error
    texts = [line for line in lines if line.strip() and not line.startswith("#")]
    try:
        sizes = [int(word) for word in texts[0].split()]
    except (IndexError, ValueError) as error:
        raise raw_error("the header (.hdr) of a BART file (.cfl) names no dimensions", header) from error
    if not sizes or min(sizes) < 1 or len(sizes) > 64:
        raise raw_error("the header (.hdr) of a BART file (.cfl) names impossible dimensions", header, str(sizes))
    return sizes + [1] * (_SLICE + 1 - len(sizes))


def _mapped(path: Path, sizes: list[int]) -> NDArray[np.complex64]:
    """The samples, mapped: a header that says more than the file holds takes no memory."""
    try:
        size = path.stat().st_size
        if size != 8 * math.prod(sizes):
            raise raw_error(
                f"a BART file (.cfl) holds {size:,} bytes and its header says {8 * math.prod(sizes):,}; it was cut "
                "short, or belongs to another header",
                path,
            )
        mapped: NDArray[np.complex64] = np.memmap(path, np.dtype("<c8"), mode="r")
    except OSError as error:
        raise raw_error(f"a BART file (.cfl) cannot be read ({reason(error)})", path) from error
    return mapped
