"""A released model that is to be continued, kept or compared: where it lies, what it is, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from wardround.errors import StudyError
from wardround.federation.release import model_path
from wardround.plan.arms import FEDERATED
from wardround.plan.weights import FROZEN, FROZEN_SHA256, model_sha256, open_model, study_of
from wardround.results.files import RESULT_FILE, read_result
from wardround.results.schema import Result
from wardround.study.schema import Study
from wardround.study.start import FromRelease

_SHORT = 12


def short(release: str) -> str:
    """The name by which people call a release: the first digits of its hash."""
    return release[:_SHORT]


@dataclass(frozen=True)
class Release:
    """A model's file, and the folder of its run where it lies in one."""

    model: Path
    run: Path | None = None

    @classmethod
    def at(cls, path: Path) -> Release:
        """The release in the folder of a run, or in a model's file. Raises `StudyError` where there is none."""
        if not path.exists():
            raise StudyError(
                "the release does not exist: give the folder of a finished run, a released model's file, or with "
                "--chain the number or hash of a release in the chain",
                detail=str(path),
            )
        if path.is_dir():
            model = model_path(path, FEDERATED)
            if not model.is_file():
                raise StudyError(
                    "the folder holds no released model: finish the run, or give another folder", detail=str(path)
                )
            return cls(model, path)
        above = path.absolute().parent.parent
        is_run = path.absolute() == model_path(above, FEDERATED) and (above / RESULT_FILE).is_file()
        return cls(path, above if is_run else None)

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """What its file says of it; raises `DataError` for a file that is no released model."""
        return open_model(self.model)[1]

    @cached_property
    def sha256(self) -> str:
        """Its `model_sha256`."""
        return model_sha256(*open_model(self.model))

    @cached_property
    def study(self) -> Study:
        """The study that it carries; raises `DataError` where this version does not read it."""
        return study_of(self.model, self.metadata)

    @property
    def parent(self) -> str | None:
        """The release that it began with, if any."""
        start = self.study.start
        return start.sha256 if isinstance(start, FromRelease) and start.sha256 != self.sha256 else None

    @property
    def ancestors(self) -> tuple[str, ...]:
        """The releases that it came of, the nearest first, as its file says."""
        update = self.study.update
        further = () if update is None else update.ancestors
        return () if self.parent is None else (self.parent, *further)

    @cached_property
    def result(self) -> Result | None:
        """What its run wrote; `None` for a file alone."""
        return None if self.run is None or not (self.run / RESULT_FILE).is_file() else read_result(self.run)

    @cached_property
    def personal(self) -> tuple[str, ...]:
        """The trained values that its hash does not cover: a part that stays at each site."""
        tensors, metadata = open_model(self.model)
        covered = {*metadata.get("shared", "").split(), *metadata.get(FROZEN, "").split()}
        return tuple(name for name in tensors if name not in covered and tensors[name].dtype.kind == "f")

    @property
    def frozen_part(self) -> Path | None:
        """Where its frozen part lies, in the folder `weights` of its run or beside it; `None` where it has none."""
        sha256 = self.metadata.get(FROZEN_SHA256)
        if sha256 is None:
            return None
        name = f"{sha256}.safetensors"
        above = self.model.absolute().parents[:3]
        places = [self.model.parent / name, *(folder / "weights" / name for folder in above)]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise StudyError(
                f"the release's frozen part is gone: put {name} (in the folder `weights` of its run) beside its model",
                detail=str(self.model),
            )
        return found
