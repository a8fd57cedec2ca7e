"""Opens a released model to apply it: its file, the study in it, and the network as it serves a site."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from wardround.errors import DataError, StudyError
from wardround.federation.release import load_model, own_folder, personal_part, serve, study_of
from wardround.learning.frozen import freeze
from wardround.models.adapters import attach
from wardround.models.build import build_model
from wardround.plan.weights import frozen_part, model_sha256
from wardround.runs.protocols import read_protocols
from wardround.storage.hash_log import LOG
from wardround.storage.verify import read_log
from wardround.study.plugins import Plugins
from wardround.study.protocols import ModelProtocols
from wardround.study.registry import Reading
from wardround.study.schema import Study
from wardround.tasks.build import build_task
from wardround.wire.files import reason, write_text
from wardround.wire.tensors import tensors_sha256

# Beside results: which release they came of.
USED = "model.json"
# A chain of releases has its models in a folder of this name, beside its log.
_MODELS, _SHORT = "models", 12


@dataclass(frozen=True)
class ReleaseUsed:
    """Which release a result came of: its `model_sha256`, its study, and its number where it lies in a chain."""

    sha256: str
    study: str
    number: int | None = None

    @property
    def short(self) -> str:
        """The name by which people call it."""
        return self.sha256[:_SHORT]

    @property
    def said(self) -> str:
        """For people, and for what a file says of itself."""
        place = "" if self.number is None else f" (number {self.number} of its chain)"
        return f"release {self.short}{place} of study {self.study}"

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {"model_sha256": self.sha256, "release": self.short, "study": self.study, "number": self.number}

    def write(self, path: Path, more: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Put it into a file beside the results, with what `more` there is to say of them.

        Raises `DataError` where the disk does not take it.
        """
        try:
            write_text(path, json.dumps({**self.to_json(), **more}, indent=2) + "\n")
        except OSError as error:
            raise DataError(f"the output cannot be written ({reason(error)})", detail=str(path)) from error


def number_in_chain(path: Path, sha256: str) -> int | None:
    """The number of a release in the chain that its file lies in; `None` where it lies in none."""
    log = path.absolute().parent.parent / LOG
    if path.absolute().parent.name != _MODELS or not log.is_file():
        return None
    entries = (entry.payload for entry in read_log(log, LOG).entries)
    found = next((told.get("number") for told in entries if told.get("release") == sha256), None)
    return found if isinstance(found, int) else None


@dataclass(frozen=True, eq=False)
class ReleasedModel:
    """A released model as its file has it: see `opened`."""

    path: Path
    tensors: Mapping[str, npt.NDArray[Any]]
    metadata: Mapping[str, str]
    study: Study
    plugins: Plugins
    reading: Reading

    @classmethod
    def opened(cls, path: Path, plugins: Collection[str] = ()) -> ReleasedModel:
        """The model in a file; `plugins` are names of installed plug-ins that may be imported where it names one.

        Raises `DataError` for a file that holds none, and `StudyError` for one whose network a plug-in makes that may
        not be imported.
        """
        tensors, metadata = load_model(path)
        allowed = Plugins({"here": frozenset(plugins)})
        written = study_of(path, metadata)
        study = allowed.opened(written, partly=True)
        if study.model.closed:
            raise closed("network", study.model.kind)
        reading = Reading(allowed.settings(written), foreign=True)
        return cls(path, tensors, metadata, study, allowed, reading)

    @property
    def used(self) -> ReleaseUsed:
        """What its results say of it."""
        known = "shared" in self.metadata
        sha256 = model_sha256(self.tensors, self.metadata) if known else tensors_sha256(self.tensors)
        return ReleaseUsed(sha256, self.study.name, number_in_chain(self.path, sha256))

    @property
    def trained_on(self) -> ModelProtocols:
        """The scanners that it was trained on."""
        return read_protocols(self.metadata, self.study, self.reading)

    def network(self, build: Callable[[], nn.Module], site: str | None, weights: Path | None) -> nn.Module:
        """The network that `build` makes, with the model's values, as it serves a site; in evaluation mode.

        `weights` is the file with its frozen part, where that does not lie where the run put it. Raises `StudyError`
        for a site that the study does not have, and `DataError` for values that do not fit.
        """
        made = self.loaded(build, site, weights)
        if not self._has_part(site):
            serve(made, self.study, self.metadata, site)
        return made.eval()

    def _has_part(self, site: str | None) -> bool:
        """Whether a site that did not train completes the model with its part of the release that it came of."""
        if site is None or self.study.update is None:
            return False
        return (own_folder(self.path, site) / "local.safetensors").exists()

    def loaded(self, build: Callable[[], nn.Module], site: str | None, weights: Path | None) -> nn.Module:
        """The same with its adapters and its values alone; the part of a site that trained it is that site's own."""
        if site is not None and site not in self.study.sites:
            raise StudyError(f"--site {site}: the model's study has no such site, only {', '.join(self.study.sites)}")
        own = personal_part(self.path, site)
        tensors = {**self.tensors, **frozen_part(self.path, self.metadata, weights), **own}
        made = build()
        attached = attach(made, self.study.adapters, folds=self.study.method.folds)
        try:
            made.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
        except RuntimeError as error:
            raise DataError(
                "the model file's tensors do not fit the network of its study; get it again from where it was released",
                detail=f"{self.path}: {' '.join(str(error).split())}",
            ) from error
        freeze(made, self.study.parts.frozen, attached.frozen)
        return made.eval()

    def build(self) -> nn.Module:
        """The network of the study, without adapters, with values of no matter.

        Raises `StudyError` where a task or network is a plug-in's that may not be imported.
        """
        if self.study.task.kind == "reconstruction":
            return build_model(self.study.model, self.study.modality)
        return build_task(self.study, plugins=self.plugins).build_model()


def closed(what: str, kind: str) -> StudyError:
    """The error of a model of which a part is a plug-in's that may not be imported."""
    return StudyError(
        f"this model's {what} is a plug-in's, {kind!r}; if you trust the package that it came with, install it and "
        f"give --plugin {kind} (Python: plugins=({kind!r},))"
    )
