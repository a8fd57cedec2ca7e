"""The one model of a process, as a study begins it: network, adapters, start and what never changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from wardround.errors import StudyError
from wardround.learning.device import CPU, Compute
from wardround.learning.frozen import all_but, freeze, remember
from wardround.learning.laid_aside import LaidAside, lay_down
from wardround.learning.policy import Parameter
from wardround.models.adapters import attach
from wardround.models.checkpointing import checkpoint_blocks
from wardround.study.adapters import Adapters, NoAdapters
from wardround.tasks.task import Repeating, Task
from wardround.wire.host import on_host
from wardround.wire.random import public_seed
from wardround.wire.tensors import TensorInfo

Array = npt.NDArray[Any]


def parameters_of(model: nn.Module, head: Sequence[str] = ()) -> tuple[Parameter, ...]:
    """Every parameter and persistent buffer of a model, in the order of its state; `head` are patterns of its head."""
    owners = {
        f"{prefix}.{name}" if prefix else name: type(module).__name__
        # A part that stands in two places has two names in the state.
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
    }
    trainable = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    return tuple(
        Parameter(
            TensorInfo(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)),
            trainable=trainable.get(name, False),
            buffer=name not in trainable,
            layer=owners[name],
            head=any(fnmatchcase(name, pattern) for pattern in head),
        )
        for name, tensor in model.state_dict().items()
    )


_NO_ADAPTERS = NoAdapters()
# Torch's generator is the process's: two models that are built at once would have each other's values.
_DRAWING = threading.RLock()


class ModelContext:
    """The one model of a process, and how it was initialised: public randomness on the CPU, so the same everywhere.

    It gets the study's `adapters`. Then `begin` may put other values into it, those that the study starts from. What
    `frozen` matches, and what adapters leave as it is, is in `initial` once, as the model's own tensors, and never
    written again. Sites that compute on another device share another, which `on` makes of it.

    `head` are patterns of what is its head, `only` those of what alone learns; without them all does. With a folder
    `aside` the initial values lie in a file there. Where the process `trains` nothing, the model has no others.
    """

    def __init__(
        self,
        task: Task,
        seed: int,
        begin: Callable[[nn.Module], None] = lambda _: None,
        frozen: Sequence[str] = (),
        adapters: Adapters = _NO_ADAPTERS,
        folds: bool = False,
        checkpoint: bool = False,
        aside: Path | None = None,
        trains: bool = True,
        head: Sequence[str] = (),
        only: Sequence[str] = (),
    ) -> None:
        self.task = task
        self.compute = CPU
        self._all = {CPU: self}
        with _DRAWING:
            torch.manual_seed(public_seed(seed, "initialisation") % 2**63)
            self.model = task.build_model()
            # The same adapters whatever network was built before them.
            torch.manual_seed(public_seed(seed, "adapters") % 2**63)
            attached = attach(self.model, adapters, folds=folds)
        if checkpoint and not checkpoint_blocks(self.model):
            raise StudyError(
                "local.checkpoint: this network has no blocks that could forget what they compute; leave it out, and "
                "set local.accumulate to take batches in pieces"
            )
        begin(self.model)
        self.frozen = freeze(self.model, frozen, attached.frozen | all_but(self.model, only))
        #: What adapters keep at each site.
        self.local = attached.local
        if isinstance(task, Repeating) and task.repeats:
            remember(self.model)
        self.parameters = parameters_of(self.model, head)
        state = self.model.state_dict()
        moving = {name: tensor for name, tensor in state.items() if name not in self.frozen or not trains}
        self._aside = LaidAside(moving, aside)
        if not trains:
            lay_down(self.model, self._aside.values)
        self.initial = {name: self._aside.values.get(name, tensor) for name, tensor in state.items()}

    def on(self, compute: Compute) -> ModelContext:
        """The model context of this process for a device and precision: the same initial values, a model of its own."""
        if compute not in self._all:
            other = copy(self)
            other.compute = compute
            other.model = deepcopy(self.model).to(compute.device)
            state = other.model.state_dict()
            other.initial = {
                name: state[name] if name in self.frozen else tensor.to(compute.device)
                for name, tensor in self.initial.items()
            }
            self._all[compute] = other
        return self._all[compute]

    def rest(self) -> None:
        """Let go of memory that initial values took when they were read, where they lie in a file."""
        self._aside.rest()

    def initial_values(self) -> dict[str, Array]:
        """The initial values of the whole model, shared and private parts alike."""
        return {name: on_host(tensor) for name, tensor in self.initial.items()}
