"""Passes: what a site's round is made of, one after another over the same module. Torch-free: methods name them.

A site has one module and, with some methods, two sets of values for it. *Received* are those that the coordinator
broadcast, beside what the policy keeps at the site: passes that are not `own` begin with them, and what these moved is
what the site sends. *Own* are those of the model that the site uses itself, of shared names too. They lie in its memory
under the prefix of all that stays there, are never sent, serve when the site validates and tests, and are released to
the site's own folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from wardround.errors import StudyError

if TYPE_CHECKING:
    from torch import Tensor

    from wardround.learning.policy import Policy

#: What learns in a pass: everything, what stays at the site, or what is shared.
Trains = Literal["all", "private", "shared"]
# Where a site with own values keeps what stays there of the received model: the plain prefix holds its own.
RECEIVED = "received/"


@dataclass(frozen=True)
class Pass:
    """One pass of a site's round.

    `own` ones begin with the site's own values, where it has none with the received ones, and leave them in its memory.
    Without `steps` it takes those of the study. With several `choices` it is taken once for each, from the same values,
    and the one stays whose loss on the site's validation patients is lowest; a site without any takes the middle one.
    """

    name: str = ""
    trains: Trains = "all"
    own: bool = False
    steps: int | None = None
    choices: tuple[float, ...] = ()

    def times(self) -> int:
        """How often it is taken, where there are validation patients to choose by."""
        return max(1, len(self.choices))

    def steps_of(self, steps: int) -> int:
        """Its steps, where the study's rounds have `steps`."""
        return steps if self.steps is None else self.steps

    def held(self, policy: Policy) -> tuple[str, ...]:
        """The names that stand still."""
        match self.trains:
            case "all":
                return ()
            case "private":
                return policy.names("shared")
            case "shared":
                return policy.names("local")

    def describe(self, steps: int | None) -> str:
        """What `check` prints of it; without `steps`, where a site's own number of examples says how many there are."""
        count = self.steps if steps is None else self.steps_of(steps)
        what = {"all": "the model", "private": "what stays at the site", "shared": "what is shared"}[self.trains]
        whose = "the site's own copy of the model, which is never sent" if self.own else what
        often = f", once for each of {', '.join(f'{c:g}' for c in self.choices)}" if len(self.choices) > 1 else ""
        return f"{'as many' if count is None else count} steps of {whose}{often}"


#: A round of most methods.
WHOLE_ROUND = (Pass(),)


def parted(passes: Sequence[Pass]) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """The passes whose moves are sent, and those of the site's own values.

    Raises `StudyError` for passes that nothing is sent of, that share a name, or of which an own one comes first.
    """
    sent = tuple(p for p in passes if not p.own)
    if not sent or tuple(passes[: len(sent)]) != sent:
        raise StudyError("the method's passes: first those that a site sends, at least one, then its own ones")
    if len({p.name for p in passes}) < len(passes):
        raise StudyError("the method's passes: two have the same name; give each its own")
    return sent, tuple(passes[len(sent) :])


def steps_in(passes: Sequence[Pass], steps: int) -> int:
    """How many steps a site takes in a round, where the study's rounds have `steps`."""
    return sum(p.times() * p.steps_of(steps) for p in passes)


@contextmanager
def held(state: Mapping[str, Tensor], names: Collection[str]) -> Iterator[None]:
    """Until the context is left, no gradient is made for what is named."""
    still = [state[name] for name in names if state[name].requires_grad]
    for tensor in still:
        tensor.requires_grad_(False)
    try:
        yield
    finally:
        for tensor in still:
            tensor.requires_grad_(True)
