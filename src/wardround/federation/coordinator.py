"""The coordinator of one arm: opens rounds, adds what comes, commits. It knows no imaging and imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy.typing as npt

from wardround.errors import JournalError, NotEnoughSites
from wardround.federation.asking import IMPATIENT, Asking, Patience
from wardround.federation.exchange import (
    EVALUATE,
    TRAIN,
    Call,
    Engine,
    ExchangeFactory,
    PlainSum,
    RoundAborted,
)
from wardround.federation.logs import CoordinatorLog
from wardround.federation.parts import Lasting
from wardround.federation.phases import held, holding, next_scales
from wardround.federation.selection import Scored, best_round, candidates
from wardround.federation.validation import as_unseen, served_body, went_without
from wardround.learning.methods.method import MODEL, Method, Writers
from wardround.plan.sums import LOSS, SECONDS, Sums, merged, validation_values
from wardround.protection.compression import PLAIN, Codec
from wardround.storage.journal import Journal, RoundReport, State
from wardround.tasks.stages import WHOLE, Curriculum
from wardround.tasks.task import MetricSpec
from wardround.wire.bill import NO_BILL, PLAIN_KINDS, Bill, Kinds
from wardround.wire.message import FileBody
from wardround.wire.scales import SATURATED, ScaleRules, cut_off
from wardround.wire.tensors import TensorFile, TensorWriter
from wardround.wire.update import Aggregate, Layout

Array = npt.NDArray[Any]

# Rounds in a row that may come to nothing before somebody has to look, without patience.
MAX_ABORTED = 3


@dataclass(frozen=True)
class Plan:
    """What a coordinator must know of a study and an arm; `layout` is the method's, before `codec`.

    `sites` train; `evaluators` do not, and validate the same rounds.
    """

    arm: str
    identity: str
    sites: tuple[str, ...]
    rounds: int
    min_sites: int
    layout: Layout
    metrics_layout: Layout
    initial_scale: float
    codec: Codec = PLAIN
    selection: str | None = None
    larger_is_better: bool = True
    metrics: tuple[MetricSpec, ...] = ()
    validate_every: int = 1
    release: str = "best"
    keep: int = 2
    #: Whether aborted rounds, which only a secure sum has, come on top of `rounds`. With privacy they are paid for, and
    #: the budget is for `rounds`.
    extends: bool = False
    #: The state before round 1, by group and tensor: it says where scales start.
    initial: Mapping[str, Array] = field(default_factory=dict)
    #: Which tensors stand still in which round, and the first round that a validation may select.
    curriculum: Curriculum = WHOLE
    evaluators: tuple[str, ...] = ()
    #: What the bill calls the tensors of messages.
    kinds: Kinds = PLAIN_KINDS


@dataclass(frozen=True)
class Release:
    """The round that an arm releases, its global state, and the numbers that aborted rounds used up."""

    number: int
    state: State
    aborted: frozenset[int] = frozenset()


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
        self._method = method
        self._journal = journal
        self._protocol = protocol
        self._log = CoordinatorLog(journal)
        self._asking = Asking(plan, engine, self._log, patience)
        self._lasting = Lasting(method, plan.layout, plan.curriculum)
        self._sent = plan.codec.sent(plan.layout)
        self._scales = ScaleRules(self._sent, plan.initial_scale, plan.initial, frozenset({MODEL}))

    def start(self, initial: Callable[[], tuple[Mapping[str, Array], Mapping[str, Array]]]) -> State:
        """The state to go on from: the last committed one, or the initial one, which `initial` makes."""
        state = self._journal.latest()
        if state is None:
            public, private = initial()

            def copy(write: Writers) -> None:
                for name, tensor in public.items():
                    write.public(name, tensor)
                for name, tensor in private.items():
                    write.private(name, tensor)

            state = self._write(0, self._scales.start, copy)
            self._journal.commit(state, None, {})
        else:
            self._journal.check(state)
        self._log.settle()
        return state

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
        if plan.validate_every and self._missing_validation(state.round):
            asked = {"split": "validation", **_numbers(self._journal.aborted(TRAIN))}
            evaluate = self._call(EVALUATE, state, state.round, asked, plan.metrics_layout)
            try:
                exchange, _, bill = self._asking.run(evaluate, self._protocol)
            except RoundAborted as aborted:
                # It may not be repeated: the last round goes without its validation.
                self._log.aborted(state.round, str(aborted), EVALUATE)
                return
            yield self._validated(state, exchange.aggregate(), exchange.receipts, bill)[0]

    def release(self) -> Release:
        """The released round: the best by validation (`selection.best_round`), or the last; 0 where there is none."""
        number = best_round(self._scored()) if self._plan.release == "best" else None
        state = self._journal.latest() if number is None else self._journal.state(number)
        if state is None:
            raise JournalError(f"{self._plan.arm}: there is no round to release")
        released = Release(state.round, state, self._journal.aborted(TRAIN))
        self._journal.check(released.state)
        self._log.released(released.number, released.state.public_sha256)
        return released

    # ---------------------------------------------------------------------------------------------------------------

    def _call(self, kind: str, state: State, number: int, meta: Mapping[str, Any], layout: Layout) -> Call:
        return Call(
            kind=kind,
            study=self._plan.identity,
            round=number,
            sites=self._plan.sites,
            layout=layout,
            scales=state.scales if layout.groups else {},
            meta=meta,
            tensors=state.public.table,
            body=FileBody(state.public.path, state.public.nbytes),
            body_sha256=state.public_sha256,
            form=self._plan.codec.form,
            absent=self._lasting.absent(state),
        )

    def _round(self, state: State) -> tuple[State, RoundReport]:
        plan, aborted = self._plan, self._journal.aborted(TRAIN)
        number = self._next_number(state)
        began, self._asking.waited = time.perf_counter(), 0.0
        skipped = sorted(n for n in aborted if n > state.round)
        # What was known when the round was first asked for, so that a resumed run asks the very same.
        keep = sorted({*candidates(self._scored(before=state.round)), state.round})
        due = bool(plan.validate_every) and state.round > 0 and state.round % plan.validate_every == 0
        # Two validations of one model by different sites would differ by what one of them measured.
        validate = due and number == state.round + 1
        meta = {"keep": keep, "validate": validate, **self._log.anchor(), **_numbers(aborted)}
        exchange, missing, bill = self._asking.run(self._call(TRAIN, state, number, meta, self._sent), self._protocol)
        again = self._asking.again
        aggregate = exchange.aggregate()
        if validate:
            bill += self._validated(state, aggregate, exchange.receipts)[1]
        bill += self._asking.lost
        scales, saturated = next_scales(plan.codec, aggregate, plan.curriculum, number, before=state.round)
        restored = plan.codec.restore(number, plan.layout, aggregate)
        still = held(plan.layout, plan.curriculum.still(number))

        def apply(write: Writers) -> None:
            self._method.apply(state.public, state.private, restored, holding(write, state.public, still))

        following = self._write(number, scales, apply)
        following = replace(following, scales=self._scales.capped(scales, following.public))
        elements = aggregate.contributors * sum(
            plan.codec.count(group.name, info.size) for group in self._sent.groups for info in group.tensors
        )
        report = RoundReport(
            arm=plan.arm,
            round=number,
            attempt=exchange.attempt,
            participants=tuple(sorted(exchange.receipts)),
            missing=missing,
            loss=float(aggregate.metrics[LOSS][0]) / aggregate.contributors if LOSS in aggregate.metrics else None,
            validation=None,
            bytes_up=bill.up.total,
            bytes_down=bill.down.total,
            seconds=time.perf_counter() - began,
            coordinator_seconds=time.perf_counter() - began - self._asking.waited,
            training_seconds=float(aggregate.metrics[SECONDS][0]),
            saturated_share=sum(aggregate.saturated.values()) / max(1, elements),
            saturated=max(saturated.values(), default=0.0),
            state_sha256=following.public_sha256,
            notes=(
                *(f"round {n} is aborted: not all of it came after its survivors were named" for n in skipped),
                *exchange.notes,
                *([f"too few sites answered at first: tried again {_times(again)}"] if again else ()),
                *(
                    cut_off(key, share, following.scales[key] / state.scales[key])
                    for key, share in saturated.items()
                    if share > SATURATED
                ),
            ),
            bill=bill,
        )
        self._journal.commit(following, report, exchange.receipts)
        self._asking.lost = NO_BILL
        self._log.committed(number)
        self._forget(number)
        return following, report

    def _next_number(self, state: State) -> int:
        """The number of the round that follows a state: the first that no aborted round has used up."""
        aborted = self._journal.aborted(TRAIN)
        return next(n for n in count(state.round + 1) if n not in aborted)

    def _write(self, number: int, scales: Mapping[str, float], fill: Callable[[Writers], None]) -> State:
        blobs = self._journal.blobs
        with blobs.draft(durable=True) as private, blobs.draft(durable=True) as public:
            to_public, to_private = TensorWriter(public.file), TensorWriter(private.file)
            fill(Writers(to_public.add, to_private.add))
            public.name = to_public.sha256
            # Most methods keep nothing at the coordinator: no file, no sync.
            private.name = to_private.sha256 if to_private.nbytes else ""
        return State(
            number,
            TensorFile(blobs.path(to_public.sha256), to_public.table),
            to_public.sha256,
            TensorFile(blobs.path(to_private.sha256), to_private.table),
            to_private.sha256,
            scales,
        )

    def _validated(
        self, state: State, trained: Aggregate, by: Collection[str], of_last: Bill | None = None
    ) -> tuple[RoundReport, Bill]:
        """The report of a state's round with its validation: the sums of the sites that train, and the evaluators'.

        With what these took, which the round that follows has on its bill. After the last round none follows: `of_last`
        is what asking the sites that train took, and both go on the bill of the round itself. An evaluator that is
        away is left out of the round's validation.
        """
        plan, parts, sites = self._plan, [trained], set(by)
        missing: dict[str, str] = {}
        bill = NO_BILL
        if plan.evaluators:
            body = served_body(self._method, state, self._journal.root)
            call = replace(
                as_unseen(self._call(EVALUATE, state, state.round, {}, plan.metrics_layout), *body),
                sites=plan.evaluators,
            )
            elsewhere, missing, bill = self._asking.run(call, PlainSum, required=False)
            if elsewhere.receipts:
                parts, sites = [*parts, elsewhere.aggregate()], sites.union(elsewhere.receipts)
        sums = parts[0] if len(parts) == 1 else merged(plan.metrics, parts)
        more = NO_BILL if of_last is None else of_last + bill
        return self._amend(state.round, sums, sites, missing, more), bill

    def _amend(
        self, number: int, sums: Sums, sites: Collection[str], missing: Mapping[str, str], more: Bill
    ) -> RoundReport:
        reports = {r.round: r for r in self._journal.reports()}
        if number not in reports:
            raise JournalError(f"round {number} was validated but never committed")
        bill = reports[number].bill + more
        report = replace(
            reports[number],
            bill=bill,
            bytes_up=bill.up.total,
            bytes_down=bill.down.total,
            validation=validation_values(sums, self._plan.metrics),
            validated=tuple(sorted(sites)),
            # A validation that is repeated after a crash says anew who was away.
            notes=went_without(reports[number].notes, missing),
        )
        self._journal.amend(report)
        return report

    def _missing_validation(self, number: int) -> bool:
        return all(r.validation is None for r in self._journal.reports() if r.round == number)

    def _scored(self, before: int | None = None) -> list[Scored]:
        """The validated rounds, with what selects among them: larger is better."""
        name, sign = self._plan.selection, 1.0 if self._plan.larger_is_better else -1.0
        return [
            Scored(report.round, sign * report.validation[name], frozenset(report.validated))
            for report in self._journal.reports()
            if name is not None
            and report.round >= self._plan.curriculum.selects_from
            and report.validation
            and name in report.validation
            and (before is None or report.round < before)
        ]

    def _forget(self, number: int) -> None:
        keep = set(range(number - self._plan.keep + 1, number + 1))
        self._journal.forget_states(keep | candidates(self._scored()))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _numbers(aborted: Collection[int]) -> dict[str, Any]:
    """What a request says of the numbers that aborted rounds used up."""
    return {"aborted": sorted(aborted)} if aborted else {}
