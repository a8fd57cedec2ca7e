"""Shared tensors that tell of data, and not of what was learned: a group of their own in the sum, and in the bill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from wardround.errors import StudyError
from wardround.learning.methods.method import BUFFERS, Array, Changes, LocalRound, Method, state_name
from wardround.learning.policy import Parameter
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.wire.tensors import Chosen, joined
from wardround.wire.update import Group

#: The group in which they travel: always in 32 bits, as they are sent once and no later round mends them.
APART = "apart"
_BITS = 32


@dataclass(frozen=True)
class Apart(Method):
    """Some buffers of the network, by their names, are averaged as all are and travel apart, as a side channel."""

    apart: ClassVar[tuple[str, ...]] = ()
    side_channels: ClassVar[frozenset[str]] = frozenset({APART})

    @property
    def tells(self) -> bool:
        """Whether the method is nothing without them."""
        return True

    def groups(self, shared: tuple[Parameter, ...], ring_bits: int) -> tuple[Group, ...]:
        """A group more, where the network has any of them.

        Raises `StudyError` where the study's own roles keep one from the sum.
        """
        own = tuple(p.info for p in shared if p.name in self.apart)
        if self.tells and len(own) < len(self.apart):
            lost = next(name for name in self.apart if name not in [info.name for info in own])
            raise StudyError(
                f"parts: {lost} is measured at the sites and shared, or the method is another one; let no pattern of "
                "parts.frozen or parts.local match it"
            )
        rest = tuple(p for p in shared if p.name not in self.apart)
        return (*super().groups(rest, ring_bits), *((Group(APART, own, _BITS),) if own else ()))

    def changes(self, local: LocalRound) -> Changes:
        """Theirs apart from other buffers'."""
        changes = super().changes(local)
        if own := {name: changes[BUFFERS].pop(name) for name in self.apart if name in changes[BUFFERS]}:
            changes[APART] = own
        return changes

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """What gradients reach is averaged, after steps that the optimiser bounds."""
        return local if self.moves_as(Apart) else UNKNOWN

    def release_for(
        self, site: str | None, public: Mapping[str, Array], private: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """The network with them."""
        places = {name: state_name(APART, name) for name in self.apart}
        own = Chosen({name: (public, place) for name, place in places.items() if place in public})
        return joined(super().release_for(site, public, private), own)
