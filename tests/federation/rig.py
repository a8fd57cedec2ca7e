"""A federation without a runner: coordinator, sites and engine put together by hand, every part replaceable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.toys import toy_sites
from wardround.engines.local import LocalEngine
from wardround.federation.coordinator import Coordinator
from wardround.federation.exchange import Engine, ExchangeFactory, PlainSum
from wardround.federation.facts import DELIVER
from wardround.learning.examples import ExampleStream, SiteExamples
from wardround.learning.training import Learner
from wardround.results.schema import Result
from wardround.runs.machine import Machine
from wardround.site.protocol import SiteProtocol
from wardround.site.rules import rules_of
from wardround.site.site import Site
from wardround.storage.journal import Journal, State
from wardround.storage.store import SiteStore
from wardround.study.schema import Study
from wardround.wire.message import Message

ARM = "federated"


@dataclass(frozen=True)
class Sent:
    """One message as bytes: its header, and everything that went over the seam."""

    message: Message
    body: bytes

    @property
    def data(self) -> bytes:
        return self.message.header.to_bytes() + self.body


class Recorder:
    """An engine that hands on what it carries and keeps a copy of every byte, in both directions."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.sent: list[Sent] = []

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            self._record(message)
            for reply in self._engine.exchange([message]):
                self._record(reply)
                yield reply

    def close(self) -> None:
        self._engine.close()

    def _record(self, message: Message) -> None:
        self.sent.append(Sent(message, b"".join(bytes(c) for c in message.body.chunks())))


def recorded_sessions(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    """Every message of the sessions that follow."""
    sent: list[Sent] = []

    class Recording(Recorder):
        def __init__(self, find: Any) -> None:
            super().__init__(LocalEngine(find))
            self.sent = sent

    monkeypatch.setattr("wardround.engines.local.LocalEngine", Recording)
    return sent


def assert_billed(result: Result, sent: list[Sent]) -> None:
    """Every byte over the seam is on the bill, and none twice; but answers to the delivery come after it."""
    bills = [bill for arm in result.traffic.arms.values() for _, bill in arm] + [result.traffic.study]
    asked = [each for each in sent if not each.message.header.reply_to]
    delivered = {each.message.id for each in asked if each.message.header.kind == DELIVER}
    answers = [s for s in sent if s.message.header.reply_to and s.message.header.reply_to not in delivered]
    assert sum(bill.down.total for bill in bills) == sum(len(each.data) for each in asked)
    assert sum(bill.up.total for bill in bills) == sum(len(each.data) for each in answers)


class Rig:
    """The federated arm of a study in one process; what a session would build, in the open."""

    def __init__(
        self,
        study: Study,
        folder: Path,
        *,
        protocol: ExchangeFactory = PlainSum,
        site_protocol: Callable[[str], SiteProtocol] | None = None,
        task: Any = None,
        lint: bool = True,
    ) -> None:
        self.host = Machine(study, toy_sites(folder / "data", tuple(study.sites)), folder / "out", ())
        if task is not None:
            self.host.__dict__["task"] = task
        self.study = study
        self.arm_spec = self.host.arm_spec(ARM)
        self.method = self.arm_spec.method
        self.sites = {
            name: Site(
                name,
                rules_of(self.host, ARM, lint=lint, rounding_root=self.host.rounding_root),
                lambda name=name: self.learner(name),
                SiteStore(folder / "sites" / name),
                protocol=None if site_protocol is None else site_protocol(name),
            )
            for name in study.sites
        }
        self.engine = Recorder(LocalEngine(lambda header: self.sites[header.site]))
        self.journal = Journal(folder / "coordinator", self.arm_spec.identity)
        self.coordinator = Coordinator(self.host.plan(ARM), self.method, self.engine, self.journal, protocol)

    def learner(self, site: str) -> Learner:
        dataset = self.host.dataset(site)
        return Learner(
            site=site,
            model_context=self.host.model_context,
            dataset=dataset,
            examples=SiteExamples(ExampleStream(len(dataset), self.study.seed, site)),
            method=self.method,
            policy=self.arm_spec.policy,
            local=self.study.local,
            rounds=self.study.schedule.rounds,
            seed=self.study.seed,
            groups=tuple(g.name for g in self.arm_spec.layout.groups),
            curriculum=self.arm_spec.curriculum,
        )

    def start(self) -> State:
        values = self.host.model_context.initial_values()
        return self.coordinator.start(lambda: self.method.initial(self.arm_spec.layout.groups, values))

    def train(self) -> State:
        """All rounds; the last global state."""
        for _ in self.coordinator.rounds(self.start()):
            pass
        state = self.journal.latest()
        assert state is not None
        return state

    def states(self) -> Iterator[State]:
        """The state before the first round, and after every round."""
        yield self.start()
        for report in self.coordinator.rounds(self.start()):
            if report.validation is None:
                yield self.journal.state(report.round)
