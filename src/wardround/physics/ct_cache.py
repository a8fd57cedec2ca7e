"""A folder of projector weights, so that a geometry is built once on a machine."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import sparse

from wardround.physics.projector import Model, weight_matrix
from wardround.study.ct import CTGeometry
from wardround.wire.canonical import digest

_VERSION = 1  # raise when the weights of an unchanged geometry change


def default_folder() -> Path:
    """The user's cache folder: $XDG_CACHE_HOME, or ~/.cache, and in it wardround/projectors."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "wardround" / "projectors"


@dataclass(frozen=True)
class MatrixCache:
    """Weights on disk by a hash of what decides them; when full, what was used longest ago goes first.

    Files are numpy archives without pickle, written aside and moved into place: readers and writers in other
    processes see whole files or none. A file that cannot be read is built anew; a folder that cannot be written
    to is worked without.
    """

    folder: Path = field(default_factory=default_folder)
    limit_bytes: int = 4 * 2**30

    def weights(self, geometry: CTGeometry, model: Model) -> sparse.csr_matrix:
        """Return the weights of a geometry as `projector.weight_matrix` builds them, from the folder if there."""
        path = self.folder / f"{_key(geometry, model)}.npz"
        found = _read(path)
        if found is not None:
            return found
        built = weight_matrix(geometry, model)
        with contextlib.suppress(OSError):
            self._write(path, built)
        return built

    def _write(self, path: Path, weights: sparse.csr_matrix) -> None:
        size = weights.data.nbytes + weights.indices.nbytes + weights.indptr.nbytes
        if size > self.limit_bytes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._make_room(size)
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
        files = []
        for path in self.folder.glob("*.npz"):
            with contextlib.suppress(FileNotFoundError):  # another process may have removed it
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(length for _, length, _ in files) + size - self.limit_bytes
        for _, length, path in sorted(files):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= length


def _key(geometry: CTGeometry, model: Model) -> str:
    weightless = geometry.model_dump(mode="json", exclude={"body_radius", "sweep"})
    return digest({"version": _VERSION, "model": model, "sweep": geometry.sweep_degrees, **weightless})


def _read(path: Path) -> sparse.csr_matrix | None:
    try:
        # Opened here, since numpy leaves a damaged archive open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            parts = (file["data"], file["indices"], file["indptr"])
            matrix = sparse.csr_matrix(parts, tuple(file["shape"].tolist()))
        matrix.check_format(full_check=True)
        os.utime(path)
    # zipfile: an unknown compression or version is not implemented, an encrypted file a runtime error.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError):
        return None
    return matrix
