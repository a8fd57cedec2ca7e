"""Raw data of MRI as every reader gives them, whatever wrote the file: slice by slice, read when asked for.

K-space is centred (its middle is index n // 2 of each axis), as the operator's `fft2c` gives it. H is the readout, W
the phase encode of a two-dimensional scan. Of a three-dimensional one the readout is transformed into positions, which
are the slices: H and W are its two phase encodes. That is exact whatever lines were measured, for every readout is
whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from wardround.errors import DataError, GeometryError
from wardround.imaging.readers.volume import FloatArray

ComplexArray = NDArray[np.complex64]
#: Samples of one slice, all coils; 64 coils of 1024 x 1024 have fewer.
MOST_SAMPLES = 1 << 27
#: How a file says where its samples lie, for people.
TRAJECTORIES = (
    "ISMRMRD holds it with each readout; BART and NumPy have it beside NAME.cfl or NAME.npy, as NAME_traj.cfl or "
    "NAME_traj.npy; MATLAB in the same file, as `k`, `traj` or `trajectory`"
)
# Samples that may be missing, or zero by chance, in what counts as fully sampled.
_HOLES = 1e-3
# How far towards an edge a full scan reaches at least on its longer side, as a share of the way (padded columns end at
# two thirds), and on its other side, as a share of that: a partial echo along the readout, whole along phase encodes.
_REACH, _PARTIAL_ECHO, _WHOLE = 0.5, 0.4, 0.8


@dataclass(frozen=True)
class ScanFacts:
    """What a header says of a scan; `None` for what it does not say.

    spacing: mm between rows, columns and slices. field_strength: tesla. protocol: the contrast as the site calls it.
    matrix: rows and columns of the image that a non-Cartesian scan is for; `None` for a Cartesian one that does not say
    it. patient: whose scan it is, which stays at
    the site.
    """

    spacing: tuple[float, float, float] | None = None
    field_strength: float | None = None
    vendor: str | None = None
    protocol: str | None = None
    matrix: tuple[int, int] | None = None
    patient: str | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class RawSlices:
    """The raw data of one file.

    kind: what wrote the file, for people. shape: (slices, coils, H, W); of a non-Cartesian scan (slices, coils,
    readouts, samples). stored(n): k-space of slice n as the file has it, complex64 (coils, H, W), 0 where nothing was
    measured. sampled(n): 1 where slice n was measured, float32 (H, W), where the file says so; else what is not 0 was.
    noise: samples without signal, complex64 (coils, N). picture(n): the file's own reference image of slice n, float32
    (h, w), in units of the k-space under an orthonormal transform. trajectory(n): where the samples of slice n lie,
    float32 (readouts, samples, 2), in cycles per pixel along H and W; `None` for a Cartesian scan. files: what is read.
    """

    kind: str
    shape: tuple[int, int, int, int]
    stored: Callable[[int], ComplexArray] = field(repr=False)
    facts: ScanFacts = ScanFacts()
    sampled: Callable[[int], FloatArray] | None = None
    noise: ComplexArray | None = None
    picture: Callable[[int], FloatArray] | None = None
    trajectory: Callable[[int], FloatArray] | None = None
    files: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if 0 in self.shape:
            raise self.error("a raw data file is empty", f"its k-space has the shape {self.shape}")
        if int(np.prod(self.shape[1:], dtype=np.float64)) > MOST_SAMPLES:
            raise self.error(f"a slice of raw data has more than {MOST_SAMPLES:,} samples; is the file damaged?")

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def coils(self) -> int:
        """Number of receive coils."""
        return self.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of an image."""
        if self.trajectory is None:
            return self.shape[2], self.shape[3]
        assert self.facts.matrix is not None
        return self.facts.matrix

    @property
    def cartesian(self) -> bool:
        """Whether samples lie on a grid."""
        return self.trajectory is None

    def require_cartesian(self) -> None:
        """Raise DataError for a scan along radial or spiral lines."""
        if not self.cartesian:
            raise self.error(
                "raw data were measured along a trajectory (radial, spiral), and Cartesian lines are needed here; take "
                "a model of acquisition.kind: mri_noncartesian, or regrid them"
            )

    def require_trajectory(self) -> None:
        """Raise DataError for a scan of Cartesian lines."""
        if self.cartesian:
            raise self.error(
                "a model of radial or spiral scans needs raw data with their trajectory, and the file holds none, only "
                f"Cartesian lines; {TRAJECTORIES}, or take a model of acquisition.kind: mri or mri_raw"
            )

    def kspace(self, number: int) -> ComplexArray:
        """K-space of a slice, complex64 (coils, H, W), its noise decorrelated between coils where that was measured.

        Raises DataError where it cannot be read, or holds NaN or infinite values.
        """
        found = self.stored(number)
        if found.shape != self.shape[1:]:
            raise self.error("a slice of raw data has another shape than the file's header says")
        if not np.isfinite(found.view(np.float32)).all():
            raise self.error("the k-space holds NaN or infinite values; replace them at the source")
        if self.noise is not None:
            return self._whitened(found)
        # A mapped file cannot be written to, which torch does not take.
        return found if found.flags.writeable else found.copy()

    def mask(self, number: int, kspace: ComplexArray) -> FloatArray:
        """1 where a slice was measured, float32 (H, W); `kspace` is the slice's, for a file that does not say it.

        Raises DataError where such a slice holds nothing but zeros.
        """
        if self.sampled is not None:
            return self.sampled(number)
        found = measured(kspace)
        if not found.any():
            raise self.error("a slice of raw data holds nothing but zeros; leave it out of the file, or measure it")
        return found

    def error(self, message: str, detail: str = "") -> DataError:
        """An error that says what is wrong; which file it is, stays at the site."""
        return raw_error(message, self.files[0] if self.files else Path(), detail)

    def _whitened(self, kspace: ComplexArray) -> ComplexArray:
        # Late: who looks at headers alone needs no torch.
        import torch

        from wardround.imaging.acquisition.noise import estimate_covariance, whiten

        assert self.noise is not None
        if self.noise.shape[0] != self.coils or self.noise.shape[1] < 2 * self.coils:
            raise self.error("the noise scan has other coils than the scan, or too few samples to tell coils apart")
        try:
            covariance = estimate_covariance(torch.from_numpy(self.noise))
            white: ComplexArray = whiten(torch.from_numpy(kspace), covariance).numpy()
        except GeometryError as error:
            raise self.error(f"the noise scan cannot be used: {error}") from error
        return white


def raw_error(message: str, path: Path, detail: str = "") -> DataError:
    """An error of a raw data file, which is named in the detail alone."""
    return DataError(message, detail=": ".join(part for part in (str(path), detail) if part))


def check_centred(sizes: NDArray[np.floating], path: Path) -> None:
    """Raise DataError where the largest sample of magnitudes (..., H, W) lies far from the middle of H or W.

    For files that say nothing of what they hold: an image, or k-space that is not shifted, would be reconstructed into
    nonsense without a word. Zeros and NaN pass here; they are said where slices are read.
    """
    with np.errstate(over="ignore"):
        power = np.square(sizes, dtype=np.float64).reshape(-1, *sizes.shape[-2:]).sum(0)
    if not np.isfinite(power).all() or not power.any():
        return
    peak = np.unravel_index(int(power.argmax()), power.shape)
    if any(abs(int(at) - size // 2) > max(1, size // 8) for at, size in zip(peak, power.shape, strict=True)):
        raise raw_error(
            "the largest sample of an array lies far from its middle, so it is no centred k-space, but an image (take "
            "its Fourier transform), k-space that is not shifted (fftshift), or a scan along a trajectory that is "
            "missing (docs/raw-data.md says where it stands)",
            path,
        )


def measured(kspace: ComplexArray) -> FloatArray:
    """1 where any coil's k-space (coils, H, W) is not 0: float32 (H, W)."""
    return np.asarray(np.any(kspace != 0, axis=0), np.float32)


def fully_sampled(mask: FloatArray) -> bool:
    """Whether a mask (H, W) has no gaps, and lies about the middle.

    A gap is an unmeasured point between measured ones of a row or a column. What lies outside the measured region
    (corners of an ellipse, a partial echo along H, padding) was never meant to be measured and is none. A few zeros
    among many samples are not, either. Phase encodes (W) on one side of the middle alone, as of partial Fourier or of a
    scan that was stopped, leave the image blurred, and so do calibration lines alone: they are no full scan.
    """
    on = mask != 0
    if not (_about_middle(on.any(axis=1), _PARTIAL_ECHO) and _about_middle(on.any(axis=0), _WHOLE)):
        return False
    gaps = sum((_between(on, axis) & ~on).sum() for axis in (0, 1))
    return bool(gaps <= _HOLES * on.size)


def _about_middle(on: NDArray[np.bool_], share: float) -> bool:
    """Whether what is measured of an axis reaches far enough, and on its shorter side `share` of the longer."""
    found = np.flatnonzero(on)
    if not found.size:
        return False
    middle = on.size // 2
    shorter, longer = sorted((middle - int(found[0]), int(found[-1]) + 1 - middle))
    # One sample more: an even number of them has no middle.
    return longer >= _REACH * middle and shorter + 1 >= share * longer


def _between(on: NDArray[np.bool_], axis: int) -> NDArray[np.bool_]:
    before = np.logical_or.accumulate(on, axis=axis)
    after = np.flip(np.logical_or.accumulate(np.flip(on, axis), axis=axis), axis)
    return np.asarray(before & after)


def to_positions(kspace: ComplexArray, axis: int) -> ComplexArray:
    """Centred orthonormal inverse transform of one axis."""
    shifted = scipy.fft.ifft(scipy.fft.ifftshift(kspace, axes=axis), axis=axis, norm="ortho")
    found: ComplexArray = scipy.fft.fftshift(shifted, axes=axis).astype(np.complex64)
    return found


def to_frequencies(image: ComplexArray, axis: int) -> ComplexArray:
    """Centred orthonormal transform of one axis, the inverse of `to_positions`."""
    shifted = scipy.fft.fft(scipy.fft.ifftshift(image, axes=axis), axis=axis, norm="ortho")
    found: ComplexArray = scipy.fft.fftshift(shifted, axes=axis).astype(np.complex64)
    return found


def without_oversampling(kspace: ComplexArray, rows: int, axis: int = -2) -> ComplexArray:
    """Keep the middle `rows` positions along the readout, which is sampled finer than the image needs.

    Scanners sample the readout twice as densely as asked, so that nothing folds; what lies beyond is air. Values of the
    image stay as they are, for both transforms are orthonormal.
    """
    have = kspace.shape[axis]
    if rows >= have:
        return kspace
    start = have // 2 - rows // 2
    positions = to_positions(kspace, axis).take(range(start, start + rows), axis=axis)
    return to_frequencies(positions, axis)
