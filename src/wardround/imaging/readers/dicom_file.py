"""One DICOM file: opening it, its header's values and its pixels, with one clear error for whatever is wrong.

pydicom's own errors and warnings quote headers, so none of them gets out of here: not in a message, and warnings
not at all.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_file_meta_info
from pydicom.pixels.utils import iter_pixels
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless

from wardround.errors import DataError
from wardround.imaging.readers.bounds import MOST_PIXELS, RLE_RATIO, inflates_to

# A file whose whole content is deflated: far more than an image of 8192 x 8192 pixels and its header.
_MOST_INFLATED = 1 << 28
_DAMAGED = "a DICOM file's pixels are damaged or cut short; copy it again from its source"
# Image files of compressed collections that are lossless; every other compression is taken for lossy.
_LOSSLESS = frozenset(
    {
        "1.2.840.10008.1.2.1.99",  # deflated
        "1.2.840.10008.1.2.4.57",  # JPEG Lossless
        "1.2.840.10008.1.2.4.70",  # JPEG Lossless, first-order prediction
        "1.2.840.10008.1.2.4.80",  # JPEG-LS Lossless
        "1.2.840.10008.1.2.4.90",  # JPEG 2000 Lossless
        RLELossless,
    }
)


@contextmanager
def guarded(message: str, path: Path) -> Iterator[None]:
    """Turn whatever pydicom or a decoder raises into DataError(message), silencing warnings that quote headers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # pydicom only warns of a file that ends too early, and then returns what it has of it, or nothing.
        warnings.filterwarnings("error", message="End of file")
        try:
            yield
        except DataError:
            raise
        except PermissionError as error:
            raise DataError("a DICOM file cannot be read (Permission denied)", detail=str(path)) from error
        # Broken files make pydicom and its decoders raise nearly every class of error there is.
        except Exception as error:
            raise DataError(message, detail=f"{path}: {error}") from error


def open_dicom(path: Path, *, pixels: bool = True) -> FileDataset:
    """Open a DICOM file. Raises DataError where it is missing, not DICOM, or damaged."""
    if not path.is_file():
        raise DataError("a DICOM file does not exist", detail=str(path))
    with guarded("a DICOM file is damaged or cannot be read; copy it again from its source", path):
        try:
            if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
                with _Bounded(path) as file:
                    dataset = pydicom.dcmread(file, stop_before_pixels=not pixels)
            else:
                dataset = pydicom.dcmread(path, stop_before_pixels=not pixels)
        except InvalidDicomError as error:
            raise DataError(
                "a file is not DICOM; keep other files out of the folder, or copy it again from its source",
                detail=str(path),
            ) from error
    return dataset


class _Bounded(io.FileIO):
    """A deflated DICOM file; pydicom reads its compressed rest at once and unpacks it whole, however much that is."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As of a file; raises DataError for a rest that comes to more than any image."""
        data = super().read(-1 if size is None else size) or b""
        if (size is None or size < 0) and not inflates_to(data, _MOST_INFLATED):
            raise DataError(
                f"a DICOM file comes to more than {_MOST_INFLATED:,} bytes when it is unpacked; is it the right file?"
            )
        return data


def path_of(header: Dataset) -> Path:
    """Where a header was read from; for the `detail` of errors only."""
    return Path(str(getattr(header, "filename", "unknown")))


def text(header: Dataset, keyword: str, longest: int = 64) -> str | None:
    """A header's text, several values joined by "/"; None where it is missing or empty."""
    with guarded(f"a DICOM header's {keyword} cannot be read", path_of(header)):
        value = header.get(keyword)
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        joined = "/".join(str(part).strip() for part in values if part is not None)
    return re.sub(r"[^\x20-\x7e]", "", joined)[:longest] or None


def numbers(header: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers of a header; None where they are missing or empty. Raises DataError for anything else."""
    message = f"a DICOM header's {keyword} is not {count} finite numbers; the file is damaged or badly converted"
    path = path_of(header)
    with guarded(message, path):
        value = header.get(keyword)
        if value is None or value == "" or (isinstance(value, Sequence) and len(value) == 0):
            return None
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        found = tuple(float(part) for part in values)
    if len(found) != count or not all(math.isfinite(number) for number in found):
        raise DataError(message, detail=str(path))
    return found


def number(header: Dataset, keyword: str) -> float | None:
    """A header's finite number; None where it is missing or empty. Raises DataError."""
    found = numbers(header, keyword, 1)
    return None if found is None else found[0]


def required(header: Dataset, keyword: str, count: int) -> tuple[float, ...]:
    """`count` numbers that a header must have. Raises DataError."""
    found = numbers(header, keyword, count)
    if found is None:
        raise DataError(f"a DICOM header lacks {keyword}; export the image again", detail=str(path_of(header)))
    return found


def raw_numbers(header: Dataset, tag: tuple[int, int], kind: str) -> tuple[float, ...] | None:
    """Numbers of a private element, also where its VR is unknown (UN) and its value raw little-endian bytes.

    `kind` is struct's letter for one value: "f" for FL, "H" for US, "d" for FD. None where the element is missing.
    """
    message = f"a private DICOM element ({tag[0]:04X},{tag[1]:04X}) does not hold numbers; the file is damaged"
    path = path_of(header)
    with guarded(message, path):
        if Tag(tag) not in header:
            return None
        value = header[tag].value
        if isinstance(value, bytes):
            found = struct.unpack(f"<{len(value) // struct.calcsize(kind)}{kind}", value)
        else:
            found = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
        values = tuple(float(part) for part in found)
    if not values or not all(math.isfinite(part) for part in values):
        raise DataError(message, detail=str(path))
    return values


def raw_text(header: Dataset, tag: tuple[int, int]) -> str | None:
    """Text of a private element, also where its VR is unknown; None where the element is missing."""
    with guarded(f"a private DICOM element ({tag[0]:04X},{tag[1]:04X}) cannot be read", path_of(header)):
        if Tag(tag) not in header:
            return None
        value = header[tag].value
        decoded = value.decode("ascii", "ignore") if isinstance(value, bytes) else str(value)
    return decoded.strip(" \0").upper()


def pixels(dataset: FileDataset) -> NDArray[np.generic]:
    """The stored pixels of one greyscale frame, (Rows, Columns).

    Uncompressed and RLE files need nothing else, the JPEG family needs python-gdcm. Raises DataError.
    """
    path = path_of(dataset)
    with guarded(_DAMAGED, path):
        count = int(dataset.get("NumberOfFrames") or 1)
    if count != 1:
        raise DataError(
            f"a DICOM file holds {count} frames; export it as classic CT, one file per slice", detail=str(path)
        )
    plugin = _check_pixels(dataset, 1)
    with guarded(_DAMAGED, path):
        if plugin:
            dataset.pixel_array_options(decoding_plugin=plugin)
        array: NDArray[np.generic] = dataset.pixel_array
    if array.ndim != 2 or 0 in array.shape:
        raise DataError(_DAMAGED, detail=f"{path}: shape {array.shape}")
    return array


def frames(dataset: FileDataset, count: int) -> Iterator[NDArray[np.generic]]:
    """The `count` greyscale frames of a file, (Rows, Columns) each, one at a time in memory. Raises DataError."""
    path = path_of(dataset)
    with guarded(_DAMAGED, path):
        held = int(dataset.get("NumberOfFrames") or 1)
    if held != count:
        raise DataError(f"a DICOM file holds {held} frames and describes {count}; export it again", detail=str(path))
    plugin = _check_pixels(dataset, count)
    with guarded(_DAMAGED, path):
        found = iter_pixels(dataset, decoding_plugin=plugin)
    for _ in range(count):
        with guarded(_DAMAGED, path):
            array = next(found)
        if array.ndim != 2 or 0 in array.shape:
            raise DataError(_DAMAGED, detail=f"{path}: shape {array.shape}")
        yield array


def _check_pixels(dataset: FileDataset, count: int) -> str:
    """Raises DataError where pixels cannot be read, before memory is taken for them; the name of a decoder, or none."""
    path = path_of(dataset)
    with guarded(_DAMAGED, path):
        samples = int(dataset.get("SamplesPerPixel") or 1)
        syntax = dataset.file_meta.TransferSyntaxUID
        compressed = bool(syntax.is_encapsulated)
        rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
        bits = int(dataset.get("BitsAllocated") or 0)
    if samples != 1:
        raise DataError("a DICOM image is in colour; CT has one grey value per pixel", detail=str(path))
    if compressed and syntax != RLELossless and importlib.util.find_spec("gdcm") is None:
        raise DataError(
            "a DICOM file is compressed (JPEG family) and its decoder is not installed: "
            "pip install 'wardround[compressed]', or export the images uncompressed",
            detail=str(path),
        )
    if "PixelData" not in dataset:
        raise no_pixels(path)
    said = f"a DICOM header says {rows} x {columns} pixels"
    if rows * columns > MOST_PIXELS:
        raise DataError(f"{said}, and at most {MOST_PIXELS:,} are read; is the file damaged?", detail=str(path))
    with guarded(_DAMAGED, path):
        held = len(dataset.PixelData or b"")
    ratio = RLE_RATIO if syntax == RLELossless else None if compressed else 1
    if ratio is not None and rows * columns * bits * count > 8 * ratio * held:
        raise DataError(
            f"{said} of {bits} bits, and the file is damaged or cut short: it holds {held:,} bytes of pixels; copy it "
            "again from its source",
            detail=str(path),
        )
    return "gdcm" if compressed and syntax != RLELossless else ""


def no_pixels(path: Path) -> DataError:
    """The error of a file that ends before its pixels."""
    return DataError("a DICOM file has no pixels: it is cut short, or no image; copy it again", detail=str(path))


def is_lossy(header: FileDataset) -> bool:
    """Whether an image has ever been compressed with loss: as its header says, or as its encoding shows."""
    with guarded("a DICOM header's compression cannot be read", path_of(header)):
        syntax = header.file_meta.TransferSyntaxUID
        encoded = bool(syntax.is_encapsulated) and syntax not in _LOSSLESS
    return encoded or text(header, "LossyImageCompression") == "01"


def is_projection(header: Dataset) -> bool:
    """Whether a file is of DICOM-CT-PD: a view of the raw projections, not an image."""
    return Tag(0x7037, 0x1009) in header or Tag(0x7031, 0x1001) in header
