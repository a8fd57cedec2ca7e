"""Raw data of made-up heads, in files of the layouts that scanners and collections have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import scipy.io

from tests.mri_hospitals import head
from wardround.imaging.acquisition.mri.coils import birdcage_maps

SIZE = 32


def coil_images(seed: int, slices: int = 2, coils: int = 3, size: int = SIZE, noise: float = 0.002) -> np.ndarray:
    """Complex coil images (slices, coils, H, W) of a made-up head of peak about 1, with noise."""
    random = np.random.default_rng(seed)
    step = 64 // size
    magnitude = np.moveaxis(head(seed, slices), -1, 0)[:, ::step, ::step] / 215.0
    maps = birdcage_maps(coils, (size, size), angles=np.arange(coils) * 2 * np.pi / coils + random.random())
    images = magnitude[:, None] * maps * np.exp(1j * random.random())
    drawn = random.standard_normal((*images.shape, 2)) @ np.array([1, 1j])
    return (images + noise * drawn).astype(np.complex64)


def transformed(images: np.ndarray, axes: Sequence[int] = (-2, -1)) -> np.ndarray:
    """Centred orthonormal Fourier transform, by SciPy."""
    shifted = scipy.fft.fftn(scipy.fft.ifftshift(images, axes=axes), axes=axes, norm="ortho")
    return np.asarray(scipy.fft.fftshift(shifted, axes=axes), np.complex64)


def padded_rows(images: np.ndarray, rows: int) -> np.ndarray:
    """More air above and below, the middle row in the middle: what an oversampled readout sees."""
    have = images.shape[-2]
    before = rows // 2 - have // 2
    padding = [(0, 0)] * (images.ndim - 2) + [(before, rows - have - before), (0, 0)]
    return np.pad(images, padding)


def root_sum_of_squares(images: np.ndarray) -> np.ndarray:
    return np.sqrt((np.abs(images) ** 2).sum(1))


def xml(
    matrix: tuple[int, int, int],
    *,
    recon: tuple[int, int, int] | None = None,
    trajectory: str = "cartesian",
    patient: str | None = None,
    centre: tuple[int, int] | None = None,
    pixel: float = 2.0,
) -> str:
    """An ISMRMRD header; the field of view follows from `pixel` mm, slices are 5 mm thick."""
    recon = recon or matrix
    spaces = ""
    for name, size in (("encodedSpace", matrix), ("reconSpace", recon)):
        sizes = "".join(f"<{axis}>{n}</{axis}>" for axis, n in zip("xyz", size, strict=True))
        depth = 5.0 * size[2]
        field = f"<x>{size[0] * pixel}</x><y>{size[1] * pixel}</y><z>{depth}</z>"
        spaces += f"<{name}><matrixSize>{sizes}</matrixSize><fieldOfView_mm>{field}</fieldOfView_mm></{name}>"
    middle = centre or (matrix[1] // 2, matrix[2] // 2)
    limits = "".join(
        f"<kspace_encoding_step_{n}><minimum>0</minimum><maximum>{matrix[n] - 1}</maximum>"
        f"<center>{middle[n - 1]}</center></kspace_encoding_step_{n}>"
        for n in (1, 2)
    )
    subject = "" if patient is None else f"<subjectInformation><patientID>{patient}</patientID></subjectInformation>"
    return (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        f"{subject}"
        "<acquisitionSystemInformation><systemVendor>Maker</systemVendor>"
        "<systemFieldStrength_T>1.5</systemFieldStrength_T></acquisitionSystemInformation>"
        "<experimentalConditions><H1resonanceFrequency_Hz>63870000</H1resonanceFrequency_Hz></experimentalConditions>"
        f"<encoding>{spaces}<encodingLimits>{limits}</encodingLimits><trajectory>{trajectory}</trajectory></encoding>"
        "</ismrmrdHeader>"
    )


def write_fastmri(
    path: Path,
    images: np.ndarray,
    *,
    patient: str | None = None,
    oversampling: int = 2,
    mask: np.ndarray | None = None,
    reference: bool = True,
    header: bool = True,
    single: bool = False,
) -> Path:
    """fastMRI's layout of coil images (slices, coils, H, W): an oversampled readout, columns left out by `mask`."""
    import h5py

    height, width = images.shape[-2:]
    kspace = transformed(padded_rows(images, oversampling * height))
    if mask is not None:
        kspace = kspace * mask.astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["kspace"] = kspace[:, 0] if single else kspace
        if header:
            matrix = (oversampling * height, width, 1)
            file["ismrmrd_header"] = xml(matrix, recon=(height, width, 1))
        if reference:
            name = "reconstruction_esc" if single else "reconstruction_rss"
            file[name] = root_sum_of_squares(images).astype(np.float32)
            file.attrs["max"] = float(root_sum_of_squares(images).max())
        if mask is not None:
            file["mask"] = mask.astype(bool)
        if patient is not None:
            file.attrs["patient_id"] = patient
        file.attrs["acquisition"] = "AXT1"
    return path


def write_bart(base: Path, array: np.ndarray) -> Path:
    """A pair of BART's files of an array whose axes are BART's dimensions; returns the .cfl."""
    base.parent.mkdir(parents=True, exist_ok=True)
    sizes = [*array.shape, *[1] * (16 - array.ndim)]
    base.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(map(str, sizes)) + "\n", encoding="ascii")
    np.asarray(array, "<c8").ravel(order="F").tofile(base.with_suffix(".cfl"))
    return base.with_suffix(".cfl")


def readout(
    data: np.ndarray, *, line: int = 0, partition: int = 0, flags: Sequence[int] = (), traj: Any = None, **places: int
) -> Any:
    """One readout (coils, samples) with its place; `places` are slice, repetition, average, ..."""
    import ismrmrd

    found = ismrmrd.Acquisition.from_array(np.ascontiguousarray(data, np.complex64), traj)
    found.idx.kspace_encode_step_1, found.idx.kspace_encode_step_2 = line, partition
    found.center_sample = data.shape[1] // 2
    for name, value in places.items():
        setattr(found.idx if hasattr(found.idx, name) else found, name, value)
    for flag in flags:
        found.setFlag(flag)
    return found


def write_ismrmrd(path: Path, header: str, readouts: Sequence[Any]) -> Path:
    """An ISMRMRD file of the format's own types, written at once: appending readouts one by one takes long."""
    import h5py
    from ismrmrd.hdf5 import acquisition_dtype, acquisition_header_dtype

    rows = np.empty(len(readouts), acquisition_dtype)
    for row, one in zip(rows, readouts, strict=True):
        row["head"] = np.frombuffer(one.getHead(), acquisition_header_dtype)
        row["data"] = one.data.view(np.float32).ravel()
        row["traj"] = one.traj.view(np.float32).ravel()
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file.create_dataset("dataset/xml", data=[header.encode()], dtype=h5py.special_dtype(vlen=bytes))
        file.create_dataset("dataset/data", data=rows)
    return path


def scanned(kspace: np.ndarray, lines: Sequence[int] | None = None, **places: int) -> list[Any]:
    """The readouts of k-space (slices, coils, H, W), slices interleaved, lines in the order of `lines`."""
    chosen = range(kspace.shape[-1]) if lines is None else lines
    return [readout(kspace[z, :, :, line], line=line, slice=z, **places) for line in chosen for z in range(len(kspace))]


# Scans along a trajectory -----------------------------------------------------------------------------------------


def along(images: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Samples (slices, coils, readouts, samples) of coil images (slices, coils, H, W), by the sum that defines them.

    points: (readouts, samples, 2), cycles per pixel along H and along W.
    """
    height, width = images.shape[-2:]
    waves = [
        np.exp(-2j * np.pi * points[..., axis].reshape(-1, 1) * (np.arange(n) - n // 2))
        for axis, n in enumerate((height, width))
    ]
    found = np.einsum("sh,zchw,sw->zcs", waves[0], images, waves[1], optimize=True) / np.sqrt(height * width)
    return found.reshape(*images.shape[:2], *points.shape[:2]).astype(np.complex64)


def spokes(count: int, size: int) -> np.ndarray:
    """Golden spokes of 2 x oversampled readouts: (count, 2 size, 2), cycles per pixel."""
    angles = np.arange(count) * np.radians(111.246117975)
    radii = np.arange(-size, size) / (2 * size)
    return radii[None, :, None] * np.stack([np.sin(angles), np.cos(angles)], -1)[:, None]


def arms(count: int, turns: int, samples: int) -> np.ndarray:
    """Interleaved spirals from the centre to the edge, dense in the middle: (count, samples, 2), cycles per pixel."""
    t = np.linspace(0, 1, samples) ** 0.6
    z = 0.5 * t**1.3 * np.exp(2j * np.pi * (turns * t + np.arange(count)[:, None] / count))
    return np.stack([z.imag, z.real], -1)


def write_npy_along(path: Path, samples: np.ndarray, points: np.ndarray) -> Path:
    """samples.npy and samples_traj.npy as both are given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, samples)
    np.save(path.with_name(f"{path.stem}_traj.npy"), points)
    return path


def write_mat_along(path: Path, samples: np.ndarray, points: np.ndarray) -> Path:
    """As gpuNUFFT's demonstration: rawdata (samples, readouts, coils[, slices]), k = x + i y."""
    scipy.io.savemat(path, {"rawdata": samples.transpose(3, 2, 1, 0), "k": (points[..., 1] + 1j * points[..., 0]).T})
    return path


def write_bart_along(base: Path, samples: np.ndarray, points: np.ndarray) -> Path:
    """Samples 1, samples, readouts, coils, ..., slices; points 3, samples, readouts in `points`' own unit."""
    slices, coils, readouts, count = samples.shape
    flat = np.concatenate([points, np.zeros((readouts, count, 1))], -1)
    write_bart(base.with_name(f"{base.name}_traj"), flat.transpose(2, 1, 0))
    shape = (1, count, readouts, coils, *[1] * 9, slices)
    return write_bart(base, samples.transpose(3, 2, 1, 0).reshape(shape))


def write_ismrmrd_along(path: Path, header: str, samples: np.ndarray, points: np.ndarray, **places: Any) -> Path:
    """A readout with its points each, slices interleaved."""
    traj = np.asarray(points, np.float32)
    each = [(z, n) for n in range(samples.shape[2]) for z in range(len(samples))]
    return write_ismrmrd(path, header, [readout(samples[z, :, n], slice=z, traj=traj[n], **places) for z, n in each])
