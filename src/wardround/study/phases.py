"""Phases of a study: consecutive rounds in which some stages of a task learn and the others stand still."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from wardround.study.base import Config


class Phase(Config):
    """Consecutive rounds in which the named stages of the task learn ([stages](methods.md#stages-and-phases))."""

    rounds: int | None = Field(
        None, ge=1, description="how many; the last phase may leave it out and takes the rest of the rounds"
    )
    train: tuple[str, ...] = Field(min_length=1, description="the stages that learn; every other stage stands still")
    weights: dict[str, Annotated[float, Field(ge=0.0)]] = Field(
        {}, description="weights of the stages' losses; a stage that is not named here has 1 where it learns, else 0"
    )
    rates: dict[str, Annotated[float, Field(gt=0.0, le=1.0)]] = Field(
        {},
        description="shares of `local.lr` at which stages learn, 1 for those that are not named: 0.1 lets a network "
        "that is trained already follow slowly",
    )


def check_phases(phases: Sequence[Phase], rounds: int) -> None:
    """Raise `ValueError` where phases do not fill the rounds of a study, or a phase has nothing to lower."""
    for number, phase in enumerate(phases, start=1):
        where = f"phase {number} of {len(phases)}"
        if len(set(phase.train)) < len(phase.train):
            raise ValueError(f"{where} names a stage twice in `train`; name each once")
        if all(phase.weights.get(stage, 1.0) == 0.0 for stage in {*phase.train, *phase.weights}):
            raise ValueError(f"{where} gives every loss the weight 0; give one of them a positive weight")
        if phase.rounds is None and number < len(phases):
            raise ValueError(f"{where} has no `rounds`; only the last phase may leave them out")
    if not phases:
        return
    given = sum(phase.rounds or 0 for phase in phases)
    if phases[-1].rounds is None and given >= rounds:
        raise ValueError(
            f"the phases before the last take {given} rounds, and schedule.rounds is {rounds}, so none is left for the "
            "last; raise schedule.rounds, or lower the `rounds` of a phase"
        )
    if phases[-1].rounds is not None and given != rounds:
        raise ValueError(
            f"the phases take {given} rounds in all, and schedule.rounds is {rounds}; make the two equal, or leave out "
            "the `rounds` of the last phase"
        )
