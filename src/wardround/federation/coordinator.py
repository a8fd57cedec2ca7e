"""The coordinator of one arm: opens rounds, adds what comes, commits. It knows no imaging and imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import count
from typing import Any

import numpy.typing as npt

from wardround.errors import NotEnoughSites
from wardround.federation.asking import IMPATIENT, Patience
from wardround.federation.commits import Answered, Commits, Plan, Release
from wardround.federation.exchange import (
    EVALUATE,
    TRAIN,
    Engine,
    ExchangeFactory,
    PlainSum,
    RoundAborted,
)
from wardround.federation.selection import candidates
from wardround.learning.methods.method import Method
from wardround.storage.journal import Journal, RoundReport, State

__all__ = ["MAX_ABORTED", "Coordinator", "Plan", "Release"]

Array = npt.NDArray[Any]

# Rounds in a row that may come to nothing before somebody has to look, without patience.
MAX_ABORTED = 3


class Coordinator:
    """Runs the rounds of one arm; what is committed in the journal is never done again."""

    def __init__(
        self,
        plan: Plan,
        method: Method,
        engine: Engine,
        journal: Journal,
        protocol: ExchangeFactory = PlainSum,
        patience: Patience = IMPATIENT,
    ) -> None:
        self._plan = plan
        self._patience = patience
        self._journal = journal
        self._protocol = protocol
        self._commits = Commits(plan, method, engine, journal, patience)
        self._call, self._log, self._asking = self._commits.call, self._commits.log, self._commits.asking

    def start(self, initial: Callable[[], tuple[Mapping[str, Array], Mapping[str, Array]]]) -> State:
        """The state to go on from: the last committed one, or the initial one, which `initial` makes."""
        return self._commits.start(initial)

    def rounds(self, state: State) -> Iterator[RoundReport]:
        """Run the rounds after `state`, yielding each committed report.

        The last report of all, with the number of the last round, carries its validation. A plan without rounds has
        none. Raises `NotEnoughSites` when fewer than `min_sites` answer and patience is at its end; what is committed
        stays, and the run can be resumed.
        """
        plan = self._plan
        if not plan.rounds:
            return
        # With privacy an aborted round is paid for: patience does not spend the budget on more of them.
        most = MAX_ABORTED + (self._patience.attempts if plan.extends else 0)
        reasons: list[str] = []
        # The number of an aborted round is used up: the study ends that many numbers later, or without it.
        while self._next_number(state) <= plan.rounds + (len(self._journal.aborted(TRAIN)) if plan.extends else 0):
            try:
                state, report = self._round(state)
            except RoundAborted as aborted:
                reasons.append(str(aborted))
                self._log.aborted(max(self._journal.aborted(TRAIN), default=state.round + 1), str(aborted))
                if len(reasons) == most:
                    raise NotEnoughSites(
                        f"{plan.arm}: {most} rounds in a row were aborted ({'; '.join(reasons[-MAX_ABORTED:])}). Mend "
                        "the cause and run again with --resume"
                    ) from aborted
                self._asking.pause()
                continue
            reasons.clear()
            yield report
        if not state.round:
            raise NotEnoughSites(
                f"{plan.arm}: all {plan.rounds} rounds were aborted, and protection.privacy leaves no budget for "
                "others. Mend the cause and start again in another folder"
            )
        if (last := validate_last(self._commits, state, self._protocol, self._journal.aborted(TRAIN))) is not None:
            yield last

    def release(self) -> Release:
        """The released round: the best by validation (`selection.best_round`), or the last; 0 where there is none."""
        return self._commits.release(self._journal.aborted(TRAIN))

    # ---------------------------------------------------------------------------------------------------------------

    def _round(self, state: State) -> tuple[State, RoundReport]:
        plan, commits, aborted = self._plan, self._commits, self._journal.aborted(TRAIN)
        number = self._next_number(state)
        began, self._asking.waited = time.perf_counter(), 0.0
        skipped = sorted(n for n in aborted if n > state.round)
        # What was known when the round was first asked for, so that a resumed run asks the very same.
        keep = sorted({*candidates(commits.scored(before=state.round)), state.round})
        # Two validations of one model by different sites would differ by what one of them measured.
        validate = commits.validates(state.round) and number == state.round + 1
        meta = {"keep": keep, "validate": validate, **self._log.anchor(), **_numbers(aborted)}
        exchange, missing, bill = self._asking.run(self._call(TRAIN, state, number, meta, commits.sent), self._protocol)
        again = self._asking.again
        aggregate = exchange.aggregate()
        if validate:
            bill += commits.validated(state, aggregate, exchange.receipts)[1]
        bill += self._asking.lost
        notes = (
            *(f"round {n} is aborted: not all of it came after its survivors were named" for n in skipped),
            *exchange.notes,
            *([f"too few sites answered at first: tried again {_times(again)}"] if again else ()),
        )
        restored = plan.codec.restore(number, plan.layout, aggregate)
        answered = Answered(exchange.receipts, missing, exchange.attempt, notes)
        following, report = commits.commit(state, number, aggregate, restored, answered, bill, began)
        commits.forget(number)
        return following, report

    def _next_number(self, state: State) -> int:
        """The number of the round that follows a state: the first that no aborted round has used up."""
        aborted = self._journal.aborted(TRAIN)
        return next(n for n in count(state.round + 1) if n not in aborted)


def validate_last(
    commits: Commits, state: State, protocol: ExchangeFactory = PlainSum, aborted: Collection[int] = ()
) -> RoundReport | None:
    """The report of the last round with its validation, for which all sites are asked; `None` where it has none."""
    plan = commits.plan
    if not plan.validate_every or not commits.missing_validation(state.round):
        return None
    asked = {"split": "validation", **_numbers(aborted)}
    evaluate = commits.call(EVALUATE, state, state.round, asked, plan.metrics_layout)
    try:
        exchange, _, bill = commits.asking.run(evaluate, protocol)
    except RoundAborted as failed:
        # It may not be repeated: the last round goes without its validation.
        commits.log.aborted(state.round, str(failed), EVALUATE)
        return None
    return commits.validated(state, exchange.aggregate(), exchange.receipts, bill)[0]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _numbers(aborted: Collection[int]) -> dict[str, Any]:
    """What a request says of the numbers that aborted rounds used up."""
    return {"aborted": sorted(aborted)} if aborted else {}
