"""Vectors that a site provides of its patients, as prompts for a network. They are read at the site and stay there."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from wardround.errors import DataError
from wardround.imaging.readers.volume import FloatArray
from wardround.wire.archives import read_npz

# The name of a vector that serves every patient who has none of their own.
EVERYBODY = "all"


class Embeddings:
    """The vectors of a file, .npz or .safetensors, named like the patients' folders, or one named `all` for everybody.

    Each is (dimension,), or (tokens, dimension) where a report was embedded word by word. `whose` names the site in
    errors, which never name a patient. Raises DataError for a file that is missing, damaged or empty, for another
    dimension, and for values that are no finite numbers.
    """

    def __init__(self, path: Path, dimension: int, whose: str) -> None:
        self._whose, self._path = whose, path
        arrays = _read(path, whose)
        if not arrays:
            raise DataError(f"{whose}: the file of embeddings holds none", detail=str(path))
        wrong = [a for a in arrays.values() if a.ndim not in (1, 2) or 0 in a.shape or a.shape[-1] != dimension]
        if wrong:
            raise DataError(
                f"{whose}: {len(wrong)} of {len(arrays)} embeddings have the shape {wrong[0].shape}, but the study's "
                f"model takes ({dimension},) or (tokens, {dimension}); provide those of the encoder that the study "
                "names, or set `model.anatomy.dimension`",
                detail=str(path),
            )
        bad = sum(a.dtype.kind not in "fiu" or not np.isfinite(a.astype(np.float32)).all() for a in arrays.values())
        if bad:
            raise DataError(
                f"{whose}: {bad} of {len(arrays)} embeddings hold NaN, infinity or something else than real numbers; "
                "make them again",
                detail=str(path),
            )
        self._vectors = {name: np.ascontiguousarray(np.atleast_2d(a), np.float32) for name, a in arrays.items()}

    def require(self, folders: list[str]) -> None:
        """Raise DataError unless every patient has a vector; it says how many lack one, never who."""
        lacking = [name for name in folders if name not in self._vectors]
        if lacking and EVERYBODY not in self._vectors:
            raise DataError(
                f"{self._whose}: {len(lacking)} of {len(folders)} patients have no embedding; add vectors named like "
                f"their folders, or one named `{EVERYBODY}`",
                detail=f"{self._path}: {', '.join(lacking)}",
            )

    def of(self, folder: str) -> FloatArray:
        """The vectors of a patient, float32 (tokens, dimension)."""
        return self._vectors[folder if folder in self._vectors else EVERYBODY]

    def only(self) -> FloatArray:
        """The one embedding of a file that is of one patient. Raises DataError where there are several."""
        if len(self._vectors) > 1:
            raise DataError(
                f"{self._whose}: the file holds {len(self._vectors)} embeddings; give a file with that of the one "
                "patient",
                detail=str(self._path),
            )
        (vector,) = self._vectors.values()
        return vector

    def digest(self, folder: str) -> str:
        """Sha256 (hex) over a patient's vectors."""
        vector = self.of(folder)
        return hashlib.sha256(repr(vector.shape).encode() + vector.tobytes()).hexdigest()


def _read(path: Path, whose: str) -> dict[str, NDArray[np.generic]]:
    if not path.is_file():
        raise DataError(f"{whose}: the file of embeddings does not exist; correct its path", detail=str(path))
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix == ".npz":
            return read_npz(path)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, SafetensorError) as error:
        raise DataError(
            f"{whose}: the file of embeddings is damaged or holds Python objects; store plain arrays",
            detail=f"{path}: {error}",
        ) from error
    raise DataError(f"{whose}: embeddings must be a .npz or .safetensors file", detail=str(path))
