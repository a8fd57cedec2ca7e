"""`schedule.asynchronous`: rounds that do not wait for a slow site, and what a study may not combine with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from wardround.study.base import Config
from wardround.wire.staleness import multiplier

if TYPE_CHECKING:
    from wardround.study.schema import Study


class Asynchronous(Config):
    """A round is committed as soon as `buffer` updates are in; a late one enters a later round, by its age.

    An update whose state is t rounds older than the newest counts (1 + t)^-exponent of a fresh one, in steps of 2^-16.
    """

    buffer: int = Field(
        ge=1,
        description="updates with which a round is committed: `schedule.min_sites` or more, and no more than sites "
        "train",
    )
    exponent: float = Field(0.5, ge=0.0, description="how fast an update loses weight with its age; 0: not at all")
    max_staleness: int = Field(
        10,
        ge=0,
        le=1000,
        description="an update whose state is older by more rounds than this is left out, and its site asked anew. A "
        "site believes in as many rounds without it when it looks at the model that it gets",
    )

    @model_validator(mode="after")
    def _weighs_all(self) -> Asynchronous:
        if not multiplier(self.max_staleness, self.exponent):
            raise ValueError(
                f"`exponent`: an update {self.max_staleness} rounds old would count less than 2^-17 of a fresh one, "
                "and so nothing; lower `exponent` or `max_staleness`"
            )
        return self


def check_asynchronous(study: Study) -> None:
    """Refuse, by `ValueError`, what needs all updates of a round to be of that round."""
    rules, protection, schedule = study.schedule.asynchronous, study.protection, study.schedule
    if rules is None:
        return
    if not study.trains:
        raise ValueError("schedule.asynchronous: with schedule.rounds 0 nothing is trained; leave it out")
    if protection.secure:
        raise ValueError(
            "schedule.asynchronous cannot be combined with protection.secure: masks cancel in the sum of the sites "
            "that were asked for one round together, and here a round has updates of several; leave one of them out"
        )
    if protection.robust is not None:
        raise ValueError(
            "schedule.asynchronous cannot be combined with protection.robust: it compares the updates of one round, "
            "and late ones differ from the others by their age; leave one of them out"
        )
    if schedule.phases:
        raise ValueError(
            "schedule.asynchronous cannot be combined with schedule.phases: a late update of the phase before would "
            "enter a round of the next; leave one of them out"
        )
    if study.evaluating_sites:
        raise ValueError(
            f"sites.{study.evaluating_sites[0]}.role: `evaluate` cannot be combined with schedule.asynchronous, whose "
            "rounds wait for no site that validates; set it to `unseen` or `train`"
        )
    if not study.method.closed and not study.method.late:
        raise ValueError(
            f"method.kind={study.method.kind} cannot be combined with schedule.asynchronous: what it does with a "
            "round's updates holds only where all trained from that round's state; choose "
            f"{', '.join(late_methods())}, or leave schedule.asynchronous out"
        )
    training = len(study.training_sites)
    if not schedule.min_sites <= rules.buffer <= training:
        raise ValueError(
            f"schedule.asynchronous.buffer={rules.buffer}: {training} sites train and schedule.min_sites is "
            f"{schedule.min_sites}; set it to {schedule.min_sites} to {training}"
        )


def late_methods() -> list[str]:
    """The methods of this version that asynchronous rounds allow."""
    from wardround.study.methods import MethodSettings
    from wardround.study.registry import builtins

    found = (settings for settings in builtins("method") if issubclass(settings, MethodSettings) and settings.late)
    return sorted(kind for settings in found for kind in settings.kinds())
