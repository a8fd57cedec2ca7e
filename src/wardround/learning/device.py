"""Where a site computes, and in which precision: a choice of its machine, in no study and no message but its facts.

Encoding, masking and sums are whole numbers on the CPU everywhere. What a device computes comes to the host through
`wardround.wire.host.on_host` alone, and a batch goes the other way through `moved` alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from pathlib import PurePath
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.study.sites import Precision
from wardround.wire.host import on_host

Array = npt.NDArray[Any]
T = TypeVar("T")
# What the layers of a network compute in; parameters, losses, optimisers and physics stay in 32 bits.
_LAYERS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Gradients of 16 bits are scaled up by this at first; torch halves it where they overflow.
_FIRST_SCALE = 2.0**12
# Values of a batch that are the same on every device.
_PLAIN = (str, bytes, int, float, complex, np.ndarray, np.generic, PurePath, Enum, type(None), torch.dtype)


@dataclass(frozen=True)
class Compute:
    """A device, the precision of a network's layers on it, and torch's threads on the CPU.

    See `compute_of` for a device that a site's file names.
    """

    device: torch.device
    precision: Precision = "fp32"
    threads: int = 1

    @property
    def on_cpu(self) -> bool:
        """Whether tensors are in this process's memory as they are."""
        return self.device.type == "cpu"

    def moved(self, batch: T) -> T:
        """A batch with every tensor in it on the device; on the CPU the batch itself."""
        return batch if self.on_cpu else moved(batch, self.device)

    def tensor(self, array: Array) -> Tensor:
        """An array as a tensor on the device; on the CPU it shares the array's memory where that can be written."""
        array = np.asarray(array)
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.device)

    def autocast(self) -> AbstractContextManager[Any]:
        """Until the context is left, a network's layers compute in the precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=_LAYERS[self.precision])

    def scaler(self) -> torch.amp.GradScaler:
        """What keeps gradients of fp16 from vanishing; it does nothing in another precision.

        A step whose gradients overflow is left out, and the scale halved.
        """
        return torch.amp.GradScaler(self.device.type, init_scale=_FIRST_SCALE, enabled=self.precision == "fp16")

    def facts(self) -> dict[str, str]:
        """Device, precision and threads as a fingerprint names them."""
        name = str(self.device)
        if self.device.type == "cuda":
            name = f"{name} ({torch.cuda.get_device_name(self.device)})"
        return {"device": name, "precision": self.precision, "threads": str(self.threads)}

    def fit_for_privacy(self) -> None:
        """Raise `StudyError` where a round could not be repeated bit for bit, or a step shows more than it may.

        Noise is drawn anew only where something that the sums depend on changed (`PrivacyBudget.pay`), so the same must
        give the same bits.
        """
        if self.precision == "fp16":
            raise StudyError(
                "protection.privacy: precision fp16 leaves steps out where gradients overflow, which would be known of "
                "single patients; set `precision: bf16` or `fp32` in the sites file"
            )
        if self.device.type == "mps":
            raise StudyError(
                "protection.privacy: torch does not say which operations of mps give the same bits again, and a "
                "repeated round needs them; set `device: cpu` in the sites file"
            )

    @contextmanager
    def deterministic(self) -> Iterator[None]:
        """Until the context is left, an operation without a deterministic kernel raises `StudyError`; not on the CPU.

        There, the site's threads give the same bits with every operation.
        """
        if self.on_cpu:
            yield
            return
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            yield
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            raise StudyError(
                f"protection.privacy: an operation of the network has no kernel on {self.device} that gives the same "
                "bits again, and a repeated round needs them; set `device: cpu` in the sites file, or choose another "
                "model",
                detail=str(error),
            ) from error
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    @contextmanager
    def forked_random(self) -> Iterator[None]:
        """Torch's random numbers, the device's too, go on afterwards where they were."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            yield

    def random_states(self) -> tuple[Tensor, ...]:
        """Where torch's random numbers are, the CPU's and the device's."""
        own = (torch.cuda.get_rng_state(self.device),) if self.device.type == "cuda" else ()
        return (torch.get_rng_state(), *own)


CPU = Compute(torch.device("cpu"))


def free_memory(compute: Compute) -> int | None:
    """Bytes that a GPU has left for processes to come; `None` of any other device, whose memory is the machine's."""
    if compute.device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(compute.device)[0])


def compute_of(device: str, precision: Precision, site: str) -> Compute:
    """The device that a site's file names (`auto`, `cpu`, `cuda`, `cuda:1`, `mps`) and its precision.

    `auto` is the first CUDA device where there is one, else the CPU. Raises `StudyError` where the device is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    key, kind = f"sites.{site}.device: {device}", device.partition(":")[0]
    if kind == "cpu":
        return Compute(torch.device("cpu"), precision)
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise StudyError(f"{key}: torch finds no Apple GPU here; set `device: cpu`, or `auto`")
        return Compute(torch.device("mps", 0), precision)
    if not torch.cuda.is_available():
        built = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device here"
        raise StudyError(f"{key}: {built}; set `device: cpu`, or `auto`")
    index, count = int(device.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        raise StudyError(f"{key}: there are {count} CUDA devices here, numbered from 0; set one of them, or `auto`")
    # Deterministic products need it, and cuBLAS reads it once, when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # By default convolutions round to 10 bits of 23: more than the last digits would differ.
    torch.backends.cudnn.allow_tf32 = False
    return Compute(torch.device("cuda", index), precision)


class Losses(Protocol):
    """The part of a task that training needs."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The scalar that training lowers."""
        ...


class Scores(Losses, Protocol):
    """The part of a task that a learner needs."""

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Metric name, or source -> values of each example."""
        ...


@dataclass(frozen=True)
class Placed:
    """A task's loss and scores where a site computes: batches come from the data set as they are."""

    task: Scores
    compute: Compute

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """See `wardround.tasks.task.Task`."""
        with self.compute.autocast():
            return self.task.loss(model, self.compute.moved(batch))

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """See `wardround.tasks.task.Task`."""
        with self.compute.autocast():
            return self.task.score(model, self.compute.moved(batch))


def moved(batch: T, device: torch.device) -> T:
    """A batch with every tensor in it on a device, whatever holds them.

    Tensors; mappings, lists, tuples and named tuples; dataclasses, made anew from their fields; everything else with a
    `to(device)`, operators included. Arrays, numbers, texts and paths stay as they are. Raises `StudyError` for
    anything else, which would stay behind.
    """
    return _moved(batch, device)  # type: ignore[no-any-return]


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, _PLAIN):
        return part
    if isinstance(part, Tensor):
        return part.to(device)
    if isinstance(part, Mapping):
        return {key: _moved(value, device) for key, value in part.items()}
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(_moved(value, device) for value in part))
    if isinstance(part, list | tuple):
        return type(part)(_moved(value, device) for value in part)
    if callable(getattr(part, "to", None)):
        return part.to(device)
    if is_dataclass(part) and not isinstance(part, type):
        made = {f.name: _moved(getattr(part, f.name), device) for f in fields(part) if f.init}
        return replace(part, **made)
    raise StudyError(
        f"a batch of the task holds a {type(part).__name__}, which cannot be moved to {device}; give it a method "
        "`to(device)` that returns it there, or make it a dataclass of tensors"
    )


def as_arrays(given: Mapping[str, Tensor | Array], live: Sequence[Tensor] = ()) -> dict[str, Array]:
    """What a hook gave, as arrays in this process's memory; a tensor that shares it with one of `live` is copied.

    Arrays pass as they are.
    """
    storages = {tensor.untyped_storage().data_ptr() for tensor in live}
    return {
        name: (on_host(part).copy() if part.untyped_storage().data_ptr() in storages else on_host(part))
        if isinstance(part, Tensor)
        else part
        for name, part in given.items()
    }
