"""Methods that keep a part of the model at the site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from wardround.errors import StudyError
from wardround.learning.methods.method import Array, Changes, LocalRound, Method, Writers, state_name
from wardround.learning.policy import Parameter, Policy, Role
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.study.methods import MethodSettings
from wardround.wire.tensors import Chosen, joined
from wardround.wire.update import Aggregate, Group

# The group in which private parts travel, and names in the coordinator's state; only with `unseen: mean`.
UNSEEN = "unseen"
START = "unseen_start"


@dataclass(frozen=True)
class Personal(Method):
    """The part of the model that `is_private` chooses stays at the site; the rest is averaged.

    A hospital that did not train has no such part. It gets the initial values (`unseen="initial"`), and then nothing
    of any site's private part leaves it. Or it gets the mean of the private parts (`unseen="mean"`), over the sites
    of the released round and with the method's weights: then each site adds theirs to the sum, every round, as how far
    they are from their initial values. The coordinator keeps that mean and does not send it back to the sites.
    """

    unseen: Literal["initial", "mean"] = "initial"
    #: Whether the mean is also of what no gradient reaches, such as running statistics.
    tells_buffers: ClassVar[bool] = True
    #: Prefixes of parameters that the method means nothing without, and what to set in the study for a model with them.
    parts: ClassVar[tuple[str, ...]] = ()
    remedy: ClassVar[str] = ""

    @property
    def discloses(self) -> str:
        """The mean private part, where unseen hospitals get it."""
        if self.unseen == "initial":
            return ""
        return (
            "its private part as well, in the same sum (`method.unseen: mean`): hospitals that did not train get "
            "the mean"
        )

    def is_private(self, parameter: Parameter) -> bool:
        """Whether a parameter or buffer stays at the site."""
        raise NotImplementedError

    def role(self, parameter: Parameter) -> Role:
        """Local for the private part."""
        return "local" if self.is_private(parameter) else super().role(parameter)

    def policy(self, parameters: tuple[Parameter, ...]) -> Policy:
        """Raises `StudyError` for a model without the parts: the method would silently be another one."""
        for part in self.parts:
            if not any(p.name.startswith(part) for p in parameters):
                raise StudyError(
                    f"{type(self).__name__} needs a model with a part `{part.rstrip('.')}`, and this model has none; "
                    f"set {self.remedy}"
                )
        return super().policy(parameters)

    def side_channel(self, private: tuple[Parameter, ...], ring_bits: int) -> tuple[Group, ...]:
        """The private part as a group of its own, where unseen hospitals get the mean; counters have none."""
        floats = [p for p in private if p.is_float and (p.trainable or self.tells_buffers)]
        told = tuple(p.info for p in floats) if self.unseen == "mean" else ()
        return (Group(UNSEEN, told, ring_bits),) if told else ()

    def initial(
        self, groups: tuple[Group, ...], values: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Before round 1 the mean private part is the initial one; only the coordinator holds it."""
        public, private = super().initial(tuple(g for g in groups if g.name != UNSEEN), values)
        for info in _told(groups):
            private[state_name(START, info)] = private[state_name(UNSEEN, info)] = values[info]
        return public, private

    def changes(self, local: LocalRound) -> Changes:
        """The changes of the shared part; and, declared, how far the private part is from its initial values."""
        changes = super().changes(local)
        if self.unseen == "mean":
            changes[UNSEEN] = {
                name: tensor.detach() - local.initial[name]
                for name, tensor in local.private.items()
                if tensor.is_floating_point() and (tensor.requires_grad or self.tells_buffers)
            }
        return changes

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """The shared part is averaged, unless a derived method has other ideas."""
        return local if self.moves_as(Personal) else UNKNOWN

    def apply_group(
        self,
        group: Group,
        public: Mapping[str, Array],
        private: Mapping[str, Array],
        aggregate: Aggregate,
        write: Writers,
    ) -> None:
        """The mean private part of this round's sites is their start plus their mean distance from it.

        Not the sum of every round's changes: sites that miss a round, and roundings, would add up to a drift.
        """
        if group.name != UNSEEN:
            super().apply_group(group, public, private, aggregate, write)
            return
        for info in group.tensors:
            start = private[state_name(START, info.name)]
            mean = aggregate.mean(UNSEEN, info.name) + start
            write.private(state_name(START, info.name), start)
            write.private(state_name(UNSEEN, info.name), mean.astype(start.dtype))

    def release_for(
        self, site: str | None, public: Mapping[str, Array], private: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """The shared part; for a hospital that did not train, with the mean private part where there is one."""
        released = super().release_for(site, public, private)
        if site is None:
            prefix = state_name(UNSEEN, "")
            mean = {n.removeprefix(prefix): (private, n) for n in private if n.startswith(prefix)}
            released = joined(released, Chosen(mean))
        return released


def _told(groups: tuple[Group, ...]) -> tuple[str, ...]:
    return tuple(info.name for group in groups if group.name == UNSEEN for info in group.tensors)


class PersonalSettings(MethodSettings):
    """A method that keeps a part of the model at the site."""

    late = True
    weights: Literal["samples", "equal", "validation"] = Field(
        "equal", description="`validation` is exp(-validation loss), clamped"
    )
    unseen: Literal["initial", "mean"] = Field(
        "initial",
        description="what a hospital that did not train gets for the private part: its initial values, or the mean of "
        "the sites' private parts. `mean` is a side channel: every round, each site's private part travels as well, "
        "as a further group of the sum; `protection.secure` hides it in the sum like the rest",
    )
