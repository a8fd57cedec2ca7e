"""What coordinator and site write into their logs, and what of it they show each other."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from wardround.errors import JournalError, Rejected, StudyError, WardroundError, WireError, Withheld
from wardround.federation.exchange import ALONE, DONE, ERROR, TRAIN, UPDATE, Call, Exchange
from wardround.federation.facts import ROSTER
from wardround.storage.hash_log import Entry, HashLog, is_hash
from wardround.storage.journal import SIGNED_EVENTS, Journal
from wardround.wire.canonical import digest
from wardround.wire.message import Header, Message

# In an update: the head of the site's log after it noted the update.
HEAD = "log"
# In a request to train: the coordinator's head after its last commit, and the last head it saw of every site.
ANCHOR, HEADS = "anchor", "heads"
# The events after which coordinator and site sign their logs.
COMMITTED, VOID = SIGNED_EVENTS
SENT = "sent"


def shown(head: str, header: Header) -> str:
    """A head as an update shows it, with a check that binds it to its answer: no flipped bit makes other evidence."""
    return head + digest([head, header.site, header.reply_to])[:16]


def head_of(header: Header) -> str:
    """The head that an update shows; raises `Rejected` when it shows none."""
    said = str(header.meta.get(HEAD))
    head = said[:64]
    if not is_hash(head) or said != shown(head, header):
        raise Rejected("an update that does not show the head of its site's log, or not as it was sent")
    return head


class CoordinatorLog:
    """The coordinator's log of an arm."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._record = journal.record
        self._heads: dict[str, str] = {}
        self._aborted: set[tuple[str, int]] = set()

    def settle(self) -> None:
        """After a start: log and journal must tell the same rounds.

        A process that died between the journal's commit and the log's leaves the log one round behind, which is made
        up for. Raises `JournalError` for any other difference: one of them was restored from an older copy.
        """
        committed = self._record.last(COMMITTED)
        noted = 0 if committed is None else committed.round
        self._heads = {} if committed is None else dict(committed.payload["heads"])
        rounds = [report.round for report in self._journal.reports()]
        if noted > max(rounds, default=0):
            raise JournalError(
                f"the log of the coordinator knows round {noted} and its journal does not: the journal was restored "
                "from an older copy. Restore the newest one of both",
                detail=str(self._record.path),
            )
        behind = [number for number in rounds if number > noted]
        if len(behind) > 1:
            raise JournalError(
                f"the log of the coordinator ends at round {noted} and its journal at round {behind[-1]}: the log was "
                "shortened or restored from an older copy. Restore the newest one of both",
                detail=str(self._record.path),
            )
        after = -1 if committed is None else committed.seq
        for number in behind:
            for entry in self._record.entries():
                # An asynchronous round has updates that were asked for in earlier rounds.
                new = entry.seq > after and entry.round <= number
                if new and entry.event == "accepted" and entry.payload["kind"] == TRAIN:
                    self._heads[entry.payload["site"]] = entry.payload["head"]
            self.committed(number)
        if self._record.last(VOID) is not None:
            aborted = (entry.payload for entry in self._record.entries() if entry.event == VOID)
            self._aborted = {(payload.get("kind", TRAIN), payload["round"]) for payload in aborted}
        for number in sorted(self._journal.aborted(TRAIN)):
            self.aborted(number, f"the coordinator stopped after the survivors of round {number} were named")

    def anchor(self) -> dict[str, Any]:
        """What a request shows of all logs: a pure function of what is committed, so that it can be asked again."""
        committed: Entry | None = self._record.last(COMMITTED)
        if committed is None:
            return {}
        return {ANCHOR: committed.hash, HEADS: dict(committed.payload["heads"])}

    def opened(self, call: Call, exchange: Exchange) -> None:
        """An exchange begins."""
        self._record.note("opened", {"kind": call.kind, "round": call.round, "attempt": exchange.attempt})

    def check(self, reply: Message) -> None:
        """Refuse an update that does not show the end of its site's log; raises `Rejected`."""
        if reply.header.kind == UPDATE:
            head_of(reply.header)

    def accepted(self, call: Call, attempt: int, reply: Message) -> None:
        """An update is in the sum."""
        header = reply.header
        if header.kind != UPDATE:
            return
        head = self._heads[header.site] = head_of(header)
        about = {"kind": call.kind, "site": header.site, "round": call.round, "attempt": attempt}
        self._record.note("accepted", {**about, "body_sha256": header.body_sha256, "head": head})

    def refused(self, call: Call, attempt: int, reply: Message, reason: str) -> None:
        """An answer does not count: it was refused, or the site declined."""
        event = "declined" if reply.header.kind == ERROR else "refused"
        about = {"kind": call.kind, "site": reply.header.site, "round": call.round, "attempt": attempt}
        self._record.note(event, {**about, "reason": reason})

    def committed(self, number: int) -> None:
        """A round is in the journal."""
        payload = {
            "round": number,
            "state_sha256": self._journal.state(number).public_sha256,
            "receipts": digest(self._journal.receipts(number)),
            "heads": dict(sorted(self._heads.items())),
        }
        self._record.note(COMMITTED, payload, sync=True)

    def aborted(self, number: int, reason: str, kind: str = TRAIN) -> None:
        """A round came to nothing, or the validation that follows the last one; on record once."""
        if (kind, number) not in self._aborted:
            about = {} if kind == TRAIN else {"kind": kind}
            self._record.note(VOID, {**about, "round": number, "reason": reason}, sync=True)
            self._aborted.add((kind, number))

    def released(self, number: int, state_sha256: str) -> None:
        """A round's model is the one that is released."""
        self._record.note("released", {"round": number, "state_sha256": state_sha256}, sync=True)


class SiteLog:
    """The log of a site in an arm."""

    def __init__(self, site: str, record: HashLog) -> None:
        self._site = site
        self.record = record

    def check(self, header: Header, last: int) -> None:
        """Note what a request shows of the other logs; raises `JournalError` when this site's own is older than that.

        `last` is the last round that the site's store holds an answer of.
        """
        meta = header.meta
        if ANCHOR not in meta:
            return
        heads = meta.get(HEADS)
        if not is_hash(meta[ANCHOR]) or not isinstance(heads, dict) or not all(map(is_hash, heads.values())):
            raise WireError("a request shows heads of logs that are none")
        own = heads.get(self._site)
        if own is not None:
            number = self.record.round_of(own)
            if number is None or number > last:
                raise JournalError(
                    f"the store of site {self._site} is older than what the coordinator has seen of it: it was "
                    "restored from an older copy. Restore the newest one"
                )
        self.record.note("anchored", {"round": header.round, "anchor": meta[ANCHOR], "heads": digest(heads)})

    def heard(self, header: Header) -> int | None:
        """The last round of which the coordinator says that this site's update is in the sum; 0 for none so far.

        `None` where a request says nothing of it. A later update came too late, or was lost.
        """
        if ANCHOR not in header.meta:
            return None
        own = header.meta[HEADS].get(self._site)
        return 0 if own is None else self.record.round_of(own)

    def sent(self, request: Message, reply: Message, *, sync: bool = True) -> Message:
        """Note an answer before it leaves; an update shows the log's head from then on.

        Without `sync`, the caller keeps the log's `tail` with the answer, as durably.
        """
        header = reply.header
        if header.kind == UPDATE:
            about = {**_about(header), "kind": request.header.kind}
            payload = {**about, "request": request.id, "body_sha256": header.body_sha256}
            head = self.record.note(SENT, payload, sync=sync)
            return Message(replace(header, meta={**header.meta, HEAD: shown(head, header)}), reply.body)
        if header.kind == DONE:
            event = request.header.kind if request.header.kind in (ALONE, ROSTER) else "released"
            self.record.note(event, {"round": header.round}, sync=True)
        return reply

    def declined(self, request: Message, error: Exception, reason: str) -> None:
        """Note that a request got no answer, and why; a full disk must not hide the reason."""
        event = "blocked" if isinstance(error, Withheld) else "failed"
        if isinstance(error, WireError | JournalError | StudyError):
            event = "security"
        with suppress(WardroundError):
            self.record.note(event, {**_about(request.header), "reason": reason}, sync=True)

    def note(self, event: str, payload: Mapping[str, Any]) -> None:
        """Note something else, durably."""
        self.record.note(event, payload, sync=True)


def _about(header: Header) -> dict[str, Any]:
    # A kind that nothing knows may be long.
    return {"kind": header.kind[:40], "site": header.site, "round": header.round, "attempt": header.attempt}
