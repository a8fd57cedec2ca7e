"""How much memory an image's header may ask for: no more than its file can fill. Said before any is taken."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path
from typing import Any

import nibabel
from nibabel.spatialimages import HeaderDataError

from wardround.errors import DataError

# 1024 x 1024 slices of 512; a whole body in CT has fewer.
MOST_VOXELS = 1 << 29
# 8192 x 8192.
MOST_PIXELS = 1 << 26
# Headers in front of the voxels, with the notes of whatever programs wrote them.
_MOST_HEADER = 1 << 24
_HEADER_BYTES = 540
_CHUNK = 1 << 20
# So much more than its compressed file is what an honest image seldom comes to, and is counted before it is believed.
_DENSE = 64
# The most that deflate, and the run lengths of DICOM, can make of a byte.
DEFLATE_RATIO, RLE_RATIO = 1032, 64


def check_nifti(path: Path) -> None:
    """Raise DataError where a NIfTI header asks for more voxels than its file holds, or than `MOST_VOXELS`.

    What is no NIfTI header is left to the reader, which says so. Raises OSError, EOFError and zlib.error as that does.
    """
    packed = path.name.endswith(".gz")
    with gzip.open(path) if packed else path.open("rb") as file:
        start = file.read(_HEADER_BYTES)
    header = _header(start)
    if header is None:
        return
    shape = tuple(int(n) for n in header.get_data_shape())
    voxels, offset = math.prod(shape), int(header.get_data_offset())
    said = f"an image's header says {' x '.join(map(str, shape))} voxels"
    if min(shape, default=0) < 0 or voxels > MOST_VOXELS:
        raise DataError(f"{said}, and at most {MOST_VOXELS:,} are read; is the file damaged?", detail=str(path))
    if not 0 <= offset <= _MOST_HEADER:
        raise DataError("an image's header is longer than any; the file is damaged", detail=str(path))
    needed, size = offset + voxels * int(header.get_data_dtype().itemsize), path.stat().st_size
    holds = size
    if packed:
        # Nearly always the size says enough; where it does not, the stream is read once without being kept.
        holds = size * DEFLATE_RATIO if needed > size * DEFLATE_RATIO else needed
        if needed <= holds and needed > size * _DENSE:
            holds = _unpacked(path, needed)
    if needed > holds:
        raise DataError(
            f"{said} ({needed:,} bytes), and the file is damaged or cut short: it holds {'at most ' if packed else ''}"
            f"{holds:,} bytes; copy it again from its source",
            detail=str(path),
        )


def _header(start: bytes) -> Any:
    """The header at the start of a NIfTI file of either version; nothing where there is none."""
    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        size = kind.sizeof_hdr
        if len(start) < size or size not in (int.from_bytes(start[:4], order) for order in ("little", "big")):
            continue
        try:
            header = kind.from_fileobj(io.BytesIO(start), check=False)
            header.get_data_dtype(), header.get_data_shape(), int(header.get_data_offset())
        except (HeaderDataError, ValueError, OverflowError, KeyError):
            return None
        return header
    return None


def _unpacked(path: Path, enough: int) -> int:
    """The bytes of a compressed file, counted as far as `enough`; a chunk is all that is in memory."""
    found = 0
    with gzip.open(path) as file:
        while found < enough and (chunk := file.read(_CHUNK)):
            found += len(chunk)
    return found


def inflates_to(data: bytes, most: int) -> bool:
    """Whether a raw deflate stream comes to at most `most` bytes; a chunk is all of it that is in memory.

    Raises zlib.error for what is no such stream.
    """
    inflater, found = zlib.decompressobj(-zlib.MAX_WBITS), 0
    while data and not inflater.eof:
        found += len(inflater.decompress(data, _CHUNK))
        if found > most:
            return False
        data = inflater.unconsumed_tail
    return True
