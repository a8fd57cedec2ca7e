"""What a coordinator writes of one arm: global states, reports of rounds, their validations, and which are kept.

How updates come to be in a round is the coordinator's (`federation.coordinator`, `federation.asynchronous`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy.typing as npt

from wardround.errors import JournalError
from wardround.federation.asking import Asking, Patience
from wardround.federation.exchange import EVALUATE, Call, Engine, PlainSum
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
from wardround.wire.staleness import Staleness
from wardround.wire.tensors import TensorFile, TensorWriter
from wardround.wire.update import Aggregate, Layout

Array = npt.NDArray[Any]


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
    #: How updates of sites that are late count; without it a round waits for all of them.
    staleness: Staleness | None = None


@dataclass(frozen=True)
class Release:
    """The round that an arm releases, its global state, and the numbers that aborted rounds used up."""

    number: int
    state: State
    aborted: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Answered:
    """Whose updates a round has (`receipts`: site -> hash of what it sent), and what else its report says of them.

    `missing` says by site why it is not there. With asynchronous rounds `staleness` says by site how many rounds older
    than the newest the state was that it trained from, and `at_work` which round's request a site has not answered.
    """

    receipts: Mapping[str, str]
    missing: Mapping[str, str]
    attempt: int = 0
    notes: tuple[str, ...] = ()
    staleness: Mapping[str, int] = field(default_factory=dict)
    at_work: Mapping[str, int] = field(default_factory=dict)


class Commits:
    """The record of one arm at its coordinator; what is committed in the journal is never done again."""

    def __init__(self, plan: Plan, method: Method, engine: Engine, journal: Journal, patience: Patience) -> None:
        self.plan = plan
        self.journal = journal
        self.log = CoordinatorLog(journal)
        self.asking = Asking(plan, engine, self.log, patience)
        self.sent = plan.codec.sent(plan.layout)
        self.scales = ScaleRules(self.sent, plan.initial_scale, plan.initial, frozenset({MODEL}))
        self._method = method
        self._lasting = Lasting(method, plan.layout, plan.curriculum)

    def start(self, initial: Callable[[], tuple[Mapping[str, Array], Mapping[str, Array]]]) -> State:
        """The state to go on from: the last committed one, or the initial one, which `initial` makes."""
        state = self.journal.latest()
        if state is None:
            public, private = initial()

            def copy(write: Writers) -> None:
                for name, tensor in public.items():
                    write.public(name, tensor)
                for name, tensor in private.items():
                    write.private(name, tensor)

            state = self._write(0, self.scales.start, copy)
            self.journal.commit(state, None, {})
        else:
            self.journal.check(state)
        self.log.settle()
        return state

    def release(self, aborted: frozenset[int]) -> Release:
        """The released round: the best by validation (`selection.best_round`), or the last; 0 where there is none."""
        number = best_round(self.scored()) if self.plan.release == "best" else None
        state = self.journal.latest() if number is None else self.journal.state(number)
        if state is None:
            raise JournalError(f"{self.plan.arm}: there is no round to release")
        released = Release(state.round, state, aborted)
        self.journal.check(released.state)
        self.log.released(released.number, released.state.public_sha256)
        return released

    def call(self, kind: str, state: State, number: int, meta: Mapping[str, Any], layout: Layout) -> Call:
        """What is asked of the sites of a state."""
        return Call(
            kind=kind,
            study=self.plan.identity,
            round=number,
            sites=self.plan.sites,
            layout=layout,
            scales=state.scales if layout.groups else {},
            meta=meta,
            tensors=state.public.table,
            body=FileBody(state.public.path, state.public.nbytes),
            body_sha256=state.public_sha256,
            form=self.plan.codec.form,
            absent=self._lasting.absent(state),
        )

    def validates(self, number: int) -> bool:
        """Whether the state after round `number` is validated where it is trained from."""
        return bool(self.plan.validate_every) and number > 0 and number % self.plan.validate_every == 0

    def commit(
        self,
        state: State,
        number: int,
        aggregate: Aggregate,
        restored: Aggregate,
        answered: Answered,
        bill: Bill,
        began: float,
    ) -> tuple[State, RoundReport]:
        """Make round `number`, which follows `state`, exist: the state that its sum leads to, and its report.

        `aggregate` is the sum of what was sent and `restored` the same in the method's layout. The round `began` then,
        by `time.perf_counter`.
        """
        plan = self.plan
        scales, saturated = next_scales(plan.codec, aggregate, plan.curriculum, number, before=state.round)
        still = held(plan.layout, plan.curriculum.still(number))

        def apply(write: Writers) -> None:
            self._method.apply(state.public, state.private, restored, holding(write, state.public, still))

        following = self._write(number, scales, apply)
        following = replace(following, scales=self.scales.capped(scales, following.public))
        elements = aggregate.contributors * sum(
            plan.codec.count(group.name, info.size) for group in self.sent.groups for info in group.tensors
        )
        cut = (
            cut_off(key, share, following.scales[key] / state.scales[key])
            for key, share in saturated.items()
            if share > SATURATED
        )
        report = RoundReport(
            arm=plan.arm,
            round=number,
            attempt=answered.attempt,
            participants=tuple(sorted(answered.receipts)),
            missing=answered.missing,
            loss=float(aggregate.metrics[LOSS][0]) / aggregate.contributors if LOSS in aggregate.metrics else None,
            validation=None,
            bytes_up=bill.up.total,
            bytes_down=bill.down.total,
            seconds=time.perf_counter() - began,
            coordinator_seconds=time.perf_counter() - began - self.asking.waited,
            training_seconds=float(aggregate.metrics[SECONDS][0]),
            saturated_share=sum(aggregate.saturated.values()) / max(1, elements),
            saturated=max(saturated.values(), default=0.0),
            state_sha256=following.public_sha256,
            notes=(*answered.notes, *cut),
            bill=bill,
            staleness=answered.staleness,
            at_work=answered.at_work,
        )
        self.journal.commit(following, report, answered.receipts)
        self.asking.lost = NO_BILL
        self.log.committed(number)
        return following, report

    def validated(
        self, state: State, trained: Sums, by: Collection[str], of_last: Bill | None = None
    ) -> tuple[RoundReport, Bill]:
        """The report of a state's round with its validation: the sums of the sites that train, and the evaluators'.

        With what these took, which the round that follows has on its bill. After the last round none follows: `of_last`
        is what asking the sites that train took, and both go on the bill of the round itself. An evaluator that is
        away is left out of the round's validation.
        """
        plan, parts, sites = self.plan, [trained], set(by)
        missing: dict[str, str] = {}
        bill = NO_BILL
        if plan.evaluators:
            body = served_body(self._method, state, self.journal.root)
            call = replace(
                as_unseen(self.call(EVALUATE, state, state.round, {}, plan.metrics_layout), *body),
                sites=plan.evaluators,
            )
            elsewhere, missing, bill = self.asking.run(call, PlainSum, required=False)
            if elsewhere.receipts:
                parts, sites = [*parts, elsewhere.aggregate()], sites.union(elsewhere.receipts)
        sums = parts[0] if len(parts) == 1 else merged(plan.metrics, parts)
        more = NO_BILL if of_last is None else of_last + bill
        return self.amend(state.round, sums, sites, missing, more), bill

    def amend(
        self, number: int, sums: Sums, sites: Collection[str], missing: Mapping[str, str], more: Bill
    ) -> RoundReport:
        """Put a validation into the report of a committed round, over `sites`, and `more` on its bill."""
        reports = {r.round: r for r in self.journal.reports()}
        if number not in reports:
            raise JournalError(f"round {number} was validated but never committed")
        bill = reports[number].bill + more
        report = replace(
            reports[number],
            bill=bill,
            bytes_up=bill.up.total,
            bytes_down=bill.down.total,
            validation=validation_values(sums, self.plan.metrics),
            validated=tuple(sorted(sites)),
            # A validation that is repeated after a crash says anew who was away.
            notes=went_without(reports[number].notes, missing),
        )
        self.journal.amend(report)
        return report

    def add_to_bill(self, number: int, more: Bill) -> None:
        """Put what else was sent on the bill of a committed round."""
        report = next(r for r in self.journal.reports() if r.round == number)
        bill = report.bill + more
        self.journal.amend(replace(report, bill=bill, bytes_up=bill.up.total, bytes_down=bill.down.total))

    def missing_validation(self, number: int) -> bool:
        """Whether a committed round has no validation."""
        return all(r.validation is None for r in self.journal.reports() if r.round == number)

    def scored(self, before: int | None = None) -> list[Scored]:
        """The validated rounds, with what selects among them: larger is better."""
        name, sign = self.plan.selection, 1.0 if self.plan.larger_is_better else -1.0
        return [
            Scored(report.round, sign * report.validation[name], frozenset(report.validated))
            for report in self.journal.reports()
            if name is not None
            and report.round >= self.plan.curriculum.selects_from
            and report.validation
            and name in report.validation
            and (before is None or report.round < before)
        ]

    def forget(self, number: int, used: Collection[int] = (), settled: int | None = None) -> None:
        """Keep the states of the last rounds up to `number`, those that are `used`, and those that may be released.

        Rounds from `settled` on may be validated further and must be among those that are kept.
        """
        keep = {*range(number - self.plan.keep + 1, number + 1), *used}
        self.journal.forget_states(keep | candidates(self.scored(before=settled)))

    def _write(self, number: int, scales: Mapping[str, float], fill: Callable[[Writers], None]) -> State:
        blobs = self.journal.blobs
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
