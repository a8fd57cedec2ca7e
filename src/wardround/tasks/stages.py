"""Stages of a task: which of them learn in a round, and with which weight each one's loss counts.

Importing this needs no torch: a coordinator knows of stages by the names of their tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from wardround.errors import StudyError
from wardround.study.phases import Phase
from wardround.tasks.task import Batch, Staged, Task

if TYPE_CHECKING:
    from torch import Tensor, nn

Array = npt.NDArray[Any]


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float] | None = None) -> Tensor:
    """The sum of losses by stage, each times its weight (1 without `weights`): scalar.

    A loss of weight 0 is left out, so its value does not matter. Raises `StudyError` where a loss is missing.
    """
    counted = dict.fromkeys(losses, 1.0) if weights is None else {n: w for n, w in weights.items() if w > 0.0}
    missing = sorted(counted.keys() - losses.keys())
    if missing or not counted:
        raise StudyError(f"task: `losses` gives no loss of the stage {missing[0]!r}" if missing else "task: no losses")
    first, *others = (losses[name] * weight for name, weight in counted.items())
    for other in others:
        first = first + other
    return first


@dataclass(frozen=True)
class Weighed:
    """A task whose loss is the sum that a phase asks for."""

    task: Staged
    weights: Mapping[str, float]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See `wardround.tasks.task.Task`. Raises `StudyError` where no weighted loss reaches what learns."""
        import torch

        total = weighted_sum(self.task.losses(model, batch), self.weights)
        if torch.is_grad_enabled() and not total.requires_grad:
            named = ", ".join(name for name, weight in self.weights.items() if weight > 0.0)
            raise StudyError(
                f"schedule.phases: the loss of {named} does not depend on a stage that learns; give the loss of such a "
                "stage a weight, or let `losses` pass its gradient on"
            )
        return total

    def score(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """See `wardround.tasks.task.Task`."""
        return self.task.score(model, batch)


@dataclass(frozen=True)
class Stint:
    """A phase of a study, as the task's model has it.

    It lasts from round `first` to the next one's. `learns` and `idle` are stages, `still` the names of all parameters
    and buffers of the idle ones. `rates` are shares of the learning rate, of stages that do not have all of it.
    """

    first: int
    learns: tuple[str, ...]
    idle: tuple[str, ...]
    weights: Mapping[str, float]
    still: frozenset[str]
    rates: Mapping[str, float] = field(default_factory=dict)

    @contextmanager
    def holding(self, model: nn.Module) -> Iterator[None]:
        """Until the context is left, idle stages are in evaluation and no gradient is made for them.

        Their running statistics stand still, and they drop nothing out.
        """
        held = []
        for stage in self.idle:
            part = model.get_submodule(stage)
            part.eval()
            held += [parameter for parameter in part.parameters() if parameter.requires_grad]
        for parameter in held:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in held:
                parameter.requires_grad_(True)

    def forget_gradients(self, model: nn.Module) -> None:
        """Drop what a method put on idle stages: an optimiser passes over a parameter without a gradient."""
        for stage in self.idle:
            for parameter in model.get_submodule(stage).parameters():
                parameter.grad = None

    def unmoved(self, changes: Mapping[str, Mapping[str, Array]], shared: Mapping[str, Any]) -> dict[str, Any]:
        """A site's changes by group and tensor, with 0 for the `shared` tensors of idle stages."""
        still = self.still & shared.keys()
        return {
            group: {name: np.zeros_like(change) if name in still else change for name, change in part.items()}
            for group, part in changes.items()
        }

    def describe(self) -> str:
        """What `check` prints of it."""
        losses = ", ".join(f"{weight:g} {name}" for name, weight in self.weights.items() if weight > 0.0)
        idle = f"; idle: {', '.join(self.idle)}" if self.idle else ""
        rates = "".join(f"; {stage} at {share:g} of the rate" for stage, share in self.rates.items())
        return f"from round {self.first}: {', '.join(self.learns)}; loss {losses}{rates}{idle}"


@dataclass(frozen=True)
class Curriculum:
    """The phases of a study in order; none where everything learns in every round, by the task's own loss."""

    stints: tuple[Stint, ...] = ()

    def at(self, number: int) -> Stint | None:
        """The phase of round `number` (from 1); numbers that come on top, for aborted rounds, are of the last."""
        return next((stint for stint in reversed(self.stints) if stint.first <= number), None)

    def task(self, number: int, task: Task) -> Task | Weighed:
        """What gives the loss of round `number`: the task itself, or the sum that a phase asks for."""
        stint = self.at(number)
        return Weighed(task, stint.weights) if stint is not None and isinstance(task, Staged) else task

    def rated_parts(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """The parts of a model that may have learning rates of their own: its stages, or all of it where none has one.

        They are the same in every round: an optimiser that is kept finds its state by their order.
        """
        if not any(stint.rates for stint in self.stints):
            return (model,)
        return tuple(model.get_submodule(stage) for stage in sorted(self.stints[0].learns + self.stints[0].idle))

    def rates(self, number: int) -> tuple[float, ...]:
        """The share of the learning rate that each of `rated_parts` has in round `number`."""
        stint = self.at(number)
        if stint is None or not any(each.rates for each in self.stints):
            return (1.0,)
        return tuple(stint.rates.get(stage, 1.0) for stage in sorted(stint.learns + stint.idle))

    def still(self, number: int) -> frozenset[str]:
        """The parameters and buffers that do not move in round `number`."""
        stint = self.at(number)
        return frozenset() if stint is None else stint.still

    def untouched(self, number: int) -> frozenset[str] | None:
        """The parameters and buffers that did not move in rounds 1 to `number`; `None` for all of them."""
        parts = [stint.still for stint in self.stints if stint.first <= number]
        if number < 1:
            return None
        return frozenset.intersection(*parts) if parts else frozenset()

    @property
    def selects_from(self) -> int:
        """The first round that may be released for its validation: of the last phase, as others lower other losses."""
        return self.stints[-1].first if self.stints else 1


WHOLE = Curriculum()


def curriculum_of(phases: Sequence[Phase], task: Task, model: nn.Module) -> Curriculum:
    """The phases of a study, resolved against its task and the task's model.

    Raises `StudyError` for phases of a task without stages, for a stage that the task does not have, for one that
    learns with no loss that reaches it, and for stages that do not part the model.
    """
    if not isinstance(task, Staged):
        if phases:
            raise StudyError("schedule.phases: the task has no stages, so all of it learns in every round; remove it")
        return WHOLE
    owners, first, stints = _owners(task.stages, model), 1, []
    for index, phase in enumerate(phases):
        weights = _weights(f"schedule.phases.{index}", phase, task.stages)
        stints.append(
            Stint(
                first=first,
                learns=tuple(stage for stage in task.stages if stage in phase.train),
                idle=tuple(stage for stage in task.stages if stage not in phase.train),
                weights=weights,
                still=frozenset(name for name, stage in owners.items() if stage not in phase.train),
                rates={stage: phase.rates[stage] for stage in task.stages if stage in phase.rates},
            )
        )
        first += phase.rounds or 0
    return Curriculum(tuple(stints))


def _weights(place: str, phase: Phase, stages: tuple[str, ...]) -> dict[str, float]:
    """The weight of every stage's loss in a phase."""
    for key, names in (("train", phase.train), ("weights", phase.weights), ("rates", phase.rates)):
        for name in names:
            if name not in stages:
                raise StudyError(f"{place}.{key}: {name!r} is no stage of the task; choose from {', '.join(stages)}")
    if still := sorted(phase.rates.keys() - set(phase.train)):
        raise StudyError(f"{place}.rates: {still[0]!r} does not learn in this phase; name it in `train`, or remove it")
    weights = {stage: phase.weights.get(stage, float(stage in phase.train)) for stage in stages}
    for number, stage in enumerate(stages):
        # Stages feed those behind them: an earlier one's loss knows nothing of a later one.
        if stage in phase.train and not any(weights[later] for later in stages[number:]):
            raise StudyError(
                f"{place}: the stage {stage!r} learns, and no loss that depends on it has a weight; give "
                f"{' or '.join(stages[number:])} one in `weights`, or leave it out of `train`"
            )
    return weights


def _owners(stages: tuple[str, ...], model: nn.Module) -> dict[str, str]:
    """The stage of every parameter and buffer; raises `StudyError` where it is not exactly one."""
    state = model.state_dict(keep_vars=True)
    owners: dict[str, str] = {}
    for stage in stages:
        if not any(name == stage for name, _ in model.named_modules()):
            raise StudyError(f"task.stages: the model has no part {stage!r}; name modules of the model")
    for name in state:
        own = [stage for stage in stages if name.startswith(f"{stage}.")]
        if len(own) != 1:
            how = "no stage" if not own else f"the stages {' and '.join(own)}"
            raise StudyError(f"task.stages: {name} of the model belongs to {how}; each must belong to exactly one")
        owners[name] = own[0]
    seen: dict[int, str] = {}
    for name, tensor in state.items():
        known = seen.setdefault(id(tensor), name)
        if owners[known] != owners[name]:
            raise StudyError(
                f"task.stages: {known} and {name} of the model are one tensor in two stages; give each stage its own"
            )
    return owners
