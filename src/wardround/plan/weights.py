"""Weights in files: released models, their frozen part, and what a study starts from. Found by place, known by hash."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from wardround.errors import DataError, StudyError, WireError
from wardround.learning.policy import listed
from wardround.models.published import Published
from wardround.plan.found import VARIABLE, by_content, hub_cache, searched
from wardround.plan.found import file_sha256 as file_sha256
from wardround.storage.hash_log import is_hash
from wardround.study.load import FOREIGN, load_study
from wardround.study.methods import AMPLITUDE_BANK
from wardround.study.patterns import matched
from wardround.study.places import Places
from wardround.study.schema import Study
from wardround.study.start import Fresh, FromAdapter, FromRelease, FromWeights, Start
from wardround.study.teacher import TaughtBy
from wardround.wire.canonical import digest, parse_json
from wardround.wire.files import reason, written
from wardround.wire.tensors import tensors_sha256

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from wardround.study.adapters import Adapters

Array = npt.NDArray[Any]
FORMAT = "wardround-model-1"
#: Keys of a released model's metadata: the names of its frozen part, and the hash by which that is stored elsewhere.
FROZEN, FROZEN_SHA256 = "frozen", "frozen_sha256"
_FOLDER = "weights"
# Bytes from which a model is read tensor by tensor.
_LARGE = 64 << 20
# A model of a site lies four folders below those of its run: models/SITE/ARM/model.safetensors.
_ABOVE = 4


# Released models ----------------------------------------------------------------------------------------------------


def load_model(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """The tensors and the metadata of a released model, without its frozen part (`frozen_part`).

    Raises `DataError` for anything else.
    """
    with _model_file(path):
        return load_file(path), _metadata(path)


def open_model(path: Path) -> tuple[Mapping[str, Array], dict[str, str]]:
    """The same; the tensors of a large model are read one by one, when they are asked for.

    Raises `DataError` for anything else, also while tensors are read.
    """
    with _model_file(path):
        metadata = _metadata(path)
        return (load_file(path) if path.stat().st_size < _LARGE else _Stored(path)), metadata


class _Stored(Mapping[str, "Array"]):
    """The tensors of a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(str(path), framework="numpy") as file:
            self._names = tuple(file.keys())

    def __getitem__(self, name: str) -> Array:
        if name not in self._names:
            raise KeyError(name)
        # The file is let go of each time, and with it the memory that shows it.
        with _model_file(self._path), safe_open(str(self._path), framework="numpy") as file:
            found: Array = file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), framework="numpy") as file:
        metadata: dict[str, str] = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise DataError("the file holds tensors, but it is not a model that `wardround run` wrote", detail=str(path))
    return metadata


@contextmanager
def _model_file(path: Path) -> Iterator[None]:
    """What goes wrong with a model's file, in words."""
    try:
        yield
    except PermissionError as error:
        raise DataError(f"the model file cannot be read ({reason(error)})", detail=str(path)) from error
    except (OSError, SafetensorError) as error:
        raise DataError(
            "the model file cannot be read: it must be a .safetensors file that `wardround run` wrote",
            detail=f"{path}: {error}",
        ) from error


def study_of(path: Path, metadata: Mapping[str, str]) -> Study:
    """The study that a released model carries; raises `DataError` where this version does not read it."""
    try:
        return load_study(parse_json(metadata["study"]), reading=FOREIGN)
    except (KeyError, ValueError, TypeError, StudyError, WireError) as error:
        raise DataError(
            "the model file holds no study that this version of Wardround reads; use the version that wrote it",
            detail=f"{path}: {' '.join(str(error).split())}",
        ) from error


def model_sha256(tensors: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    """The identity of a released model: the hash of its shared tensors, and of its frozen ones where it has any."""
    shared = tensors_sha256(tensors, metadata["shared"].split(" "))
    frozen = metadata.get(FROZEN_SHA256)
    return shared if frozen is None else digest([shared, frozen])


def save_frozen(values: Mapping[str, Array], sha256: str, folder: Path) -> Path:
    """Store the frozen part of a run's models once, `folder/weights/SHA256.safetensors`; raises `OSError`."""
    path = folder / _FOLDER / f"{sha256}.safetensors"
    if not path.exists():
        with written(path) as file:
            # Not as it lies in memory: the library writes that, whatever the strides.
            file.write(save({name: np.array(values[name], order="C") for name in sorted(values)}))
    return path


def frozen_part(model: Path, metadata: Mapping[str, str], given: Path | None = None) -> dict[str, Array]:
    """The frozen values of a released model: from `given`, or from the folder `weights` of its run or beside it.

    Empty for a model that holds all of its values. Raises `DataError` where they are not there, or are others.
    """
    sha256 = metadata.get(FROZEN_SHA256)
    if sha256 is None:
        return {}
    if not is_hash(sha256) or FROZEN not in metadata:
        raise DataError("the model's file names its frozen part by what is no hash; get it again", detail=str(model))
    name = f"{sha256}.safetensors"
    places = [model.parent / name, *(above / _FOLDER / name for above in model.absolute().parents[:_ABOVE])]
    path = given or next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError(
            f"the model's frozen part is not in its file and was not found: put {name} (in the folder `{_FOLDER}` of "
            "the run) beside the model's file, or name it with --weights",
            detail=str(model),
        )
    names = metadata[FROZEN].split(" ")
    try:
        with safe_open(str(path), framework="numpy") as file:
            held = set(file.keys())
            found = {n: file.get_tensor(n) for n in names} if held.issuperset(names) else {}
    except (OSError, SafetensorError) as error:
        raise DataError(
            "the file with the model's frozen part cannot be read: it must be a .safetensors file",
            detail=f"{path}: {error}",
        ) from error
    if not found or (actual := tensors_sha256(found)) != sha256:
        why = f"they have sha256 {actual}" if found else "some are not in it"
        raise DataError(
            f"the model's frozen values are those of sha256 {sha256}, and in the file given {why}; get the file {name}",
            detail=str(path),
        )
    return found


# What a study starts from -------------------------------------------------------------------------------------------


def place_of(start: FromWeights | FromRelease, places: Places) -> Path:
    """The first of the places at which something lies, else a file of the study's hash; raises `StudyError`."""
    found = next((place for place in places.start if place.exists()), None)
    if found is None and isinstance(start, FromWeights):
        found = by_content(start.sha256, PurePosixPath(start.file).name, places.stores)
    if found is None:
        raise StudyError(
            f"start.file: {start.file} does not exist{_looked(start, places)}; put it there, below the study's folder, "
            "or say where it lies with `start` in a site's entry of the sites file",
            detail=_listed(places.start, places),
        )
    return _file_in(found, start.file, "start", release=isinstance(start, FromRelease))


def place_of_teacher(teacher: TaughtBy, places: Places) -> Path:
    """The first of the places at which the model that teaches lies; raises `StudyError` where it lies at none."""
    found = next((place for place in places.teacher if place.exists()), None)
    if found is None:
        raise StudyError(
            f"task.teacher.file: {teacher.file} does not exist; put it there, below the study's folder, or say where "
            "it lies with `teacher` in a site's entry of the sites file",
            detail=", ".join(map(str, places.teacher)),
        )
    return _file_in(found, teacher.file, "task.teacher", release=True)


def _file_in(found: Path, file: str, section: str, *, release: bool) -> Path:
    """What was found, or the model in it where it is the folder of a run; `section` is that of the study."""
    path = found / "models" / "federated.safetensors" if release and found.is_dir() else found
    if not path.is_file():
        raise StudyError(
            f"{section}.file: {file} is no file, or the folder of a run that released no model; correct the path",
            detail=str(path),
        )
    return path


def begin(start: Start, places: Places, adapters: Adapters, model: nn.Module, *, whole: bool = False) -> None:
    """Put the values that a study starts from into a model with its adapters; does nothing for a fresh start.

    Of a `whole` start, of a model that is measured as it is, no value may begin fresh. Raises `StudyError` for a file
    that is not there or is another than the study's, and for values that do not fit.
    """
    if isinstance(start, Fresh):
        return
    path = place_of(start, places)
    # An adapter may bring layers that its base lacks.
    alone = whole and start.adapter is None
    if isinstance(start, FromWeights):
        given = _begin_with_file(start, path, model, whole=alone)
    else:
        given = _begin_with_release(start, path, model, whole=alone)
    if start.adapter is not None:
        # Late: studies without one need nothing of it.
        from wardround.plan.peft import begin_with_adapter

        folder = _folder_of(start.adapter, places)
        given |= begin_with_adapter(start.adapter, folder, start.sha256, adapters, model)
        if whole:
            _check_whole(start, given, model)


def _folder_of(adapter: FromAdapter, places: Places) -> Path:
    """Where the folder of an adapter lies: at its place, else around a file of the study's hash."""
    found = next((place for place in places.adapter if place.is_dir()), None)
    if found is not None:
        return found
    held = by_content(adapter.sha256, "adapter_model.safetensors", places.stores)
    if held is None:
        raise StudyError(
            f"start.adapter.file: {adapter.file} is no folder{_looked(adapter, places)}; put it there, below the "
            "study's folder, or into a folder that `weights` in a site's entry of the sites file names",
            detail=_listed(places.adapter, places),
        )
    return held.parent


def _looked(start: FromWeights | FromRelease | FromAdapter, places: Places) -> str:
    """What else was searched, in words that may leave a site."""
    if isinstance(start, FromRelease) or not start.sha256:
        return ""
    count = len(searched(places.stores))
    return (
        f", and no .safetensors file of sha256 {start.sha256} was found in this machine's folders of weights ({count}: "
        f"`weights` in the sites file, {VARIABLE}) nor in its Hugging Face cache"
    )


def _listed(at: tuple[Path, ...], places: Places) -> str:
    return ", ".join(map(str, (*at, *searched(places.stores), hub_cache())))


def _begin_with_file(start: FromWeights, path: Path, model: nn.Module, *, whole: bool) -> frozenset[str]:
    """The names of the values that it put into the model."""
    with _reading(start.file, path):
        before = path.stat()
        _check_hash(start, file_sha256(path))
        # Of a file that another process writes meanwhile, the hash says nothing.
        with safe_open(str(path), framework="pt") as file:
            prefix = f"{start.into}." if start.into else ""
            theirs = _named(start, model, file.keys())
            names = {prefix + name: theirs[name] for name in _taken(start, tuple(theirs))}
            shapes = {ours: tuple(file.get_slice(name).get_shape()) for ours, name in names.items()}
            _fill(model, start, shapes, lambda ours: file.get_tensor(names[ours]), within=prefix, whole=whole)
        after = path.stat()
    if (before.st_ino, before.st_size, before.st_mtime_ns) != (after.st_ino, after.st_size, after.st_mtime_ns):
        raise StudyError(f"start.file: {start.file} was written while it was read; try again", detail=str(path))
    return frozenset(shapes)


def _named(start: FromWeights, model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """By its name in the network that the file is of, the file's name of each value that the network has a use for."""
    try:
        network = model.get_submodule(start.into)
    except AttributeError:
        network = model
    if not isinstance(network, Published):
        return {name: name for name in names}
    found: dict[str, str] = {}
    for theirs in names:
        ours = network.name_of(theirs)
        if ours in found:
            raise StudyError(
                f"start.file: {start.file} names one value of the network twice, {found[ours]} and {theirs}; remove one"
            )
        if ours is not None:
            found[ours] = theirs
    return found


def _begin_with_release(start: FromRelease, path: Path, model: nn.Module, *, whole: bool) -> frozenset[str]:
    """The names of the values that it put into the model."""
    import torch

    tensors, _, covered = whole_release(start, path, "start")
    shapes = {name: tensors[name].shape for name in _taken(start, covered) if not _of_a_run(name)}
    _fill(model, start, shapes, lambda name: torch.from_numpy(tensors[name]), whole=whole)
    return frozenset(shapes)


def whole_release(
    named: FromRelease | TaughtBy, path: Path, section: str
) -> tuple[dict[str, Array], dict[str, str], list[str]]:
    """The tensors of a released model with its frozen part, its metadata, and the names that its hash covers.

    `named` is what the `section` of a study says of it. Raises `StudyError` for another model than the study's.
    """
    try:
        tensors, metadata = load_model(path)
        tensors |= frozen_part(path, metadata)
    except DataError as error:
        raise StudyError(f"{section}.file: {named.file}: {error}", detail=error.detail) from error
    covered = [*metadata.get("shared", "").split(), *metadata.get(FROZEN, "").split()]
    if "shared" not in metadata or not tensors.keys() >= set(covered):
        raise StudyError(f"{section}.file: {named.file} does not hold what it says; get it again", detail=str(path))
    _check_hash(named, model_sha256(tensors, metadata), section)
    return tensors, metadata, covered


def _check_hash(named: FromWeights | FromRelease | TaughtBy, found: str, section: str = "start") -> None:
    if not named.sha256:
        raise StudyError(f"{section}.sha256: is missing, and the hash fixes what a study is; write `sha256: {found}`")
    if found != named.sha256:
        raise StudyError(
            f"{section}.file: {named.file} is another file than the study's, or it changed: its sha256 is {found}, and "
            f"the study says {named.sha256}; restore it, or start a new run with the new hash"
        )


def _of_a_run(name: str) -> bool:
    """Whether a value is of a run and its sites, and not of the model: every run begins with an empty bank."""
    return name.startswith(f"{AMPLITUDE_BANK}.")


def _taken(start: FromWeights | FromRelease, names: Sequence[str]) -> Sequence[str]:
    """Which of a file's values are taken. Raises `StudyError` where a pattern of `start.only` matches none."""
    if not start.only:
        return names
    return matched(
        start.only,
        names,
        lambda one: f"start.only: {one!r} matches no value of {start.file}, which has {listed(names)}; correct it",
    )


def _fill(
    model: nn.Module,
    start: FromWeights | FromRelease,
    shapes: Mapping[str, tuple[int, ...]],
    value: Any,
    within: str = "",
    *,
    whole: bool = False,
) -> None:
    """Copy `value(name)` for every name of `shapes` into a model; names outside `within` may be left out.

    Of a `whole` start none may.
    """
    import torch

    from wardround.models.adapters import added_values

    state = model.state_dict()
    if unknown := [name for name in shapes if name not in state]:
        raise StudyError(
            f"start.file: {start.file} holds values that the model lacks: {listed(unknown)}; the model has "
            f"{listed(tuple(state))}. Choose the model that they are of, or set `start.into`"
        )
    for name, shape in shapes.items():
        if shape != tuple(state[name].shape):
            raise StudyError(
                f"start.file: {start.file} has {name} of shape {list(shape)}, and the model one of "
                f"{list(state[name].shape)}; choose the model that it is of"
            )
    # Counters say nothing of what was learned, and a release does not share them. Adapters begin with the study.
    fresh = added_values(model).union(filter(_of_a_run, state))
    floats = [n for n in state if n.startswith(within) and n not in fresh and state[n].is_floating_point()]
    lacking = [name for name in floats if name not in shapes]
    if whole:
        _check_whole(start, shapes, model)
    named = [name for name in lacking if any(fnmatch.fnmatchcase(name, within + pattern) for pattern in start.only)]
    if named:
        raise StudyError(
            f"start.only: {start.file} has no values for {listed(named)}, which the patterns name; choose the model "
            "that the file is of"
        )
    if lacking and not start.partial:
        raise StudyError(
            f"start.file: {start.file} has no values for {listed(lacking)}; set `start.partial: true` to begin them "
            "fresh"
        )
    with torch.no_grad():
        for name in shapes:
            tensor: Tensor = value(name)
            if torch.promote_types(tensor.dtype, state[name].dtype) != state[name].dtype:
                raise StudyError(
                    f"start.file: {start.file} has {name} as {str(tensor.dtype).removeprefix('torch.')}, which the "
                    f"model's {str(state[name].dtype).removeprefix('torch.')} cannot hold; convert the file"
                )
            state[name].copy_(tensor)


def _check_whole(start: FromWeights | FromRelease, given: Collection[str], model: nn.Module) -> None:
    """Raise `StudyError` where a value of a model that is measured as it is would begin fresh."""
    from wardround.models.adapters import added_values

    added = added_values(model)
    floats = (n for n, tensor in model.state_dict().items() if tensor.is_floating_point() and not _of_a_run(n))
    if fresh := [name for name in floats if name not in added and name not in given]:
        raise StudyError(
            f"start.file: {start.file} has no values for {listed(fresh)}, and with schedule.rounds 0 they would be "
            "measured untrained; name a file that has them, or train them (schedule.rounds)"
        )


@contextmanager
def _reading(file: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StudyError(f"start.file: {file} cannot be read ({reason(error)})", detail=str(path)) from error
    except SafetensorError as error:
        raise StudyError(
            f"start.file: {file} cannot be read: it must be a .safetensors file; `wardround weights import` makes one "
            "of a .pth",
            detail=f"{path}: {error}",
        ) from error
