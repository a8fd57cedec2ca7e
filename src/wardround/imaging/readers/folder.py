"""A hospital's folder: one folder a patient, one NIfTI file a contrast."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wardround.errors import DataError
from wardround.imaging.orientation import Turn, turn_of
from wardround.imaging.readers.volume import FloatArray, read_volume
from wardround.wire.files import reason

_SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True, eq=False)
class _Stored:
    """A volume in memory, as bytes where its values are whole numbers from 0 to 255."""

    array: NDArray[np.uint8] | FloatArray

    @classmethod
    def of(cls, data: FloatArray) -> _Stored:
        if data.min() >= 0 and data.max() <= 255:
            whole = data.astype(np.uint8)
            if np.array_equal(whole, data):
                return cls(whole)
        return cls(data)


class SiteFolder:
    """The images of one site, `FOLDER/PATIENT/CONTRAST.nii.gz` (or `.nii`), from one folder or several.

    Patients are numbered folder by folder in the order of their names; nothing outside this class sees those names.
    Volumes are read when asked for and kept in memory up to `cache_bytes`. Raises DataError for a missing
    folder, for one without patients, and for a patient who is in two of them.
    """

    def __init__(self, source: Path | Sequence[Path], site: str, *, cache_bytes: int = 2**29) -> None:
        self.site = site
        folders = patient_folders(source, site, "CONTRAST.nii.gz")
        found = [images for folder in folders if (images := _images(folder, site))]
        if not found:
            raise no_patient(site, "CONTRAST.nii.gz", source)
        self._patients = found
        self._cache: OrderedDict[tuple[int, str], _Stored] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._digests: dict[Path, tuple[int, int, str]] = {}

    def __len__(self) -> int:
        return len(self._patients)

    def name(self, patient: int) -> str:
        """Return the name of a patient's folder: it stays at the site."""
        return next(iter(self._patients[patient].values())).parent.name

    @property
    def contrasts(self) -> tuple[str, ...]:
        """Contrasts that at least one patient has, sorted."""
        return tuple(sorted({name for images in self._patients for name in images}))

    def contrasts_of(self, patient: int) -> tuple[str, ...]:
        """Contrasts of one patient, sorted."""
        return tuple(sorted(self._patients[patient]))

    def lacking(self, contrast: str) -> int:
        """Return how many patients lack a contrast."""
        return sum(contrast not in images for images in self._patients)

    def place(self, patient: int, contrast: str) -> str:
        """The file of an image: for the `detail` of an error, which stays at the site."""
        return str(self._patients[patient].get(contrast, ""))

    def turn(self, patient: int, contrast: str) -> Turn | None:
        """How slices of an image are shown; None where its file does not say how the patient lies."""
        return turn_of(self._patients[patient][contrast])

    def require(self, contrasts: Iterable[str]) -> None:
        """Raise DataError unless every patient has every contrast; it says how many lack one, never who."""
        for contrast in contrasts:
            missing = [images for images in self._patients if contrast not in images]
            if missing:
                folders = ", ".join(str(next(iter(images.values())).parent) for images in missing)
                raise DataError(
                    f"site {self.site}: {len(missing)} of {len(self)} patients lack the contrast {contrast}; "
                    "complete their folders, move them away, or change `task.contrasts`",
                    detail=f"{folders}; the site has {', '.join(self.contrasts)}",
                )

    def volume(self, patient: int, contrast: str) -> NDArray[np.uint8] | FloatArray:
        """Return an image `(H, W, slices)` in the units of its file, uint8 or float32. Raises DataError."""
        key = (patient, contrast)
        stored = self._cache.get(key)
        if stored is None:
            stored = self._cache[key] = _Stored.of(self._load(patient, contrast))
            while len(self._cache) > 1 and self._size() > self._cache_bytes:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return stored.array

    def patient_digest(self, patient: int, contrasts: Sequence[str]) -> str:
        """Return the sha256 (hex) over the content of a patient's files, contrast by contrast."""
        self.require(contrasts)
        files = "/".join(self._digest(self._patients[patient][contrast]) for contrast in sorted(contrasts))
        return hashlib.sha256(files.encode()).hexdigest()

    def fingerprint(self, contrasts: Sequence[str]) -> str:
        """Return a sha256 (hex) over the content of the files of `contrasts`, not over names or paths."""
        digests = sorted(self.patient_digest(patient, contrasts) for patient in range(len(self)))
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def _load(self, patient: int, contrast: str) -> FloatArray:
        path = self._patients[patient].get(contrast)
        if path is None:
            self.require([contrast])
            raise AssertionError("unreachable")
        try:
            return read_volume(path).data
        except DataError as error:
            raise DataError(f"site {self.site}, contrast {contrast}: {error}", detail=error.detail) from error

    def _size(self) -> int:
        return sum(stored.array.nbytes for stored in self._cache.values())

    def _digest(self, path: Path) -> str:
        try:
            status = path.stat()
            size, modified, digest = self._digests.get(path, (-1, -1, ""))
            if (size, modified) != (status.st_size, status.st_mtime_ns):
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                self._digests[path] = (status.st_size, status.st_mtime_ns, digest)
            return digest
        except OSError as error:
            raise DataError(
                f"site {self.site}: an image file cannot be read ({reason(error)})", detail=str(path)
            ) from error


def patient_folders(source: Path | Sequence[Path], site: str, expected: str) -> list[Path]:
    """The folders that may be patients of a site, by data folder and name; `expected` is a file of a patient.

    Raises DataError for a data folder that is missing or without such folders, and where two data folders have one of
    the same name: that patient could both train and test.
    """
    found: list[Path] = []
    for path in (source,) if isinstance(source, Path) else source:
        if not path.is_dir():
            raise DataError(f"site {site}: its data folder does not exist", detail=str(path))
        try:
            here = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
        except OSError as error:
            raise DataError(
                f"site {site}: its data folder cannot be read ({reason(error)})", detail=str(path)
            ) from error
        if not here:
            raise no_patient(site, expected, path)
        found += here
    doubled = len(found) - len({folder.name for folder in found})
    if doubled:
        raise DataError(
            f"site {site}: {doubled} patients are in several of its data folders; keep each patient in one",
            detail=", ".join(str(folder) for folder in found),
        )
    return found


def no_patient(site: str, expected: str, source: Path | Sequence[Path]) -> DataError:
    """The error of a site without patients."""
    where = (source,) if isinstance(source, Path) else source
    return DataError(
        f"site {site}: no patient found; expected SITE/PATIENT/{expected}", detail=", ".join(map(str, where))
    )


def _images(folder: Path, site: str) -> dict[str, Path]:
    images: dict[str, Path] = {}
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(
            f"site {site}: a patient's folder cannot be read ({reason(error)})", detail=str(folder)
        ) from error
    for path in entries:
        suffix = next((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), None)
        if suffix is not None and not path.name.startswith("."):
            images[path.name.removesuffix(suffix)] = path
    return images
