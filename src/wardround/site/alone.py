"""An arm that a site trains and tests by itself: under a secure sum, nothing of it may leave but the test result.

What one site trains from a start that it shares with others is its share of their masked sum. So a coordinator asks
for the work and hears that it is done. Inside, the site is its own coordinator: rounds, codec, validation, selection
and resume are those of every other arm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from wardround.errors import NotEnoughSites, Rejected, WireError
from wardround.federation.coordinator import Coordinator, Plan, Release
from wardround.federation.exchange import ALONE, DONE, ERROR, EVALUATE, RELEASE, TRAIN
from wardround.federation.measuring import OWN
from wardround.learning.methods.method import Method
from wardround.site.protocol import SiteReply
from wardround.site.site import Site
from wardround.storage.journal import Journal
from wardround.wire.message import Message

Array = npt.NDArray[Any]


class OnlyTests:
    """A site in an arm that it does not train in: it tests a model, and answers nothing else."""

    kinds = frozenset({TRAIN, EVALUATE, RELEASE})
    replies = frozenset[str]()

    def admit(self, request: Message, site: Site) -> None:
        """Refuse all but a test."""
        if request.header.kind != EVALUATE:
            raise Rejected(f"site {site.name} does not train in this arm: it only tests the model")

    def answer(self, request: Message, site: Site) -> SiteReply:
        """Sums over the site's own test patients, where its rules let them out."""
        return own_results(request, site)


def own_results(request: Message, site: Site) -> SiteReply:
    """What a site measures on its test patients; raises `Rejected` for anything that is meant to be pooled.

    Validation sums belong to a round: alone they would be what a masked sum hides.
    """
    meta = request.header.meta
    if meta.get("split") != "test" or meta.get("layout") != site.rules.evaluation_layout.sha256:
        raise Rejected(f"site {site.name} gives its own results on test patients, and no other sums of its own")
    return site.evaluate(request)


@dataclass(frozen=True)
class OwnArm:
    """What a site needs to train an arm by itself.

    `initial` makes the values before round 1, `save` writes the released model to `model`, in the site's own folder.
    """

    plan: Plan
    method: Method
    initial: Callable[[], tuple[Mapping[str, Array], Mapping[str, Array]]]
    save: Callable[[Release], object]
    model: Path


class TrainsAlone:
    """A site in an arm of its own: `alone` asks it to train up to a round, and the answer says no more than done.

    Any other way to an update, a validation or the model is refused, whoever asks.
    """

    kinds = frozenset({ALONE, TRAIN, EVALUATE, RELEASE})
    replies = frozenset[str]()

    def __init__(self, arm: OwnArm) -> None:
        self._arm = arm

    def admit(self, request: Message, site: Site) -> None:
        """Refuse all but the two requests of this arm.

        What the site said to itself lies in its store: a request from outside may be, byte for byte, one from within.
        """
        header = request.header
        match header.kind:
            case "alone":
                if header.meta or header.body_nbytes or header.round < 1:
                    raise WireError("a request to train alone names a round and nothing else")
            case "evaluate":
                if header.meta.get("evaluator") != OWN or header.body_nbytes:
                    raise Rejected(f"site {site.name} tests the model that it trained alone, and no other in this arm")
            case _:
                raise Rejected(
                    f"site {site.name} trains this arm inside (protection.secure): its update would be its share of "
                    "the masked sum"
                )

    def answer(self, request: Message, site: Site) -> SiteReply:
        """Train, or test what was trained."""
        if request.header.kind == ALONE:
            self._train(site, request.header.round)
            return SiteReply(request.reply(DONE))
        if not self._arm.model.exists():
            self._train(site, self._arm.plan.rounds, again=True)
        return own_results(request, site)

    def _train(self, site: Site, number: int, *, again: bool = False) -> None:
        """Train the rounds up to `number` that are not done; after the last one, write the released model.

        With `again` it must have been trained before.
        """
        arm, last = self._arm, number >= self._arm.plan.rounds
        with closing(Journal(site.store.root / "alone", arm.plan.identity)) as journal:
            if again and journal.latest() is None:
                raise Rejected(f"site {site.name} has not trained alone, so there is no model to test")
            coordinator = Coordinator(arm.plan, arm.method, _Within(site.inside()), journal)
            state = coordinator.start(arm.initial)
            if last or state.round < number:
                for report in coordinator.rounds(state):
                    if report.round == number and not last:
                        break
            if last:
                arm.save(coordinator.release())


@dataclass(frozen=True)
class _Within:
    """An engine that ends at the site it begins in."""

    site: Site

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """One reply for each message; raises `NotEnoughSites` where the site declines, as no other can take part."""
        for message in messages:
            reply = self.site.handle(message)
            if reply.header.kind == ERROR:
                raise NotEnoughSites(str(reply.header.meta.get("reason")))
            yield reply

    def close(self) -> None:
        """Nothing is open."""
