"""What holds a study to the release that it continues: Fisher information, found by place and known by hash."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from wardround.errors import StudyError
from wardround.learning.elastic import Pull
from wardround.learning.model_context import ModelContext
from wardround.learning.policy import Policy, listed
from wardround.plan.found import by_content, file_sha256
from wardround.study.places import Places
from wardround.study.schema import Study
from wardround.study.update import Elastic
from wardround.wire.files import reason

Array = npt.NDArray[Any]
_KEY = "update.retain.fisher"
_FORMAT = "wardround-fisher-1"


def elastic_of(study: Study) -> Elastic | None:
    """The section of a study that is held by Fisher information; `None` for any other."""
    retain = None if study.update is None else study.update.retain
    return retain if isinstance(retain, Elastic) and study.trains else None


def fisher_of(study: Study, places: Places) -> Mapping[str, Array]:
    """The Fisher information that a study names, by model name.

    Raises `StudyError` where it names none, and for a file that is not there, is another, or is of another release.
    """
    retain = elastic_of(study)
    assert retain is not None
    named = retain.fisher
    if named is None:
        raise StudyError(
            f"{_KEY}: is missing; `wardround update` measures it at the release's sites, and a study of `method: "
            "{kind: fisher}` that starts from the same release leaves it in models/fisher.safetensors"
        )
    path = next((place for place in places.fisher if place.is_file()), None)
    path = path or by_content(named.sha256, PurePosixPath(named.file).name, places.stores)
    if path is None:
        raise StudyError(
            f"{_KEY}.file: {named.file} does not exist; put it there, below the study's folder, or into a folder that "
            "`weights` in a site's entry of the sites file names",
            detail=", ".join(map(str, places.fisher)),
        )
    try:
        if (found := file_sha256(path)) != named.sha256:
            said = f"the study says {named.sha256}" if named.sha256 else f"the study says none: write `sha256: {found}`"
            raise StudyError(f"{_KEY}.file: {named.file} has sha256 {found}, and {said}", detail=str(path))
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
        tensors: dict[str, Array] = load_file(path)
    except (OSError, SafetensorError) as error:
        why = reason(error) if isinstance(error, OSError) else "it is no .safetensors file"
        raise StudyError(f"{_KEY}.file: {named.file} cannot be read ({why})", detail=f"{path}: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise StudyError(f"{_KEY}.file: {named.file} holds no Fisher information that `wardround` measured")
    if metadata.get("of") != getattr(study.start, "sha256", None):
        raise StudyError(
            f"{_KEY}.file: {named.file} is of another release than `start` names; measure that of this one"
        )
    if any(not np.isfinite(tensor).all() or tensor.min(initial=0.0) < 0.0 for tensor in tensors.values()):
        raise StudyError(f"{_KEY}.file: {named.file} holds a value that no square is; measure it again")
    return tensors


def pull_of(study: Study, fisher: Mapping[str, Array], context: ModelContext, policy: Policy) -> Pull:
    """What is added to losses in an arm; raises `StudyError` where a weight that is trained and shared has none."""
    retain = elastic_of(study)
    assert retain is not None
    shapes = {p.name: p.info.shape for p in context.parameters if p.trainable and policy.roles[p.name] == "shared"}
    if lacking := sorted(n for n, shape in shapes.items() if n not in fisher or fisher[n].shape != tuple(shape)):
        raise StudyError(
            f"{_KEY}: has nothing for {listed(tuple(lacking))}; measure it with the same model, `parts` and sharing"
        )
    return Pull(retain.weight, {name: fisher[name] for name in shapes})
