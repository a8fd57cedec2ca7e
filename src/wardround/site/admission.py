"""Which requests a site answers at all: those of its study and arm, in the order of rounds, and none after the last."""

from __future__ import annotations

from dataclasses import dataclass

from wardround.errors import JournalError, Rejected, StudyError, WireError
from wardround.federation.exchange import TRAIN
from wardround.federation.logs import SiteLog
from wardround.site.aborted import AbortedRounds
from wardround.site.rules import Rules
from wardround.storage.store import SiteStore
from wardround.wire.message import Header, Message


@dataclass(frozen=True)
class Admission:
    """The door of one site in one arm."""

    name: str
    rules: Rules
    store: SiteStore
    aborted: AbortedRounds
    minutes: SiteLog

    def check(self, request: Message) -> None:
        """Raise for a request that the site answers in no way."""
        header = request.header
        if header.study != self.rules.identity:
            raise StudyError(f"site {self.name} was asked for another study than the one it agreed to")
        if header.site != self.name:
            raise WireError(f"a message for another site reached {self.name}")
        layout = header.meta.get("layout")
        if layout is not None and layout not in self.rules.layouts:
            raise Rejected(f"site {self.name} was asked for a layout that the study does not have")
        last = self.store.last_round
        if header.kind == TRAIN and header.round < last:
            raise JournalError(
                f"site {self.name} has gone on to round {last} and is asked for round {header.round}: the coordinator "
                "was restored from an older copy, or is not the one it was. Restore its newest copy"
            )
        if any(number < 1 for number in aborted_numbers(header)):
            raise WireError("a message names aborted rounds that no study has")
        if aborted_numbers(header) and not self.rules.masked:
            raise Rejected(
                f"a request to site {self.name} names aborted rounds, and an arm without a secure sum has none; a "
                "coordinator of this version sends no such request"
            )
        self._check_end(header)
        self.minutes.check(header, last)

    def _check_end(self, header: Header) -> None:
        """Refuse a round after the study's last, whatever is asked: a number too high would explain any move of the
        model, buy one more validation, or be the last that the site answers."""
        rules = self.rules
        if rules.rounds is None:
            return
        end = rules.rounds + (self.aborted.believed(header, aborted_numbers(header)) if rules.extends else 0)
        if header.round > end:
            raise Rejected(f"site {self.name} is asked for round {header.round}, and the study ends with round {end}")


def aborted_numbers(header: Header) -> frozenset[int]:
    """The numbers of aborted rounds, as the coordinator says."""
    return frozenset(int(number) for number in header.meta.get("aborted", ()))
