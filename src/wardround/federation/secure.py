"""The secure sum between coordinator and site: glues the state machines of `protection` to exchange and protocol.

phase   request           reply
1       sum/advertise     sum/advert
2       sum/share         sum/shares
3       train, evaluate   update         (the masked one; this is the request that carries the global state)
4       sum/sign          sum/consent
5       sum/reveal        sum/revealed
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

from wardround.errors import NotEnoughSites, Rejected
from wardround.federation.exchange import (
    UPDATE,
    Call,
    Exchange,
    ExchangeFactory,
    RoundAborted,
    add_body,
)
from wardround.protection.gates import check_masked, check_reply
from wardround.protection.secure_coordinator import CoordinatorSession, Unrecoverable
from wardround.protection.secure_sum import (
    Advert,
    Announcement,
    Attempt,
    Consent,
    Deal,
    MaskStream,
    Reveal,
    Roster,
    Shares,
)
from wardround.storage.journal import Journal, survivors_of
from wardround.wire.canonical import digest
from wardround.wire.message import Header, Message
from wardround.wire.ring import ExactSum
from wardround.wire.update import Aggregate

log = logging.getLogger(__name__)

ADVERTISE, ADVERT = "sum/advertise", "sum/advert"
SHARE, SHARES = "sum/share", "sum/shares"
SIGN, CONSENT = "sum/sign", "sum/consent"
REVEAL, REVEALED = "sum/reveal", "sum/revealed"
# Where the third request carries what the secure sum adds to it.
DEAL = "deal"
# Every other request names the context of its attempt, and the numbers that aborted rounds used up.
CONTEXT, ABORTED_NUMBERS = "context", "aborted"


def secure_sum(roster: Roster, threshold: int, journal: Journal) -> ExchangeFactory:
    """What makes a coordinator sum securely."""
    return lambda call: SecureSum(call, roster, threshold, journal)


def context_of(header: Header, roster: Roster, threshold: int) -> Attempt:
    """What an attempt is about, from the request for an update: the same for all sites that are asked the same."""
    meta = {name: value for name, value in header.meta.items() if name != DEAL}
    return Attempt(
        study=header.study,
        round=header.round,
        attempt=header.attempt,
        request=digest({"kind": header.kind, "meta": meta, "tensors": [info.to_json() for info in header.tensors]}),
        model=header.body_sha256,
        layout=str(header.meta.get("layout")),
        roster=roster.sha256,
        threshold=threshold,
    )


class SecureSum(Exchange):
    """The coordinator's side of one attempt. Masked updates are added as they come and are never kept."""

    def __init__(self, call: Call, roster: Roster, threshold: int, journal: Journal) -> None:
        self._call = call
        self._roster = roster
        self._threshold = threshold
        self._journal = journal
        self._total = ExactSum(call.layout.segments)
        self._receipts: dict[str, str] = {}
        self._requests: dict[str, str] = {}
        self._answered: set[str] = set()
        self._standing: tuple[str, ...] = ()
        self._phase = 0

    def open(self) -> list[Message]:
        """Ask for keys, under an attempt number that was never used before; raises `Aborted` for a consumed round."""
        name, number = survivors_of(self._call.kind), self._call.round
        if number in self._journal.rounds_with(name):
            raise RoundAborted(
                f"round {number} is aborted: its survivor list was announced and the round was not finished"
            )
        standing = self._journal.standing(self._call.kind)
        if standing is not None:
            # From this model the sites consent to the sum that they consented to before, and to no other.
            self._standing = Announcement.from_json(standing).survivors
            self._call = replace(self._call, sites=tuple(s for s in self._call.sites if s in self._standing))
        self._call = replace(self._call, attempt=self._new_attempt())
        self.attempt = self._call.attempt
        context = context_of(self._call.message(self._call.sites[0]).header, self._roster, self._threshold)
        self._session = CoordinatorSession(self._roster, context)
        told = {
            "kind": self._call.kind,
            "request": context.request,
            "model": context.model,
            "layout": context.layout,
        }
        return self._ask(ADVERTISE, dict.fromkeys(self._call.sites, told))

    def accept(self, reply: Message) -> None:
        """Take one reply; raises `WireError` naming the site when it is refused."""
        site, meta = reply.header.site, reply.header.meta
        kind = (ADVERT, SHARES, UPDATE, CONSENT, REVEALED)[self._phase - 1]
        check_reply(reply, kind, self._requests)
        if site in self._answered:
            raise Rejected(f"site {site} answered twice; the second answer is refused")
        if kind != UPDATE and meta.get("site") != site:
            raise Rejected(f"site {site} speaks for another site")
        match kind:
            case "sum/advert":
                self._session.advert(Advert.from_json(meta))
            case "sum/shares":
                self._session.shares(Shares.from_json(meta))
            case "sum/consent":
                self._session.consent(Consent.from_json(meta))
            case "sum/revealed":
                self._session.reveal(Reveal.from_json(meta))
            case _:
                self._add(reply)
        self._answered.add(site)

    def close(self) -> list[Message]:
        """Go on to the next phase; raises `NotEnoughSites` before the survivor list is announced, `Aborted` after."""
        self._answered = set()
        if self._phase in (1, 2):
            # Before the others train for a sum that they would not consent to.
            self._check_standing(self.present)
        try:
            match self._phase:
                case 1:
                    roll = self._session.roll().to_json()
                    return self._ask(SHARE, dict.fromkeys(self._session.adverts, roll))
                case 2:
                    return self._ask_updates(self._session.deals())
                case 3:
                    return self._announce()
                case 4:
                    quorum = self._session.quorum().to_json()
                    return self._ask(REVEAL, dict.fromkeys(self._session.consents, quorum))
                case _:
                    self._unmask()
                    return []
        except Unrecoverable as error:
            raise RoundAborted(str(error)) from error

    @property
    def present(self) -> Set[str]:
        """Who may still be in the sum."""
        match self._phase:
            case 1:
                return self._session.adverts.keys()
            case 2:
                return self._session.dealt.keys()
            case _:
                return self._receipts.keys()

    @property
    def receipts(self) -> Mapping[str, str]:
        """Survivor -> hash of its masked update."""
        return self._receipts

    @property
    def notes(self) -> tuple[str, ...]:
        """That a round had to be of the same sites as the aborted one before it."""
        asked = f"only the sites of the aborted round before it were asked: {', '.join(self._standing)}"
        return (asked,) if self._standing else ()

    def aggregate(self) -> Aggregate:
        """The sum, unmasked."""
        return Aggregate(self._call.layout, self._total, self._call.scales)

    # ---------------------------------------------------------------------------------------------------------------

    def _new_attempt(self) -> int:
        """The first attempt of this round that nobody opened, on record before any site hears of it."""
        token, attempt = secrets.token_hex(16), 0
        while self._journal.decide(self._call.round, attempt, f"opened/{self._call.kind}", token) != token:
            attempt += 1
        return attempt

    def _ask(self, kind: str, metas: Mapping[str, Mapping[str, Any]]) -> list[Message]:
        self._phase += 1
        call, phase = self._call, self._phase
        # The context makes a request of one attempt differ from any other's: sites answer a known one from their store.
        about = {CONTEXT: self._session.context.sha256.hex()}
        about |= {name: value for name, value in call.meta.items() if name == ABORTED_NUMBERS}
        return self._sent(
            Message(Header(kind, call.study, site, call.round, call.attempt, phase, meta={**meta, **about}))
            for site, meta in metas.items()
        )

    def _ask_updates(self, deals: Mapping[str, Deal]) -> list[Message]:
        self._phase += 1
        messages = []
        for site, deal in deals.items():
            plain = self._call.message(site)
            meta = {**plain.header.meta, DEAL: deal.to_json()}
            messages.append(Message(replace(plain.header, phase=self._phase, meta=meta), plain.body))
        return self._sent(messages)

    def _sent(self, messages: Iterable[Message]) -> list[Message]:
        sent = list(messages)
        self._requests = {message.header.site: message.id for message in sent}
        return sent

    def _add(self, reply: Message) -> None:
        check_masked(self._call.layout, reply)
        self._session.uploaded(reply.header.site)
        add_body(self._total, reply.body)
        self._receipts[reply.header.site] = reply.header.body_sha256

    def _announce(self) -> list[Message]:
        announcement, call = self._session.announce(), self._call
        self._check_standing(set(announcement.survivors))
        value = announcement.to_json()
        # On record first: from here on the round ends with exactly this list, or not at all.
        if self._journal.decide(call.round, call.attempt, survivors_of(call.kind), value) != value:
            raise RoundAborted(f"round {call.round} is aborted: another survivor list is on record for this attempt")
        self._journal.record.note(
            "survivors", {"kind": call.kind, "round": call.round, "attempt": call.attempt, "list": digest(value)}
        )
        return self._ask(SIGN, dict.fromkeys(announcement.survivors, value))

    def _check_standing(self, present: Set[str]) -> None:
        """Raise `NotEnoughSites` where a site of the aborted round before this one is away."""
        away = sorted(set(self._standing) - present)
        if away:
            raise NotEnoughSites(
                f"round {self._call.round} begins where an aborted one did, whose sum was over "
                f"{', '.join(self._standing)}; without {', '.join(away)} the difference of the two would be what they "
                "sent. Bring them back and run again with --resume, or start a study with another seed"
            )

    def _unmask(self) -> None:
        MaskStream(self._session.unmask(), self._call.layout.segments).add_to(self._total)
        for lie in self._session.liars.values():
            log.warning("secure sum, round %d: %s; the round does without it", self._call.round, lie)
        count = self.aggregate().contributors
        if count != len(self._receipts):
            raise RoundAborted(
                f"round {self._call.round} is aborted: the unmasked sum counts {count} contributors where "
                f"{len(self._receipts)} sites are in it; a site masked with other keys than it advertised"
            )


# At a site ---------------------------------------------------------------------------------------------------------
