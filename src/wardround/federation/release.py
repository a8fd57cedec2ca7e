"""Saves what an arm releases: the model as safetensors, and the private parts in a folder for each site."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from wardround.errors import DataError, StudyError
from wardround.federation.coordinator import Release
from wardround.learning.methods.build import build_method
from wardround.plan.arm_specs import ArmSpec, ArmSpecs, protocols_of
from wardround.plan.arms import FEDERATED, Arm, every_arm
from wardround.plan.leaving import LEFT
from wardround.plan.weights import FORMAT as FORMAT
from wardround.plan.weights import FROZEN, FROZEN_SHA256, model_sha256, place_of, save_frozen
from wardround.plan.weights import load_model as load_model
from wardround.plan.weights import open_model as open_model
from wardround.plan.weights import study_of as study_of
from wardround.study.load import FOREIGN
from wardround.study.methods import CustomMethod
from wardround.study.protocols import HeaderFacts, ModelProtocols
from wardround.study.schema import Study
from wardround.study.start import FromRelease, Start
from wardround.wire.files import written
from wardround.wire.tensors import TensorFile, TensorInfo, TensorWriter, joined

if TYPE_CHECKING:
    from torch import nn

Array = npt.NDArray[Any]
PROTOCOLS = "protocols"
NOTHING: Mapping[str, str] = MappingProxyType({})
CARD = "model_card.md"


def scanners_of_arm(arm_specs: ArmSpecs, arm: Arm, headers: Mapping[str, HeaderFacts]) -> ModelProtocols:
    """The scanners of an arm's sites, with what the sites let out of their headers.

    Of a model that the study was given, those in its file, if it has any: it learned nothing at these sites.
    """
    if not arm_specs.study.trains:
        return _scanners_of_given(arm_specs.study.start, arm_specs)
    return ModelProtocols(
        scanners={site: arm_specs.study.acquisition_of(site) for site in arm.members if arm_specs.study.scans},
        headers={site: headers[site] for site in arm.members if headers.get(site)},
    )


def _scanners_of_given(start: Start, arm_specs: ArmSpecs) -> ModelProtocols:
    if not isinstance(start, FromRelease):
        return ModelProtocols(scanners={}, headers={})
    path = place_of(start, arm_specs.places)
    written_in = open_model(path)[1].get(PROTOCOLS)
    if written_in is None:
        return ModelProtocols(scanners={}, headers={})
    try:
        return ModelProtocols.model_validate_json(written_in, context=FOREIGN)
    except ValidationError as error:
        raise StudyError(
            f"start.file: the scanners in {start.file} cannot be read; use the version of Wardround that wrote it",
            detail=" ".join(str(error).split()),
        ) from error


def save_release(
    arm_specs: ArmSpecs, arm_spec: ArmSpec, release: Release, scanners: ModelProtocols, path: Path
) -> Path:
    """Write a released model to `path`: as a site that did not take part gets it, and what it was trained on.

    Its frozen part is not in the file, which names its hash (`save_frozen_part`). Whole or not at all; raises `OSError`
    where the disk is full.
    """
    shared = arm_spec.method.release_for(None, release.state.public, release.state.private)
    return save_model(arm_specs, arm_spec, shared, release.number, scanners, path)


def save_model(
    arm_specs: ArmSpecs,
    arm_spec: ArmSpec,
    values: Mapping[str, Array],
    number: int,
    scanners: ModelProtocols,
    path: Path,
    more: Mapping[str, str] = NOTHING,
) -> Path:
    """Write values of an arm's model in round `number`, by model name, as `save_release` does; all others are initial.

    `more` is further metadata.
    """
    model_context, frozen = arm_specs.model_context, arm_specs.frozen_sha256
    aside = model_context.frozen.union(values)
    rest = {name: array for name, array in model_context.initial_values().items() if name not in aside}
    metadata = {
        **more,
        "format": FORMAT,
        "study": arm_specs.study.model_dump_json(),
        "study_sha256": arm_specs.study_sha256,
        "plan_sha256": arm_specs.plan_sha256,
        "arm": arm_spec.arm.name,
        "round": str(number),
        "shared": " ".join(sorted(arm_spec.policy.names("shared"))),
        PROTOCOLS: scanners.model_dump_json(),
        **_left(arm_specs),
        **({} if frozen is None else {FROZEN: " ".join(sorted(model_context.frozen)), FROZEN_SHA256: frozen}),
    }
    # Not `save_file`: it writes to the disk itself, and its error does not say that the disk is full.
    tensors = joined(values, rest)
    with written(path) as file:
        order = _begin(file, tensors, metadata)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
    return path


def save_beside(arm_specs: ArmSpecs, arm_spec: ArmSpec, release: Release, folder: Path) -> None:
    """Write what the method releases beside the model, a file each in `folder`, with whose it is."""
    metadata = {
        "study_sha256": arm_specs.study_sha256,
        "plan_sha256": arm_specs.plan_sha256,
        "of": getattr(arm_specs.study.start, "sha256", ""),
    }
    for name, tensors in arm_spec.method.also_released(release.state.public).items():
        with written(folder / f"{name}.safetensors") as file:
            for entry in _begin(file, tensors, {"format": f"wardround-{name}-1", **metadata}):
                file.write(np.ascontiguousarray(tensors[entry]).reshape(-1).view(np.uint8).data)


def _left(arm_specs: ArmSpecs) -> dict[str, str]:
    """Who left the model, where anybody did."""
    forget = arm_specs.study.forget
    left = arm_specs.left | ({forget.site} if forget is not None and forget.how != "unlearn" else set())
    return {LEFT: " ".join(sorted(left))} if left else {}


def save_frozen_part(arm_specs: ArmSpecs, folder: Path) -> None:
    """Store once what the models of a run have in common and never trained, where the study freezes anything."""
    sha256 = arm_specs.frozen_sha256
    if sha256 is not None:
        save_frozen(arm_specs.frozen_values(), sha256, folder)


def _begin(file: BinaryIO, tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> list[str]:
    """Write the header of a safetensors file, sorted: the library writes metadata in another order each time.

    The names of the tensors in the order in which their values follow: the library's own. Nothing but a header is made
    in memory.
    """
    table = {name: TensorInfo(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
    data = save({name: np.zeros(1, info.dtype) for name, info in table.items()}, metadata=dict(metadata))
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    order = sorted(table, key=lambda name: header[name]["data_offsets"][0])
    offset = 0
    for name in order:
        info = table[name]
        header[name] |= {"shape": list(info.shape), "data_offsets": [offset, offset + info.nbytes]}
        offset += info.nbytes
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    return order


def model_path(out: Path, folder: str) -> Path:
    """Where an arm's model lies."""
    return out / "models" / f"{folder}.safetensors"


def model_of_study(path: Path, study_sha256: str, plan_sha256: str) -> Mapping[str, Array]:
    """The tensors of a model of this very study and its defaults; raises `StudyError` for a model of another one.

    Those of a large one are read when they are asked for.
    """
    tensors, metadata = open_model(path)
    if metadata.get("study_sha256") != study_sha256:
        raise StudyError(
            f"models/{path.name} belongs to another study; evaluate it with the study it was trained by, or train again"
        )
    if metadata.get("plan_sha256") != plan_sha256:
        raise StudyError(
            f"models/{path.name} was trained by a version that fills in other defaults of the study; use the version "
            "that trained it, or train again"
        )
    return tensors


def own_folder(path: Path, site: str) -> Path:
    """Where a site keeps what is its own of a released model."""
    return path.parent / site / path.stem


def personal_part(path: Path, site: str | None) -> dict[str, Array]:
    """The private part that a site keeps beside a released model, models/SITE/ARM/local.safetensors.

    Empty where there is none: another hospital's copy of the model, or a method that keeps nothing. Raises `DataError`
    for a file of another model.
    """
    if site is None or not (own := own_folder(path, site) / "local.safetensors").exists():
        return {}
    try:
        private: dict[str, Array] = load_file(own)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the private part of site {site} cannot be read; restore it, or move it away to use the model without it",
            detail=f"{own}: {error}",
        ) from error
    tensors, _ = open_model(path)
    if any(name not in tensors or tensors[name].shape != tensor.shape for name, tensor in private.items()):
        raise DataError(
            f"the private part of site {site} belongs to another model; keep the two together as `wardround run` "
            "wrote them",
            detail=str(own),
        )
    return private


def serve(network: nn.Module, study: Study, metadata: Mapping[str, str], site: str | None) -> None:
    """Let a loaded network serve a site as the method of its study says: as a stranger unless it trained the model.

    A custom method and a plug-in's are left out: a hospital that has only the model may lack the package.
    """
    arms = {arm.name: arm for arm in every_arm(study)}
    arm = arms[metadata.get("arm", FEDERATED)]
    own = isinstance(arm.method, CustomMethod) or arm.method.closed
    if site not in arm.members and not own:
        build_method(arm.method, protocols_of(study, arm.members)).serving_unseen(network)


def shared_sha256(path: Path) -> str:
    """The identity of a released model: the hash of its shared tensors, and of its frozen ones where it has any."""
    return model_sha256(*open_model(path))


def as_tensor_file(tensors: Mapping[str, Array], path: Path, without: Collection[str] = ()) -> tuple[TensorFile, str]:
    """The tensors as a message's body, `without` some of them, and its hash."""
    with written(path) as file:
        writer = TensorWriter(file)
        for name in tensors:
            if name not in without:
                writer.add(name, tensors[name])
    return TensorFile(path, writer.table), writer.sha256
