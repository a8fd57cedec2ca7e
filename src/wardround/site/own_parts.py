"""A site's private parts of released models, by release: what a study needs that continues one of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from wardround.errors import DataError
from wardround.site.lineage import Lineage
from wardround.wire.files import written
from wardround.wire.tensors import tensors_sha256

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
FOLDER = "own_parts"


def second_name(file: Path, path: Path) -> None:
    """Give a file that is replaced as a whole and never changed a second name, or where that cannot be, copy it.

    What was at `path` is replaced. Raises `OSError` where the disk is full.
    """
    if path.exists() and path.samefile(file):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".draft")
    draft.unlink(missing_ok=True)
    try:
        os.link(file, draft)
    except OSError:
        with written(path, durable=True) as copy, file.open("rb") as source:
            shutil.copyfileobj(source, copy)
        return
    draft.rename(path)


@dataclass(frozen=True)
class OwnParts:
    """The private parts in a site's history folder. They are in no message and leave the site in no other way."""

    history: Path

    def path(self, release: str) -> Path:
        """Where the part of a release lies, if there is one."""
        return self.history / FOLDER / f"{release}.safetensors"

    def keep(self, release: str, part: Path) -> str | None:
        """Keep the file `part`, where it exists, as that of a release; the hash of its values.

        What was kept of the release before is replaced. Raises `OSError` where the disk is full, and `DataError` for a
        damaged file.
        """
        path = self.path(release)
        if not part.exists():
            return None
        second_name(part, path)
        return tensors_sha256(self.of(release))

    def of(self, release: str) -> dict[str, Array]:
        """The values by model name; none where the site kept nothing. Raises `DataError` for a damaged file."""
        path = self.path(release)
        if not path.exists():
            return {}
        try:
            found: dict[str, Array] = load_file(path)
            return found
        except (OSError, SafetensorError) as error:
            raise DataError(
                "the site's private part of the release that the study continues cannot be read; restore it",
                detail=f"{path}: {error}",
            ) from error


def carried_part(site: str, releases: Sequence[str], history: Path, initial: Mapping[str, Tensor]) -> dict[str, Array]:
    """A site's private part of the release that its study continues; none where it did not train that.

    `releases` are that release and those that it came of: a site that was away has the part of an earlier one.
    `initial` are the study's values by name. Raises `DataError` where the part is gone, is another or does not fit.
    """
    record = Lineage(history)
    held = next(((one, kept) for one in releases if (kept := record.own_part(one)) is not None), None)
    if held is None:
        return {}
    release, kept = held
    found = OwnParts(history).of(release)
    if not found or tensors_sha256(found) != kept:
        raise DataError(
            f"site {site} trained the release that the study continues, and its private part of it is "
            f"{'another' if found else 'gone'}; restore it in the site's history folder",
            detail=str(OwnParts(history).path(release)),
        )
    if strange := [name for name in found if name not in initial or tuple(initial[name].shape) != found[name].shape]:
        raise DataError(
            f"site {site}: its private part of the release that the study continues does not fit the study's model "
            f"({strange[0]}); continue it with the model and the method that it was trained with"
        )
    return found
