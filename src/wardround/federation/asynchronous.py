"""Rounds that do not wait for a slow site (after FedBuff, Nguyen et al., AISTATS 2022; `wire.staleness`).

A round is committed as soon as `buffer` updates are in. A site that is not among them goes on, and its update enters a
later round with the weight of its age. Request n asks to train from the state after round n - 1, so n is the base round
of the update that comes back, and what a site does is what it does in synchronous rounds of those numbers.

What decides the result is journalled: which updates, (site, base round), a round is made of. They are noted as they
come, and a coordinator that was killed begins with those that it had: their sites answer the same request from their
stores. A site is asked again only once the round that its update is in is committed, for a site that has gone on
answers no earlier request. In a round there is therefore one update of a site, and within it the order of arrival
changes no bit.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.errors import WireError
from wardround.federation.asking import IMPATIENT, LONGEST_REASON, Patience
from wardround.federation.commits import Answered, Commits, Plan, Release
from wardround.federation.coordinator import Coordinator, validate_last
from wardround.federation.exchange import ERROR, TRAIN, Call, Engine, ExchangeFactory, PlainSum
from wardround.federation.flight import Flight
from wardround.federation.metering import Meter, Metered
from wardround.federation.selection import candidates
from wardround.learning.methods.method import Method
from wardround.plan.sums import MergedSums, Sums, merged
from wardround.storage.journal import Journal, RoundReport, State
from wardround.wire.bill import NO_BILL
from wardround.wire.message import Message
from wardround.wire.staleness import Part, Staleness, mixed

Array = npt.NDArray[Any]
log = logging.getLogger(__name__)
# Facts of the journal: what is under way, and the validation sums that came with a round's updates.
_UNDER_WAY, _SUMS = "asynchronous", "asynchronous/validation"
# The decision of what the requests of a round say.
_ASKED = "asked"


@dataclass
class _Buffer:
    """The round that is not committed yet: its updates, by base round, and what came of the sites' requests.

    `asked` has the sites that are at work with the number of the request, `came` those whose updates are in.
    """

    number: int
    asked: dict[str, int] = field(default_factory=dict)
    came: dict[str, int] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    sums: dict[int, PlainSum] = field(default_factory=dict)

    def ages(self) -> dict[str, int]:
        """By site whose update is in, how many rounds its state is older than the newest."""
        return {site: self.number - base for site, base in sorted(self.came.items())}


class AsynchronousCoordinator:
    """Runs the rounds of one arm as updates come; what is committed in the journal is never done again."""

    def __init__(
        self, plan: Plan, method: Method, engine: Engine, journal: Journal, patience: Patience = IMPATIENT
    ) -> None:
        assert plan.staleness is not None
        self._plan = plan
        self._journal = journal
        self._patience = patience
        self._commits = Commits(plan, method, engine, journal, patience)
        self._staleness: Staleness = plan.staleness
        self._metered = Metered(engine, {}, Meter(plan.kinds, self._commits.sent, plan.codec.form))
        self._flight = Flight(self._metered)
        self._calls: dict[int, Call] = {}
        # Replies that came before those that a killed coordinator had: these go first.
        self._later: deque[Message] = deque()
        self._first: set[str] = set()

    def start(self, initial: Callable[[], tuple[Mapping[str, Array], Mapping[str, Array]]]) -> State:
        """The state to go on from: the last committed one, or the initial one, which `initial` makes."""
        return self._commits.start(initial)

    def rounds(self, state: State) -> Iterator[RoundReport]:
        """Run the rounds after `state`, yielding each committed report.

        The last report of all, with the number of the last round, carries its validation. Sites that are at work when
        the last round is committed are waited for, and what they send is not used. Raises `NotEnoughSites` as
        `Coordinator.rounds` does.
        """
        if not self._plan.rounds:
            return
        self._revalidate(state.round)
        buffer = self._resumed(state.round + 1)
        while state.round < self._plan.rounds:
            state, report = self._round(state, buffer)
            yield report
            buffer = self._following(buffer)
        self._drain(buffer)
        if (last := validate_last(self._commits, state)) is not None:
            yield last

    def release(self) -> Release:
        """The released round: the best by validation (`selection.best_round`), or the last; 0 where there is none."""
        return self._commits.release(frozenset())

    # A round ---------------------------------------------------------------------------------------------------------

    def _round(self, state: State, buffer: _Buffer) -> tuple[State, RoundReport]:
        plan, commits, number = self._plan, self._commits, buffer.number
        began, commits.asking.waited = time.perf_counter(), 0.0
        idle = [site for site in plan.sites if site not in buffer.asked and site not in buffer.came]
        self._ask(buffer, dict.fromkeys(idle, number))
        again = self._fill(buffer)
        # Of some all updates were refused.
        bases = sorted(base for base, each in buffer.sums.items() if each.receipts)
        sums = {base: buffer.sums[base].aggregate() for base in bases}
        weights = {base: self._staleness.multiplier(number - base) for base in bases}
        aggregate = mixed(commits.sent, [Part(weights[base], sums[base]) for base in bases], state.scales)
        # Of each base round by itself: a codec's randomness is that of the round that was asked for.
        parts = [Part(weights[base], plan.codec.restore(base, plan.layout, sums[base])) for base in bases]
        restored = mixed(plan.layout, parts, state.scales)
        receipts = {site: sha for each in buffer.sums.values() for site, sha in each.receipts.items()}
        notes = (f"too few sites answered at first: tried again {'once' if again == 1 else f'{again} times'}",)
        answered = Answered(
            receipts,
            dict(buffer.missing),
            notes=notes if again else (),
            staleness=buffer.ages(),
            at_work=dict(sorted(buffer.asked.items())),
        )
        self._note_sums(buffer, sums)
        bill = self._metered.settle()
        following, report = commits.commit(state, number, aggregate, restored, answered, bill, began)
        self._revalidate(number)
        # Requests that are with sites are read from their state's file, and later ones may ask for the same base.
        used = {base - 1 for base in buffer.asked.values()} | set(range(max(0, self._settled(number)), number))
        commits.forget(number, used, self._settled(number))
        return following, report

    def _fill(self, buffer: _Buffer) -> int:
        """Take replies until the round has its updates; how often too few sites answered and were asked again.

        Raises `NotEnoughSites` where no site is at work any more, fewer than `min_sites` answered and patience is at
        its end.
        """
        plan, again = self._plan, 0
        while True:
            if len(buffer.came) >= min(self._staleness.buffer, len(plan.sites)):
                return again
            if buffer.asked:
                self._take(buffer, self._next(buffer))
            elif len(buffer.came) >= plan.min_sites:
                return again
            else:
                few = self._commits.asking.few(len(buffer.came), buffer.missing)
                if again == self._patience.attempts:
                    raise few
                again += 1
                log.warning("%s. Tried again, %d of %d times", few, again, self._patience.attempts)
                self._commits.asking.pause()
                self._ask(buffer, {site: buffer.number for site in plan.sites if site not in buffer.came})

    def _take(self, buffer: _Buffer, reply: Message) -> None:
        """Put an update into the round, or note why it is not in it."""
        site, commits = reply.header.site, self._commits
        base = buffer.asked.pop(site, buffer.number)
        call, age = self._call(base), buffer.number - base
        if reply.header.kind == ERROR:
            reason = str(reply.header.meta.get("reason", "no reason given"))[:LONGEST_REASON]
        elif age > self._staleness.most:
            reason = (
                f"its update was {age} rounds old, more than schedule.asynchronous.max_staleness "
                f"({self._staleness.most}): it was left out, and the site asked anew"
            )
        else:
            try:
                commits.log.check(reply)
                self._sum(buffer, base).accept(reply)
            except WireError as error:
                reason = str(error)
            else:
                buffer.came[site] = base
                buffer.missing.pop(site, None)
                commits.log.accepted(call, 0, reply)
                self._note(buffer)
                return
        buffer.missing[site] = reason
        commits.log.refused(call, 0, reply, reason)
        if age > 0:
            # Of the newest state it was not asked yet; one that declined that waits for the next.
            self._ask(buffer, {site: buffer.number})
        else:
            self._note(buffer)

    def _sum(self, buffer: _Buffer, base: int) -> PlainSum:
        """The exact sum of a base round's updates."""
        if base not in buffer.sums:
            buffer.sums[base] = PlainSum(self._call(base))
            buffer.sums[base].open()
        return buffer.sums[base]

    def _next(self, buffer: _Buffer) -> Message:
        """The next reply; first those that are known to have come before the coordinator was killed."""
        if not self._first and self._later:
            return self._later.popleft()
        while True:
            began = time.perf_counter()
            reply = self._flight.next()
            self._commits.asking.waited += time.perf_counter() - began
            if not self._first or reply.header.site in self._first:
                self._first.discard(reply.header.site)
                return reply
            self._later.append(reply)

    # What sites are asked --------------------------------------------------------------------------------------------

    def _ask(self, buffer: _Buffer, bases: Mapping[str, int]) -> None:
        """Ask sites to train, each from the state before its base round; it is noted before it is sent."""
        buffer.asked |= bases
        self._note(buffer)
        self._send(bases)

    def _send(self, bases: Mapping[str, int]) -> None:
        self._flight.send([self._call(base).message(site) for site, base in bases.items()])

    def _call(self, base: int) -> Call:
        """The requests of a base round: decided when the first is made, so that later ones ask the very same."""
        if base not in self._calls:
            commits, before = self._commits, base - 1
            state = self._journal.state(before)
            # A validation may still come to any state that is not settled.
            open_states = range(max(0, self._settled(before)), before + 1)
            keep = sorted({*candidates(commits.scored(before=self._settled(before))), *open_states})
            meta = {"keep": keep, "validate": commits.validates(before), **commits.log.anchor()}
            meta = self._journal.decide(base, 0, _ASKED, meta)
            # Sent whole: what a site lacks would be sent once the slowest of those asked with it has answered.
            call = replace(commits.call(TRAIN, state, base, meta, commits.sent), absent=())
            commits.log.opened(call, PlainSum(call))
            self._calls[base] = call
        return self._calls[base]

    def _drain(self, buffer: _Buffer) -> None:
        """Wait for sites that are at work: they are asked for other things from now on, and do one at a time."""
        while buffer.asked:
            reply = self._later.popleft() if self._later else self._flight.next()
            base = buffer.asked.pop(reply.header.site, None)
            if base is not None:
                self._commits.log.refused(self._call(base), 0, reply, "it came after the last round")
        self._note(buffer)
        self._commits.add_to_bill(buffer.number - 1, self._metered.settle())

    # What is noted, and a coordinator that was started again ----------------------------------------------------------

    def _note(self, buffer: _Buffer) -> None:
        """Keep which sites are at work on what, and whose updates came, through the death of the process."""
        value = {"round": buffer.number, "asked": buffer.asked, "came": buffer.came}
        self._journal.set_fact(_UNDER_WAY, json.dumps(value))

    def _following(self, buffer: _Buffer) -> _Buffer:
        """The round after one that was committed."""
        for base in [base for base in self._calls if base not in buffer.asked.values()]:
            del self._calls[base]
        return _Buffer(buffer.number + 1, dict(buffer.asked))

    def _resumed(self, number: int) -> _Buffer:
        """The round that was under way when the coordinator ended, its requests asked again; else an empty one."""
        fact = self._journal.fact(_UNDER_WAY)
        value: dict[str, Any] = {"round": 0, "asked": {}, "came": {}} if fact is None else json.loads(fact)
        # Between a round's commit and the next note its updates are still noted as what came.
        asked, came = value["asked"], value["came"] if value["round"] == number else {}
        known: dict[str, int] = {site: base for site, base in asked.items() if site in self._plan.sites}
        came = {site: base for site, base in came.items() if site in self._plan.sites}
        # Those that had come go first, into the sum and on the line.
        self._first = set(came)
        buffer = _Buffer(number, came | known)
        if number > self._plan.rounds:
            buffer.asked.clear()
        self._send(buffer.asked)
        return buffer

    # Validation ------------------------------------------------------------------------------------------------------

    def _settled(self, number: int) -> int:
        """Once round `number` is committed, states of rounds before this one are validated by no further site."""
        return number - self._staleness.most

    def _note_sums(self, buffer: _Buffer, sums: Mapping[int, Sums]) -> None:
        """Keep the validation sums of a round's updates by base round: those of later rounds are added to them."""
        names = [metric.name for metric in self._plan.metrics_layout.metrics]
        said = {
            str(base): {
                "sites": sorted(buffer.sums[base].receipts),
                "sums": {name: np.asarray(sums[base].metrics[name]).tolist() for name in names},
            }
            for base in sums
            if self._commits.validates(base - 1)
        }
        # No update of this round, or of a later one, goes further back.
        open_rounds = {n: one for n, one in self._sums().items() if self._settled(buffer.number) <= int(n)}
        self._journal.set_fact(_SUMS, json.dumps({**open_rounds, str(buffer.number): said}))

    def _sums(self) -> dict[str, dict[str, Any]]:
        """By round and by base round, both as text: the sites of its updates and their validation sums."""
        fact = self._journal.fact(_SUMS)
        found: dict[str, dict[str, Any]] = {} if fact is None else json.loads(fact)
        return found

    def _revalidate(self, number: int) -> None:
        """Write the validations that the updates of round `number` add to: of each state by all that trained from it.

        It is done once the round is committed, and again by a coordinator that was killed in between.
        """
        found = self._sums()
        for base in found.get(str(number), {}):
            said = [found[n][base] for n in sorted(found, key=int) if int(n) <= number and base in found[n]]
            parts = [MergedSums({name: np.array(values) for name, values in one["sums"].items()}) for one in said]
            sums = parts[0] if len(parts) == 1 else merged(self._plan.metrics, parts)
            sites = {site for one in said for site in one["sites"]}
            self._commits.amend(int(base) - 1, sums, sites, {}, NO_BILL)


def coordinator_of(
    plan: Plan,
    method: Method,
    engine: Engine,
    journal: Journal,
    protocol: ExchangeFactory = PlainSum,
    patience: Patience = IMPATIENT,
) -> Coordinator | AsynchronousCoordinator:
    """The coordinator of an arm, whose rounds wait for all sites or do not."""
    if plan.staleness is None:
        return Coordinator(plan, method, engine, journal, protocol, patience)
    return AsynchronousCoordinator(plan, method, engine, journal, patience)
