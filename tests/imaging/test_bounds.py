"""Headers that ask for more memory than their files can fill: refused before any is taken, with the limit."""

from __future__ import annotations

import gzip
import io
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless
from tests.ct_files import body, setting, write_slice

from wardround.errors import DataError
from wardround.imaging.readers import bounds, dicom_file
from wardround.imaging.readers.dicom import read_slice
from wardround.imaging.readers.embeddings import Embeddings
from wardround.imaging.readers.raw import open_raw
from wardround.imaging.readers.volume import read_volume
from wardround.wire.archives import read_npz

NOISE = np.random.default_rng(0).normal(size=(8, 8, 4)).astype(np.float32)


@contextmanager
def little_memory() -> Iterator[None]:
    """No more than 32 MiB are taken inside."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()


def nifti(shape: tuple[int, ...], data: bytes, *, version: int = 1, offset: float | None = None) -> bytes:
    """A NIfTI file whose header says `shape`, and whose voxels are `data`."""
    header = nibabel.Nifti1Header() if version == 1 else nibabel.Nifti2Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape(shape)
    header["magic"] = b"n+1" if version == 1 else header["magic"]
    start = 352 if version == 1 else 544
    header["vox_offset"] = start if offset is None else offset
    return bytes(header.binaryblock).ljust(start, b"\0") + data


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["DOE_JANE.nii", "DOE_JANE.nii.gz"])
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((30000, 30000, 30000), "header says 30000 x 30000 x 30000 voxels, and at most 536,870,912 are read"),
        ((700, 700, 700), r"header says 700 x 700 x 700 voxels \(1,372,000,\d+ bytes\), and the file is damaged"),
        ((8, 8, 6), "damaged"),
    ],
)
def test_a_nifti_header_that_says_more_than_its_file_holds(
    tmp_path: Path, name: str, version: int, shape: tuple[int, ...], expected: str
) -> None:
    data = nifti(shape, NOISE.tobytes(), version=version)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with little_memory(), pytest.raises(DataError, match=expected) as caught:
        read_volume(path)
    assert "DOE" not in str(caught.value)
    assert "DOE" in caught.value.detail


def test_a_stream_of_zeros_is_counted_and_not_kept(tmp_path: Path) -> None:
    """Deflate makes a thousand bytes of one, so the file's size alone does not tell."""
    path = tmp_path / "a.nii.gz"
    noise = np.random.default_rng(0).bytes(2**16)
    path.write_bytes(gzip.compress(nifti((512, 512, 40), bytes(4 * 512 * 512 * 20) + noise)))
    with little_memory(), pytest.raises(DataError, match=f"it holds at most {352 + 20 * 2**20 + 2**16:,} bytes"):
        read_volume(path)
    path.write_bytes(gzip.compress(nifti((64, 64, 64), bytes(4 * 64**3 - 4) + b"\0\0\x80?")))
    assert read_volume(path).data.shape == (64, 64, 64)


def test_a_header_that_never_ends_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(nifti((8, 8, 4), NOISE.tobytes(), offset=1e9))
    with pytest.raises(DataError, match="header is longer than any"):
        read_volume(path)


def _claim(side: int) -> object:
    return setting(Rows=side, Columns=side)


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (60000, "header says 60000 x 60000 pixels, and at most 67,108,864 are read"),
        (8000, "header says 8000 x 8000 pixels of 16 bits, and the file is damaged or cut short: it holds"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_a_dicom_header_that_says_more_than_its_file_holds(
    tmp_path: Path, side: int, expected: str, compressed: bool
) -> None:
    path = write_slice(tmp_path / "DOE.dcm", body())
    header = pydicom.dcmread(path)
    if compressed:
        header.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
    setting(Rows=side, Columns=side)(header)
    header.save_as(path)
    with little_memory(), pytest.raises(DataError, match=expected) as caught:
        read_slice(path)
    assert "DOE" not in str(caught.value)


def test_a_deflated_dicom_file_is_counted_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_slice(tmp_path / "a.dcm", body())
    header = pydicom.dcmread(path)
    header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    header.save_as(path)
    np.testing.assert_array_equal(read_slice(path).hu, body())
    header.add_new(0x00291010, "OB", bytes(48 * 2**20))
    header.save_as(path)
    assert path.stat().st_size < 2**20
    monkeypatch.setattr(dicom_file, "_MOST_INFLATED", 1 << 25)
    with little_memory(), pytest.raises(DataError, match="comes to more than 33,554,432 bytes when it is unpacked"):
        read_slice(path)


def test_a_stream_is_measured_to_its_last_byte() -> None:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    stream = packer.compress(bytes(3 * bounds._CHUNK)) + packer.flush()
    assert bounds.inflates_to(stream, 3 * bounds._CHUNK)
    assert not bounds.inflates_to(stream, 3 * bounds._CHUNK - 1)


def _npy(shape: tuple[int, ...], data: bytes, dtype: str = "<f4") -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def test_arrays_whose_headers_say_more_than_their_files_hold(tmp_path: Path) -> None:
    archive = tmp_path / "a.npz"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("all.npy", _npy((10**6, 10**6), bytes(64)))
    with little_memory(), pytest.raises(DataError, match="embeddings is damaged"):
        Embeddings(archive, 8, "site A")
    np.savez_compressed(archive, big=np.zeros(2**22, np.uint8))
    with little_memory(), pytest.raises(ValueError, match="at most 1,048,576 are read"):
        read_npz(archive, most=1 << 20)
    assert read_npz(archive)["big"].nbytes == 2**22
    kspace = tmp_path / "k.npy"
    kspace.write_bytes(_npy((10**4, 8, 10**4, 10**4), bytes(64), "<c8"))
    with little_memory(), pytest.raises(DataError, match="cut short"):
        open_raw(kspace)
