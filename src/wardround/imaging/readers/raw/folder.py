"""A hospital's folder of raw data: a folder a patient, or a file a patient."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from wardround.errors import DataError
from wardround.imaging.readers.raw import KINDS, RawSlices, is_raw, open_raw, raw_files
from wardround.wire.files import reason

_HDF5 = (".h5", ".hdf5", ".mrd")


class RawFolder:
    """The raw data of one site, from one folder or several.

    A folder in it is a patient, with all raw data files in it and below. A file that lies beside them is a patient,
    too; where headers name a patient (fastMRI's `patient_id`, ISMRMRD's `patientID`), all files that name the same one
    are that patient's. Patients are numbered in the order of their names, which nothing outside this class sees but for
    `name`. `unused` counts folders in which nothing was found. Raises DataError for a missing folder, for one without
    patients, and for a patient who is in two of them.
    """

    def __init__(self, source: Path | Sequence[Path], site: str) -> None:
        self.site = site
        self.unused = 0
        sources = (source,) if isinstance(source, Path) else tuple(source)
        found: dict[str, list[Path]] = {}
        for folder in sources:
            here = self._patients(folder)
            if not here:
                raise DataError(f"site {site}: no patient found; expected {KINDS}", detail=str(folder))
            if doubled := here.keys() & found.keys():
                raise DataError(
                    f"site {site}: {len(doubled)} patients are in several of its data folders; keep each in one",
                    detail=", ".join(sorted(doubled)),
                )
            found |= here
        self._names = tuple(sorted(found))
        self._files: Mapping[str, tuple[Path, ...]] = {name: tuple(sorted(files)) for name, files in found.items()}

    def __len__(self) -> int:
        return len(self._names)

    def name(self, patient: int) -> str:
        """Return what the site calls a patient: it stays at the site."""
        return self._names[patient]

    @property
    def names(self) -> tuple[str, ...]:
        """Return all names, in the order of the patients' numbers."""
        return self._names

    def files(self, patient: int) -> tuple[Path, ...]:
        """Return a patient's files, by path: for readers and for the `detail` of errors."""
        return self._files[self._names[patient]]

    def open(self, patient: int) -> list[RawSlices]:
        """Open a patient's files. Raises DataError where one cannot be used."""
        return [open_raw(path) for path in self.files(patient)]

    def digest(self, patient: int) -> str:
        """Return the sha256 (hex) over the content of a patient's files. Raises DataError."""
        contents = []
        for path in self.files(patient):
            beside = [path.with_suffix(".hdr")] if path.suffix.lower() == ".cfl" else []
            for one in (path, *beside):
                try:
                    with one.open("rb") as file:
                        contents.append(hashlib.file_digest(file, "sha256").hexdigest())
                except OSError as error:
                    said = f"site {self.site}: a raw data file cannot be read ({reason(error)})"
                    raise DataError(said, detail=str(one)) from error
        return hashlib.sha256("/".join(contents).encode()).hexdigest()

    def _patients(self, source: Path) -> dict[str, list[Path]]:
        if not source.is_dir():
            raise DataError(f"site {self.site}: its data folder does not exist", detail=str(source))
        try:
            entries = [entry for entry in sorted(source.iterdir()) if not entry.name.startswith(".")]
            folders = {entry.name: raw_files(entry) for entry in entries if entry.is_dir()}
        except OSError as error:
            raise DataError(
                f"site {self.site}: its data folder cannot be read ({reason(error)})", detail=str(source)
            ) from error
        self.unused += sum(not files for files in folders.values())
        found = {name: files for name, files in folders.items() if files}
        self._check_folders(found)
        for path in (entry for entry in entries if is_raw(entry) and not entry.is_dir()):
            found.setdefault(patient_of(path) or path.stem, []).append(path)
        return found

    def _check_folders(self, folders: Mapping[str, Sequence[Path]]) -> None:
        """Raise DataError where headers name one patient in two folders: that patient could both train and test."""
        whose: dict[str, str] = {}
        for folder, files in folders.items():
            for patient in {patient for path in files if (patient := patient_of(path))}:
                if whose.setdefault(patient, folder) != folder:
                    raise DataError(
                        f"site {self.site}: the headers of files in two folders name one patient; put all files of a "
                        "patient into one folder",
                        detail=f"{folder}, {whose[patient]}",
                    )


def patient_of(path: Path) -> str | None:
    """Whom the header of a file names; `None` where it names no patient or cannot be read, which is said later."""
    if path.suffix.lower() not in _HDF5:
        return None
    try:
        return open_raw(path).facts.patient
    except DataError:
        return None
