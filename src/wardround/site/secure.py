"""The site's side of the secure sum (`federation.secure` has the phases)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from pathlib import Path

from wardround.errors import JournalError, Rejected, WireError
from wardround.federation.exchange import DONE, EVALUATE, TRAIN, UPDATE
from wardround.federation.facts import ROSTER
from wardround.federation.secure import (
    ABORTED_NUMBERS,
    ADVERT,
    ADVERTISE,
    CONSENT,
    CONTEXT,
    DEAL,
    REVEAL,
    REVEALED,
    SHARE,
    SHARES,
    SIGN,
    context_of,
)
from wardround.protection.secure_site import SiteSession
from wardround.protection.secure_sum import (
    Announcement,
    Attempt,
    Deal,
    MaskStream,
    Quorum,
    Roll,
    Roster,
)
from wardround.site.alone import own_results
from wardround.site.history import MASKED, Joined, MaskedHistory
from wardround.site.protocol import SiteReply
from wardround.site.site import Site
from wardround.storage.journal import survivors_of
from wardround.wire.canonical import digest
from wardround.wire.message import Header, Message

log = logging.getLogger(__name__)
_ROSTER_KEYS = "roster/keys"


class SecureUpload:
    """A site whose updates leave masked, and in no other way.

    The keys of an attempt live in this object only: a site that was restarted cannot go on with the attempt and drops
    out of it. `history` is where the site records, over all studies, which sums it was part of; default: its store.
    """

    replies = frozenset({ADVERT, SHARES, CONSENT, REVEALED})
    kinds = frozenset({ROSTER, ADVERTISE, SHARE, TRAIN, EVALUATE, SIGN, REVEAL})

    def __init__(
        self,
        threshold: int,
        roster: Callable[[], Roster] | None = None,
        history: Path | None = None,
        members: Collection[str] = (),
        expected: str | None = None,
    ) -> None:
        self._threshold = threshold
        self._load_roster = roster
        self._members = frozenset(members)
        self._history_folder = history
        self._expected = expected
        self._roster: Roster | None = None
        self._session: SiteSession | None = None
        self._kind = ""

    def admit(self, request: Message, site: Site) -> None:
        """Whatever the site answers, it may answer again."""

    def answer(self, request: Message, site: Site) -> SiteReply:
        """Answer one phase."""
        header = request.header
        meta = {name: value for name, value in header.meta.items() if name not in (CONTEXT, ABORTED_NUMBERS)}
        match header.kind:
            case "roster":
                self._agree(request, site)
                return SiteReply(request.reply(DONE))
            case "sum/advertise":
                return self._advertise(request, site)
            case "sum/share":
                shares = self._attempt(header).share(Roll.from_json(meta))
                return SiteReply(request.reply(SHARES, meta=shares.to_json()))
            case "sum/sign":
                session, record = self._attempt(header), survivors_of(self._kind)
                announcement = Announcement.from_json(meta)

                def remember(value: str) -> str:
                    standing = site.store.write_once(record, header.round, value)
                    if standing == value:
                        # From here on the sum may be read, and that it was not is the coordinator's word alone.
                        self._history(site).join(self._joined(session.context, site, announcement.survivors))
                    return standing

                consent = session.sign(announcement, remember)
                about = {"kind": self._kind, "round": header.round, "attempt": header.attempt}
                site.minutes.note("signed", {**about, "list": digest(announcement.to_json())})
                return SiteReply(request.reply(CONSENT, meta=consent.to_json()))
            case "sum/reveal":
                reveal = self._attempt(header).reveal(Quorum.from_json(meta))
                return SiteReply(request.reply(REVEALED, meta=reveal.to_json()))
            case _:
                return self._upload(request, site)

    def _advertise(self, request: Message, site: Site) -> SiteReply:
        header, roster = request.header, self._pinned(site)
        told = {name: header.meta.get(name) for name in ("kind", "request", "model", "layout")}
        if not all(isinstance(value, str) for value in told.values()):
            raise WireError("a request to open a secure sum must say kind, request, model and layout")
        kind = str(told["kind"])
        if kind not in (TRAIN, EVALUATE):
            raise WireError("a secure sum is of updates or of validation sums")
        last = site.store.last_written(survivors_of(kind))
        if header.round < last:
            raise Rejected(
                f"site {site.name} has signed the survivor list of round {last} and is asked for round {header.round}: "
                "the coordinator was restored from an older copy, or is not the one it was. Restore its newest copy"
            )
        if header.round == last:
            raise Rejected(
                f"site {site.name} has signed the survivor list of round {last}; the round is over, and its sites must "
                "train anew under a new number"
            )
        context = Attempt(
            study=header.study,
            round=header.round,
            attempt=header.attempt,
            request=str(told["request"]),
            model=str(told["model"]),
            layout=str(told["layout"]),
            roster=roster.sha256,
            threshold=self._threshold,
        )
        if header.meta.get(CONTEXT) != context.sha256.hex():
            raise Rejected(
                f"site {site.name} and the coordinator do not agree on what the secure sum is about: another roster, "
                "threshold or version"
            )
        self._history(site).check(self._joined(context, site))
        if self._session is not None:
            self._session.abort()
        self._session, self._kind = SiteSession(site.name, site.store.enrol(), roster, context), kind
        return SiteReply(request.reply(ADVERT, meta=self._session.advertise().to_json()))

    def _upload(self, request: Message, site: Site) -> SiteReply:
        header = request.header
        if header.kind == EVALUATE and header.meta.get("layout") == site.rules.evaluation_layout.sha256:
            # A site's own results are a release of their own, which its egress policy decides on.
            return own_results(request, site)
        if DEAL not in header.meta:
            raise Rejected(f"site {site.name} sums securely (protection.secure); a clear update is not given")
        expected = site.rules.metrics_layout if header.kind == EVALUATE else site.rules.layout
        if header.meta.get("layout") != expected.sha256:
            raise Rejected(f"site {site.name} is asked for another layout than the study's for {header.kind!r}")
        session = self._attempt(header)
        try:
            if context_of(header, self._pinned(site), self._threshold) != session.context:
                raise Rejected(f"site {site.name} is asked for something else than was announced for this attempt")
            masks = session.mask(Deal.from_json(header.meta[DEAL]))
            memory, keep = None, frozenset[int]()
            if header.kind == EVALUATE:
                update, layout = site.measure(request)
            else:
                (update, memory, keep), layout = site.work(request), site.rules.layout
                site.aborted.answered(header.round, session.context.model)
            chunks = MaskStream(masks, layout.segments).masked(update)
            return SiteReply(site.reply_with(request, UPDATE, chunks, layout), memory, keep)
        except BaseException:
            # What was masked in part must never be masked again with the same keys.
            session.abort()
            raise

    def _attempt(self, header: Header) -> SiteSession:
        session = self._session
        if session is None or not _belongs(header, session.context):
            raise Rejected(
                f"site {header.site} holds no keys for this attempt: it was restarted, or the attempt is over; it "
                "drops out of it"
            )
        return session

    def _history(self, site: Site) -> MaskedHistory:
        return MaskedHistory((self._history_folder or site.store.root) / MASKED)

    def _joined(self, context: Attempt, site: Site, survivors: tuple[str, ...] = ()) -> Joined:
        roster = self._pinned(site).sites
        return Joined(
            start=context.model,
            site=site.name,
            roster=roster,
            survivors=tuple(sorted(survivors)),
            threshold=context.threshold,
            study=context.study,
            round=context.round,
        )

    def _agree(self, request: Message, site: Site) -> None:
        """Keep the roster that the coordinator names, once and for all; raises `Rejected` where it cannot be the arm's.

        It must name the arm's sites, and this one with its own key. That the other keys are those of the other sites is
        the coordinator's word, unless the sites compare them by another way.
        """
        if request.header.round:
            raise WireError("a roster belongs to no round")
        roster = Roster.from_json(request.header.meta.get("keys"))
        own = site.store.enrol().public
        if frozenset(roster.sites) != self._members or roster.keys.get(site.name) != own:
            raise Rejected(f"site {site.name} is shown a roster of other sites, or with another key in its place")
        self._check(roster, site)
        _hold_to(roster, site)
        site.store.set_fact(_ROSTER_KEYS, json.dumps(roster.to_json()))
        # What the hospitals can compare by another way.
        site.minutes.note("roster", {"roster": roster.sha256})

    def _check(self, roster: Roster, site: Site) -> None:
        """Raise `Rejected`, and write it down, for another roster than the one that the site's own file names."""
        if self._expected in (None, roster.sha256):
            return
        site.minutes.note("roster refused", {"roster": roster.sha256, "expected": self._expected})
        log.warning("site %s refuses a roster of sha256 %s: its sites file names another", site.name, roster.sha256)
        raise Rejected(
            f"site {site.name} sums only with the roster whose hash stands in its own sites file, and was shown "
            "another one: the log of the site names both hashes. Compare them with the other hospitals, by another way "
            "than this coordinator"
        )

    def _pinned(self, site: Site) -> Roster:
        if self._roster is None:
            if self._load_roster is not None:
                roster = self._load_roster()
            elif (keys := site.store.fact(_ROSTER_KEYS)) is not None:
                roster = Roster.from_json(json.loads(keys))
            else:
                raise JournalError(f"site {site.name} was asked for a secure sum before it was shown the roster")
            self._check(roster, site)
            _hold_to(roster, site)
            self._roster = roster
        return self._roster


def _hold_to(roster: Roster, site: Site) -> None:
    """Take a roster for good; raises `JournalError` where the site began with another one."""
    if site.store.write_once("roster", 0, roster.sha256) != roster.sha256:
        raise JournalError(
            f"the study's roster is not the one site {site.name} began with; restore it, or start a new run"
        )


def _belongs(header: Header, context: Attempt) -> bool:
    """Whether a request is of that attempt; the one for the update, which names no context, is compared as a whole."""
    about = header.meta.get(CONTEXT, context.sha256.hex())
    return (header.round, header.attempt, about) == (context.round, context.attempt, context.sha256.hex())
