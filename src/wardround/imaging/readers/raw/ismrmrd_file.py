"""ISMRMRD files: readouts in the order of their measurement, sorted here by what their headers say.

Inati et al., "ISMRM Raw data format", Magn. Reson. Med. 77 (2017), 411. The rules:

- Noise scans (flag 19) are set apart, for pre-whitening. Navigators, dummy scans, phase correction and separate
  calibration scans are left out.
- Averages, and lines that were measured again, are averaged. Each repetition, contrast, phase and set is an image by
  itself: slices run over (repetition, contrast, phase, set, slice), in this order.
- A line lies where its encoding step says, the centre of the header's limits in the middle. A partial echo lies where
  its centre sample says. What was not measured is 0.
- The readout's oversampling is removed: its middle positions are kept, those of the header's field of view.
- A readout that is flagged as reversed is turned round. Where only some are, as in EPI, odd and even lines need a phase
  correction first, so such a file is refused.
- A trajectory other than Cartesian is kept beside the samples, which are then in the order of their measurement. x lies
  along H, y along W; pixels are as large as those of the encoded space along x, and fill the image's field of view. The
  flag of reversed readouts says nothing there, for each sample has its place. A third axis that holds weights
  (Gadgetron's) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wardround.imaging.readers.raw.hdf5 import DAMAGED, opened, text_of
from wardround.imaging.readers.raw.header import Encoding, Header, common, parse_header
from wardround.imaging.readers.raw.slices import (
    ComplexArray,
    RawSlices,
    ScanFacts,
    raw_error,
    to_positions,
    without_oversampling,
)
from wardround.imaging.readers.raw.trajectory import flat, grid_of_header, not_flat
from wardround.imaging.readers.volume import FloatArray

# Flags are bits, counted from 1 (ismrmrd.h).
_NOISE, _CALIBRATION, _CALIBRATION_TOO, _REVERSED = 19, 20, 21, 22
# Navigator, phase correction, feedback, dummy, real-time feedback, surface coil, phase stabilisation.
_OTHER = (23, 24, 26, 27, 28, 29, 30, 31)
_BLOCK = ("repetition", "contrast", "phase", "set", "slice")
_MOST_VOLUME = 1 << 29  # samples of a three-dimensional scan, which is transformed as a whole


@dataclass(frozen=True, eq=False)
class _Readouts:
    """The headers of the imaging readouts of a file, and where they stand in it."""

    path: Path
    group: str
    places: NDArray[np.intp]
    heads: Any
    encoding: Encoding
    coils: int
    samples: int  # those kept: without what is to be discarded
    first: int  # the first of these in the readout
    blocks: tuple[NDArray[np.intp], ...]  # of each image, which readouts

    def data(self, block: int) -> ComplexArray:
        """(readouts, coils, samples) of an image, in the order of their measurement."""
        numbers = self.blocks[block]
        with opened(self.path) as file:
            rows = file[self.group]["data"].fields("data")[self.places[numbers]]
        return np.stack([self._samples(row) for row in rows])

    def trajectory(self, block: int) -> FloatArray:
        """(readouts, samples, axes) of an image, as the file has them."""
        numbers = self.blocks[block]
        with opened(self.path) as file:
            rows = file[self.group]["data"].fields("traj")[self.places[numbers]]
        axes = common(self.heads["trajectory_dimensions"][numbers], "the axes of their trajectory", self.path)
        whole = int(self.heads["number_of_samples"][numbers[0]])
        if axes not in (2, 3, 4) or any(row.size != whole * axes for row in rows):
            raise raw_error(
                f"a raw data file of a {self.encoding.trajectory} scan lacks its trajectory; write it with each "
                "readout (`traj`, of 2 axes) where the file is converted",
                self.path,
            )
        kept = slice(self.first, self.first + self.samples)
        return np.stack([np.asarray(row, np.float32).reshape(whole, axes)[kept] for row in rows])

    def _samples(self, row: Any) -> ComplexArray:
        values = np.ascontiguousarray(row, np.float32).view(np.complex64)
        if values.size % self.coils or values.size // self.coils < self.first + self.samples:
            raise raw_error(DAMAGED, self.path, "a readout has other samples than its header says")
        found: ComplexArray = values.reshape(self.coils, -1)[:, self.first : self.first + self.samples]
        return found


def groups_of(file: Any) -> list[str]:
    """The groups of a file that hold ISMRMRD readouts; none in a file of another kind."""
    return [str(name) for name, group in file.items() if hasattr(group, "keys") and {"xml", "data"} <= {*group.keys()}]


def read_ismrmrd(path: Path) -> RawSlices:
    """Open an ISMRMRD file. Raises DataError for one that cannot be sorted, `MissingExtra` without its packages."""
    with opened(path) as file:
        groups = groups_of(file)
        if not groups:
            raise raw_error("an HDF5 file holds no ISMRMRD readouts", path)
        if len(groups) > 1:
            raise raw_error(
                f"an ISMRMRD file holds {len(groups)} measurements, and nothing says which is the scan; write each to "
                "a file of its own",
                path,
                ", ".join(groups),
            )
        group = groups[0]
        xml = text_of(file[group]["xml"][0])
        heads = file[group]["data"].fields("head")[:]
        noise = _noise(file[group]["data"], heads, path)
    header = parse_header(xml or "", path)
    readouts = _readouts(path, group, heads, header)
    facts = replace(header.facts, spacing=readouts.encoding.spacing)
    if readouts.encoding.trajectory != "cartesian":
        return _along(readouts, facts, noise)
    return _Sorter(readouts).slices(facts, noise)


def _along(readouts: _Readouts, facts: ScanFacts, noise: ComplexArray | None) -> RawSlices:
    """The images of a radial or spiral scan."""
    path, encoding = readouts.path, readouts.encoding
    count = common([len(block) for block in readouts.blocks], "their number in each image", path)
    if len(set(readouts.heads["idx"]["kspace_encode_step_2"].tolist())) > 1:
        raise not_flat(path)
    pixel = None if encoding.spacing is None else encoding.spacing[0]
    matrix = encoding.matrix_along(pixel)
    grid = grid_of_header(flat(readouts.trajectory(0), path, weights=True), encoding.matrix[0], matrix, pixel, path)
    if pixel is not None and encoding.spacing is not None:
        facts = replace(facts, spacing=(pixel, pixel, encoding.spacing[2]))
    return RawSlices(
        f"ISMRMRD, {encoding.trajectory}",
        (len(readouts.blocks), readouts.coils, count, readouts.samples),
        lambda number: np.ascontiguousarray(readouts.data(number).swapaxes(0, 1)),
        replace(facts, matrix=matrix),
        noise=noise,
        trajectory=lambda number: grid.placed(flat(readouts.trajectory(number), path, weights=True), path),
        files=(path,),
    )


class _Sorter:
    """Cartesian readouts in their places."""

    def __init__(self, readouts: _Readouts) -> None:
        self._readouts = readouts
        encoding, path = readouts.encoding, readouts.path
        size, lines, partitions = encoding.matrix
        idx = readouts.heads["idx"]
        self._lines = _placed(idx["kspace_encode_step_1"], encoding.centre[0], lines, "phase encode", path)
        self._partitions = _placed(idx["kspace_encode_step_2"], encoding.centre[1], partitions, "partition", path)
        self._start = _start(readouts, size)
        self._shape = (size, lines, partitions)
        self._rows = encoding.rows
        if partitions > 1 and readouts.coils * size * lines * partitions > _MOST_VOLUME:
            raise raw_error(f"a three-dimensional scan has more than {_MOST_VOLUME:,} samples", path)
        # The neighbours of a slice lie in the same volume.
        self._volume = lru_cache(maxsize=1)(self._transformed)

    def slices(self, facts: Any, noise: ComplexArray | None) -> RawSlices:
        """The images of the file."""
        readouts, (_, lines, partitions) = self._readouts, self._shape
        blocks, coils, files = len(readouts.blocks), readouts.coils, (readouts.path,)
        if partitions == 1:
            shape = (blocks, coils, self._rows, lines)
            return RawSlices("ISMRMRD", shape, self._plane, facts, self._mask, noise, files=files)
        # Positions along the readout are the slices.
        if facts.spacing is not None:
            facts = replace(facts, spacing=(facts.spacing[1], facts.spacing[2], facts.spacing[0]))
        shape = (blocks * self._rows, coils, lines, partitions)
        return RawSlices(
            "ISMRMRD, three-dimensional",
            shape,
            lambda n: np.ascontiguousarray(self._volume(n // self._rows)[:, n % self._rows]),
            facts,
            lambda n: self._measured(n // self._rows).astype(np.float32),
            noise,
            files=files,
        )

    def _measured(self, block: int) -> NDArray[np.bool_]:
        """(lines, partitions): which were measured."""
        found = np.zeros(self._shape[1:], np.bool_)
        numbers = self._readouts.blocks[block]
        found[self._lines[numbers], self._partitions[numbers]] = True
        return found

    def _mask(self, number: int) -> FloatArray:
        return np.repeat(self._measured(number)[:, 0].astype(np.float32)[None], self._rows, axis=0)

    def _grid(self, block: int) -> ComplexArray:
        """(coils, readout, lines, partitions), averages averaged."""
        numbers, shape = self._readouts.blocks[block], self._shape
        grid = np.zeros((shape[1], shape[2], self._readouts.coils, shape[0]), np.complex64)
        count = np.zeros(shape[1:], np.int64)
        where = (self._lines[numbers], self._partitions[numbers])
        kept = slice(self._start, self._start + self._readouts.samples)
        np.add.at(grid[..., kept], where, self._readouts.data(block))
        np.add.at(count, where, 1)
        grid /= np.maximum(count, 1)[..., None, None].astype(np.float32)
        return grid.transpose(2, 3, 0, 1)

    def _plane(self, number: int) -> ComplexArray:
        return without_oversampling(np.ascontiguousarray(self._grid(number)[..., 0]), self._rows)

    def _transformed(self, block: int) -> ComplexArray:
        """(coils, positions, lines, partitions), without the oversampling of the readout."""
        size, rows = self._shape[0], self._rows
        start = size // 2 - rows // 2
        return to_positions(self._grid(block), 1)[:, start : start + rows]


def _noise(data: Any, heads: Any, path: Path) -> ComplexArray | None:
    places = np.flatnonzero(_flagged(heads, _NOISE))
    if not places.size:
        return None
    coils = common(heads["active_channels"][places], "the coils of their noise scans", path)
    rows = [np.ascontiguousarray(row, np.float32).view(np.complex64) for row in data.fields("data")[places]]
    if coils < 1 or any(row.size % coils for row in rows):
        raise raw_error(DAMAGED, path, "a noise scan has other samples than its header says")
    return np.concatenate([row.reshape(coils, -1) for row in rows], axis=1)


def _readouts(path: Path, group: str, heads: Any, header: Header) -> _Readouts:
    left_out = _flagged(heads, _NOISE) | (_flagged(heads, _CALIBRATION) & ~_flagged(heads, _CALIBRATION_TOO))
    for flag in _OTHER:
        left_out |= _flagged(heads, flag)
    places = np.flatnonzero(~left_out)
    if not places.size:
        raise raw_error("a raw data file holds no readout of an image", path)
    heads = heads[places]
    space = common(heads["encoding_space_ref"], "their encoded space", path)
    if space >= len(header.encodings):
        raise raw_error("the readouts of a raw data file name an encoding that its header lacks", path)
    encoding = header.encodings[space]
    if encoding.trajectory == "epi":
        raise raw_error(
            "raw data of EPI need a phase correction of odd and even lines, which is not done here; correct and regrid "
            "them first",
            path,
        )
    # Along a trajectory each sample says itself where it lies.
    reversed_ = _flagged(heads, _REVERSED) & (encoding.trajectory == "cartesian")
    if len({*reversed_.tolist()}) > 1:
        raise raw_error(
            "some readouts of a raw data file run backwards, so odd and even lines need a phase correction, which is "
            "not done here; correct them first",
            path,
        )
    samples = common(heads["number_of_samples"], "their number of samples", path)
    before = common(heads["discard_pre"], "their samples to be discarded", path)
    after = common(heads["discard_post"], "their samples to be discarded", path)
    if samples - before - after < 1:
        raise raw_error("the readouts of a raw data file have no samples", path)
    coils = common(heads["active_channels"], "their coils", path)
    if coils < 1:
        raise raw_error("the readouts of a raw data file have no coils", path)
    if reversed_.all():
        return _Reversed(path, group, places, heads, encoding, coils, samples - before - after, before, _blocks(heads))
    return _Readouts(path, group, places, heads, encoding, coils, samples - before - after, before, _blocks(heads))


class _Reversed(_Readouts):
    """Readouts that run backwards, all of them."""

    def data(self, block: int) -> ComplexArray:
        """Turned round."""
        return np.ascontiguousarray(super().data(block)[..., ::-1])


def _blocks(heads: Any) -> tuple[NDArray[np.intp], ...]:
    """Which readouts belong to each image."""
    keys = np.stack([heads["idx"][name].astype(np.int64) for name in _BLOCK], axis=1)
    _, which = np.unique(keys, axis=0, return_inverse=True)
    which = which.ravel()
    return tuple(np.flatnonzero(which == number) for number in range(int(which.max()) + 1))


def _placed(steps: Any, centre: int | None, size: int, what: str, path: Path) -> NDArray[np.int64]:
    middle = size // 2 if centre is None else centre
    found: NDArray[np.int64] = steps.astype(np.int64) - middle + size // 2
    if found.min() < 0 or found.max() >= size:
        raise raw_error(
            f"the {what} steps of a raw data file run from {steps.min()} to {steps.max()} around {middle}, and its "
            f"header says {size} of them",
            path,
        )
    return found


def _start(readouts: _Readouts, size: int) -> int:
    """Where the first sample lies on the grid of the readout."""
    centre = common(readouts.heads["center_sample"], "their centre", readouts.path) - readouts.first
    if isinstance(readouts, _Reversed):
        centre = readouts.samples - 1 - centre
    if readouts.samples == readouts.encoding.rows < size and centre == readouts.samples // 2:
        raise raw_error(
            f"readouts of {readouts.samples} samples about their centre are as long as the image, and the header's "
            f"encoded space has {size}: where the oversampling was removed, write {readouts.samples} as its "
            "matrixSize.x; readouts of a lower resolution must be padded with zeros",
            readouts.path,
        )
    # Some converters leave the centre out; a whole readout needs none.
    start = 0 if readouts.samples == size else size // 2 - centre
    if start < 0 or start + readouts.samples > size:
        raise raw_error(
            f"a readout of {readouts.samples} samples with its centre at {centre} does not fit {size} of the header",
            readouts.path,
        )
    return start


def _flagged(heads: Any, flag: int) -> Any:
    bit = np.uint64(1) << np.uint64(flag - 1)
    return (heads["flags"].astype(np.uint64) & bit) != 0
