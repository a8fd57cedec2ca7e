"""Checkpoints of others (`.pth`, `.pt`) as `.safetensors`, once and by hand: a study starts from nothing else.

A checkpoint is a pickle, which can hold code. It is read with torch's `weights_only`, which refuses everything but
tensors and plain values; what a study names by its hash is then a file that cannot hold any.
"""

from __future__ import annotations

import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from wardround.errors import DataError
from wardround.learning.policy import listed
from wardround.plan.weights import file_sha256
from wardround.wire.files import reason, written

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
# How far below the top of a checkpoint its tensors are looked for: {"checkpoint": {"model": {...}}}.
_DEPTH = 3
# A header names each tensor; more room than any needs.
_HEADER = 1 << 20


@dataclass(frozen=True)
class Imported:
    """A file that a study can start from. `part` is where its tensors stood in the checkpoint, `""` for the top."""

    path: Path
    sha256: str
    tensors: int
    values: int
    nbytes: int
    part: str = ""
    left_out: tuple[str, ...] = ()
    made_whole: tuple[str, ...] = ()

    @property
    def study(self) -> str:
        """The lines of a study that starts from it."""
        return f"start:\n  kind: weights\n  file: {self.path.name}\n  sha256: {self.sha256}"


def import_checkpoint(
    path: Path, out: Path | None = None, *, part: str | None = None, overwrite: bool = False
) -> Imported:
    """Convert a checkpoint to `out` (default: beside it, with the ending .safetensors); a .safetensors is only checked.

    `part` names which of several sets of tensors to take (`model`, `ema.model`). The file is there whole or not at all.
    Raises `DataError` for what is no checkpoint, holds more than tensors and plain values, or does not fit on the disk,
    and where `out` exists, unless `overwrite`.
    """
    if not path.is_file():
        what = "is a folder; name a file in it" if path.is_dir() else "does not exist; correct the path"
        raise DataError(f"{path.name} {what}", detail=str(path))
    if path.suffix == SUFFIX:
        if out is not None or part is not None:
            raise DataError(f"{path.name} is a {SUFFIX} file, which needs no conversion; leave --out and --part out")
        return _checked(path)
    out = path.with_suffix(SUFFIX) if out is None else out
    check_free(out, overwrite=overwrite)
    held = _read(path)
    name, tensors = _chosen(path, dict(_parts(held)), part)
    written = write_weights(out, tensors)
    beside = held if name else {}
    left_out = tuple(sorted(str(key) for key in beside if key != name.partition(".")[0]))
    return replace(written, part=name, left_out=left_out)


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raise `DataError` for a file with another ending than .safetensors, and one that exists, unless `overwrite`."""
    if out.suffix != SUFFIX:
        raise DataError(f"--out {out.name}: a study starts from a {SUFFIX} file; give it that ending")
    if out.exists() and not overwrite:
        raise DataError(f"{out.name} exists already; add --force to replace it, or name another with --out")


def write_weights(
    out: Path, tensors: Mapping[str, Tensor], check: Callable[[bytes], None] = lambda _: None
) -> Imported:
    """Write tensors as a .safetensors file, whole or not at all: not where `check`, given its bytes, raises.

    Raises `DataError` where it does not fit on the disk, and for a tensor that such a file cannot hold.
    """
    whole, made_whole = _whole(tensors)
    _write(out, whole, check)
    return Imported(out, file_sha256(out), *_counts(whole), made_whole=made_whole)


def _checked(path: Path) -> Imported:
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path.name} is damaged, or no {SUFFIX} file; get it again", detail=str(error)) from error
    return Imported(path, file_sha256(path), *_counts(tensors))


def _counts(tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
    return len(tensors), sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())


def _read(path: Path) -> Mapping[str, Any]:
    import torch

    try:
        # Mapped, so that of a file of several sets of tensors only one is read.
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise DataError(f"{path.name} cannot be read ({reason(error)})", detail=str(path)) from error
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise DataError(
                f"{path.name} holds more than tensors ({found.group(1)}), which could be code, and is not opened; save "
                "`model.state_dict()` alone where it was made",
                detail=str(path),
            ) from error
        raise _no_checkpoint(path) from error
    except Exception as error:
        # Any bytes may stand in a file that is no pickle, and any error comes of reading them as one.
        raise _no_checkpoint(path) from error
    if not isinstance(held, Mapping):
        raise DataError(
            f"{path.name} holds a {type(held).__name__} and no tensors by name; save `model.state_dict()` instead"
        )
    return held


def _no_checkpoint(path: Path) -> DataError:
    return DataError(f"{path.name} is damaged, or no file that `torch.save` wrote; get it again", detail=str(path))


def _parts(held: Mapping[Any, Any], place: str = "", depth: int = 0) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every mapping with tensors by name and nothing else, and where it stands."""
    import torch

    # An optimiser keeps its tensors by numbers.
    if depth > _DEPTH or not held or not all(isinstance(key, str) for key in held):
        return
    if all(isinstance(value, torch.Tensor) for value in held.values()):
        yield place, dict(held)
        return
    for key, value in held.items():
        if isinstance(value, Mapping):
            yield from _parts(value, f"{place}.{key}" if place else key, depth + 1)


def _chosen(path: Path, parts: Mapping[str, dict[str, Tensor]], part: str | None) -> tuple[str, dict[str, Tensor]]:
    if not parts:
        raise DataError(
            f"{path.name} holds no tensors by name, or other values among them; save `model.state_dict()` alone where "
            "it was made",
            detail=str(path),
        )
    if part is None and len(parts) > 1:
        raise DataError(f"{path.name} holds several sets of tensors; choose one with --part: {listed(tuple(parts))}")
    if part is not None and part not in parts:
        raise DataError(f"--part {part}: {path.name} has {listed([name or '(the top)' for name in parts])}")
    name = next(iter(parts)) if part is None else part
    return name, parts[name]


def _whole(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors that lie in memory of their own, in order; the names of those that shared it. Raises `DataError`."""
    import torch

    of_storage: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise DataError(f"{name} is sparse or quantised; save it as a plain tensor where it was made")
        of_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    shared = {name for names in of_storage.values() if len(names) > 1 for name in names if tensors[name].numel()}
    whole = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) if name in shared else tensor.contiguous()
        for name, tensor in tensors.items()
    }
    return whole, tuple(sorted(shared))


def _write(out: Path, tensors: Mapping[str, Tensor], check: Callable[[bytes], None]) -> None:
    from safetensors.torch import save

    out.parent.mkdir(parents=True, exist_ok=True)
    needed, free = sum(t.nbytes for t in tensors.values()) + _HEADER, shutil.disk_usage(out.parent).free
    if needed > free:
        raise DataError(
            f"the disk has {free:,} bytes free and {out.name} needs {needed:,}; free some space, or name another place "
            "with --out",
            detail=str(out),
        )
    try:
        with written(out) as file:
            # Not `save_file`: it writes to the disk itself, and its error does not say that the disk is full.
            data = save(dict(tensors), metadata={"format": "pt"})
            check(data)
            file.write(data)
    except OSError as error:
        raise DataError(f"{out.name} cannot be written ({reason(error)})", detail=str(out)) from error
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{out.name} cannot be written: a tensor is of a kind that {SUFFIX} lacks") from error
