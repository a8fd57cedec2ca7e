"""How much memory a site's training takes at its peak: two steps are taken on a stand-in of the model.

On torch's `meta` device tensors have shapes and no numbers, so that a step costs no memory and almost no time, and what
autograd keeps has the size that it would have. Where a task reads a number meanwhile, which `meta` has not, the steps
are taken on the CPU. Every tensor that lives is counted (`Live`); what kernels use inside of themselves is not. On a
GPU torch's own counter is read.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wardround.learning.frozen import train_mode
from wardround.learning.model_context import ModelContext
from wardround.learning.optimizer import build_optimizer
from wardround.study.schema import Local

How = Literal["meta", "cpu", "cuda"]
#: The loss of a training batch, or of the largest piece of one, given a stand-in of the model on a device.
Step = Callable[[nn.Module, torch.device], Tensor]
# The first makes the optimiser's state, the second has it from the beginning.
_STEPS = 2


@dataclass(frozen=True)
class Footprint:
    """Bytes at a site. `step` is what two training steps add at their peak, `how` the device that they were taken on.

    It is None where it is not known what a batch looks like. `optimizer` and `gradients` are parts of `step`.
    """

    model: int
    frozen: int
    copies: int
    gradients: int
    optimizer: int
    step: int | None
    how: How | None
    #: The values of a released model that teaches, which lies beside.
    teacher: int = 0

    @property
    def total(self) -> int:
        """All of it: model, copies, teacher and step; without a step at least gradients and the optimiser's state."""
        return (
            self.model
            + self.copies
            + self.teacher
            + (self.gradients + self.optimizer if self.step is None else self.step)
        )


def footprint(
    context: ModelContext,
    shared: Collection[str],
    local: Local,
    step: Step | None,
    device: torch.device | None = None,
    own: Collection[str] = (),
    holds: int = 0,
) -> Footprint:
    """What training takes at a site.

    `shared` are the names that a round keeps as they came, to tell what changed; of `own` ones the site has values of
    its own, and of shared ones a method `holds` further copies. `device` is a CUDA device to measure on. Raises
    whatever the step raises on the CPU.
    """
    state = context.model.state_dict()
    sizes = {name: tensor.nbytes for name, tensor in state.items()}
    trained = [p for p in context.model.parameters() if p.requires_grad]
    taken, how = (None, None) if step is None else _taken(context, local, step, device)
    return Footprint(
        model=sum(sizes.values()),
        frozen=sum(sizes[name] for name in context.frozen),
        # The initial values of what may change, and the shared ones at the start of the round. A site's own ones are
        # there as they were before the round, as they are after it, and as another choice or part left them.
        copies=sum(sizes[name] for name in sizes if name not in context.frozen)
        + (1 + holds) * sum(sizes[name] for name in shared)
        + 3 * sum(sizes[name] for name in own),
        gradients=sum(p.nbytes for p in trained),
        optimizer=_slots(local) * sum(p.nbytes for p in trained),
        step=taken,
        how=how,
    )


def _slots(local: Local) -> int:
    """Values that the optimiser keeps of each trained one."""
    return (1 if local.momentum else 0) if local.optimizer == "sgd" else 2


def _taken(context: ModelContext, local: Local, step: Step, device: torch.device | None) -> tuple[int, How]:
    if device is not None and device.type == "cuda":
        return _on_gpu(context, local, step, device), "cuda"
    try:
        return _counted(context, local, step, torch.device("meta")), "meta"
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        # The task asks for a number, or torch has no shape of an operation.
        return _counted(context, local, step, torch.device("cpu")), "cpu"


def _counted(context: ModelContext, local: Local, step: Step, device: torch.device) -> int:
    model = stand_in(context, device)
    with torch.random.fork_rng([]):
        with torch.no_grad():
            # What is made once and kept, such as the projector of a scanner, is no part of a step.
            step(model, device)
        with Live() as live:
            _steps(model, local, step, device)
    return live.peak


def _on_gpu(context: ModelContext, local: Local, step: Step, device: torch.device) -> int:
    model = stand_in(context, device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng([device]):
        _steps(model, local, step, device)
    return torch.cuda.max_memory_allocated(device) - before


def _steps(model: nn.Module, local: Local, step: Step, device: torch.device) -> None:
    train_mode(model)
    optimizer = build_optimizer((model,), local)
    for _ in range(_STEPS):
        optimizer.zero_grad(set_to_none=True)
        # In the second piece the gradients of the first are there; further ones are as it.
        for _ in local.pieces[:2]:
            step(model, device).backward()  # type: ignore[no-untyped-call]
        if local.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), local.clip_norm)
        optimizer.step()


def stand_in(context: ModelContext, device: torch.device) -> nn.Module:
    """A copy of the model on a device, to be trained and thrown away; on the CPU it shares what is frozen."""
    state = context.model.state_dict(keep_vars=True)
    parameters = {id(p) for p in context.model.parameters()}
    memo: dict[int, Any] = {}
    for name, tensor in state.items():
        if name in context.frozen and device.type == "cpu":
            memo[id(tensor)] = tensor
            continue
        copied = tensor.detach().to(device, copy=True)
        memo[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if id(tensor) in parameters else copied
    for buffer in context.model.buffers():
        memo.setdefault(id(buffer), buffer.detach().to(device, copy=True))
    return deepcopy(context.model, memo)


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made while it is entered, as long as they live: `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __enter__(self) -> Live:
        gc.collect()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count the memory of what it gives, unless it is that of what it was given."""
        given = set(_storages((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in given:
                self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self._now -= size


def _storages(values: Any) -> Iterator[Any]:
    """The memory of all tensors that are not sparse: one object for those that share it, as long as any lives."""
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield value.untyped_storage()
