"""A folder of projector weights, so that a geometry is built once on a machine.

Only a geometry goes into it, and what follows from one: nothing of an image, a patient or a model.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import platform
import shutil
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy import sparse

from wardround.imaging.acquisition.ct import geometry as ct_geometry
from wardround.imaging.acquisition.ct import projector
from wardround.imaging.acquisition.ct.projector import Model, weight_matrix
from wardround.study.ct import CTGeometry
from wardround.wire.canonical import digest

_LOG = logging.getLogger(__name__)
#: Names another folder than the user's cache folder, or none: `off`.
VARIABLE = "WARDROUND_CACHE"
# A header is parsed as Python, and CPython 3.11 counts how deep it is in all threads together.
_READING = threading.Lock()
_ABANDONED = 24 * 3600.0  # seconds after which a file that nobody finished writing is nobody's


def default_folder() -> Path:
    """The user's cache folder, $XDG_CACHE_HOME/wardround or ~/.cache/wardround, and in it `projectors`."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The specification has relative ones ignored.
    return (root if root.is_absolute() else Path.home() / ".cache") / "wardround" / "projectors"


def user_cache() -> MatrixCache | None:
    """The cache that studies share on a machine: in $WARDROUND_CACHE, by default in the user's cache folder.

    None where the variable says `off`, or where nobody knows the user's home.
    """
    named = os.environ.get(VARIABLE, "")
    if named.lower() == "off":
        return None
    try:
        return MatrixCache(Path(named).expanduser() / "projectors" if named else default_folder())
    except RuntimeError:
        return None


@dataclass(frozen=True)
class MatrixCache:
    """Weights on disk by a hash of what decides them; when full, what was used longest ago goes first.

    Files are numpy archives without pickle, written aside and moved into place: readers and writers in other
    processes see whole files or none. A file that cannot be read is built anew; a folder that cannot be written
    to is worked without, and so is a disk that a file would half fill.
    """

    folder: Path = field(default_factory=default_folder)
    limit_bytes: int = 4 * 2**30

    def weights(self, geometry: CTGeometry, model: Model) -> sparse.csr_matrix:
        """Return the weights of a geometry as `projector.weight_matrix` builds them, from the folder if there."""
        found = self.find(geometry, model)
        if found is not None:
            return found
        path = self._path(geometry, model)
        built = weight_matrix(geometry, model)
        try:
            self._write(path, built)
        except OSError as error:
            _LOG.debug("projector weights are not kept: %s", error)
        return built

    def find(self, geometry: CTGeometry, model: Model, most_bytes: float = math.inf) -> sparse.csr_matrix | None:
        """Return the weights if they are in the folder and take at most so many bytes; nothing is built."""
        path = self._path(geometry, model)
        try:
            return _read(path) if path.stat().st_size <= most_bytes else None
        except OSError:
            return None

    def _path(self, geometry: CTGeometry, model: Model) -> Path:
        return self.folder / f"{_key(geometry, model)}.npz"

    def _write(self, path: Path, weights: sparse.csr_matrix) -> None:
        size = weights.data.nbytes + weights.indices.nbytes + weights.indptr.nbytes
        if size > self.limit_bytes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(size)
        # A run needs the disk for more than what it can build anew.
        if size > shutil.disk_usage(self.folder).free // 2:
            return
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                arrays = {"data": weights.data, "indices": weights.indices, "indptr": weights.indptr}
                np.savez(file, allow_pickle=False, shape=np.array(weights.shape), **arrays)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise

    def _make_room(self, size: int) -> None:
        for written, _, path in self._files("*.part"):
            if time.time_ns() - written > _ABANDONED * 1e9:
                path.unlink(missing_ok=True)
        files = sorted(self._files("*.npz"))
        excess = sum(length for _, length, _ in files) + size - self.limit_bytes
        for _, length, path in files:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= length

    def _files(self, pattern: str) -> Iterator[tuple[int, int, Path]]:
        for path in self.folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # another process may have removed it
                status = path.stat()
                yield status.st_mtime_ns, status.st_size, path


def _key(geometry: CTGeometry, model: Model) -> str:
    weightless = geometry.model_dump(mode="json", exclude={"body_radius", "sweep"})
    return digest({"builder": _builder(), "model": model, "sweep": geometry.sweep_degrees, **weightless})


@cache
def _builder() -> list[str]:
    """What may change the bits of the weights of one geometry: the code, its arithmetic, the kind of processor."""
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in (projector, ct_geometry))
    capability = torch.backends.cpu.get_cpu_capability()
    return [hashlib.sha256(code).hexdigest(), np.__version__, platform.machine(), capability]


def _read(path: Path) -> sparse.csr_matrix | None:
    try:
        # Opened here, since numpy leaves a damaged archive open.
        with _READING, path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            parts = (file["data"], file["indices"], file["indptr"])
            matrix = sparse.csr_matrix(parts, tuple(file["shape"].tolist()))
        matrix.check_format(full_check=True)
    # zipfile: an unknown compression or version is not implemented, an encrypted file a runtime error.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return None
    with contextlib.suppress(OSError):  # the folder may be somebody else's
        os.utime(path)
    return matrix
