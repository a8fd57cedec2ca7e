"""Robust rounds: poisoned runs through the real coordinator, restarts, gates, momentum."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

import wardround
from tests.federation.rig import ARM, Rig
from tests.federation.test_rounds import call_of
from tests.toys import toy_sites, toy_study
from wardround.errors import NotEnoughSites, Rejected, StudyError
from wardround.federation.exchange import UPDATE, Engine, ExchangeFactory, PlainSum
from wardround.federation.robust import RobustMean, robust_mean
from wardround.learning.momentum import MOMENTUM, averaged
from wardround.protection.robust import Defence
from wardround.study.protection import Robust
from wardround.study.schema import Study
from wardround.wire.message import FileBody, Message
from wardround.wire.update import encode

SITES = ("A", "B", "C", "D", "E", "F", "G")
BAD = SITES[:2]
DEFENCE = Defence(f=2)
Poison = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]


def study(**changes: Any) -> Study:
    return toy_study(
        SITES,
        **{
            "method": {"kind": "fedavg", "weights": "equal"},
            "schedule": {"rounds": 4, "release": "last"},
            "protection": {"robust": {"malicious": 0.3, "momentum": 0.5}},
            **changes,
        },
    )


class Poisoner:
    """An engine between which and the coordinator two sites are malicious: they send any update that has the form."""

    def __init__(self, engine: Engine, rig: Rig, poison: Poison, folder: Path, weight: float = 1.0) -> None:
        self._engine, self._rig, self._poison, self._folder, self._weight = engine, rig, poison, folder, weight

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            for reply in self._engine.exchange([message]):
                yield self._poisoned(message, reply) if self._is_bad(reply) else reply

    def close(self) -> None:
        self._engine.close()

    def _is_bad(self, reply: Message) -> bool:
        layout = self._rig.arm_spec.layout
        return reply.header.site in BAD and reply.header.kind == UPDATE and reply.header.body_nbytes == layout.nbytes

    def _poisoned(self, request: Message, reply: Message) -> Message:
        layout, scales = self._rig.arm_spec.layout, request.header.meta["scales"]
        exchange = PlainSum(
            replace(call_of(self._rig), layout=layout, scales=scales, sites=BAD, round=request.header.round)
        )
        exchange._requests = {reply.header.site: reply.header.reply_to}
        exchange.accept(reply)
        told = exchange.aggregate()
        tensors = {g.name: {t.name: self._poison(told.mean(g.name, t.name)) for t in g.tensors} for g in layout.groups}
        weights = {g.name: self._weight for g in layout.groups}
        metrics = {"loss": 1.0}
        body = b"".join(map(bytes, encode(layout, scales, weights, tensors, metrics, np.random.default_rng(0))))
        path = self._folder / f"{reply.header.site}-{request.header.round}"
        path.write_bytes(body)
        return replace(
            reply,
            body=FileBody(path, len(body)),
            header=replace(reply.header, body_sha256=hashlib.sha256(body).hexdigest()),
        )


def poisoned(folder: Path, poison: Poison | None, protocol: ExchangeFactory, weight: float = 1.0) -> tuple[Rig, Any]:
    """A run whose first two sites are malicious, and its last global model as one vector."""
    # Honest sites would refuse to go on from where a plain mean is moved to: how far that is, is the question here.
    rig = Rig(study(), folder, protocol=protocol, lint=protocol is not PlainSum)
    if poison is not None:
        rig.coordinator._asking._engine = Poisoner(rig.engine, rig, poison, folder, weight)
    state = rig.train()
    return rig, np.concatenate([state.public[name].ravel() for name in sorted(state.public)])


def robust(folder: Path) -> ExchangeFactory:
    return robust_mean(DEFENCE, folder / "updates")


ATTACKS: dict[str, Poison] = {
    # The largest that the ring can say: whatever is asked beyond, it saturates there.
    "scale": lambda x: 1e6 * (x + 1e-3),
    "sign_flip": lambda x: -8.0 * x,
}


@pytest.mark.parametrize("attack", ["scale", pytest.param("sign_flip", marks=pytest.mark.slow)])
def test_two_of_seven_sites_do_not_move_the_model_far(tmp_path: Path, attack: str) -> None:
    _, clean = poisoned(tmp_path / "clean", None, PlainSum)
    rig, guarded = poisoned(tmp_path / "robust", ATTACKS[attack], robust(tmp_path / "robust"))
    _, naive = poisoned(tmp_path / "mean", ATTACKS[attack], PlainSum)
    near, far = np.linalg.norm(guarded - clean), np.linalg.norm(naive - clean)
    assert near < 0.25 * far
    notes = [note for report in rig.journal.reports() for note in report.notes]
    assert any(note.startswith("A is not in the mean") for note in notes)


def test_a_site_whose_loss_is_no_number_is_missing_and_the_rest_goes_on(tmp_path: Path) -> None:
    options = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"nan": "C"}}
    rig = Rig(study(task=options), tmp_path, protocol=robust(tmp_path))
    state = rig.train()
    assert all(np.isfinite(state.public[name]).all() for name in state.public)
    for report in rig.journal.reports():
        assert "not finite" in report.missing["C"]
        assert set(report.participants) <= set(SITES) - {"C"}


@pytest.mark.slow
def test_a_claimed_weight_buys_no_influence(tmp_path: Path) -> None:
    ends = []
    for weight in (1.0, 0.125):
        folder = tmp_path / str(weight)
        ends.append(poisoned(folder, lambda x: -0.5 * x, robust(folder), weight)[1])
    # Another weight rounds otherwise in the ring, and does nothing else.
    assert np.abs(ends[0] - ends[1]).max() < 1e-5
    folder = tmp_path / "none"
    rig, _ = poisoned(folder, lambda x: x, robust(folder), 0.0)
    assert all("without weight" in report.missing["A"] for report in rig.journal.reports())


def exchange_of(rig: Rig, folder: Path, defence: Defence = DEFENCE) -> tuple[RobustMean, dict[str, Message]]:
    exchange = RobustMean(call_of(rig), defence, folder / "updates")
    return exchange, {m.header.site: rig.sites[m.header.site].handle(m) for m in exchange.open()}


@pytest.mark.parametrize(
    "defence", [DEFENCE, Defence("trimmed_mean", 2, "nearest_neighbour"), Defence("multi_krum", 2)]
)
def test_the_order_of_arrival_does_not_matter_and_once_is_once(tmp_path: Path, defence: Defence) -> None:
    rig = Rig(study(), tmp_path)
    means = []
    for order in (SITES, SITES[::-1]):
        exchange, replies = exchange_of(rig, tmp_path, defence)
        for site in order:
            exchange.accept(replies[site])
        exchange.accept(replies["B"])
        with pytest.raises(Rejected, match="twice, differently"):
            exchange.accept(replace(replies["B"], header=replace(replies["B"].header, body_sha256="0" * 64)))
        assert exchange.close() == []
        assert exchange.aggregate().contributors == len(exchange.receipts)
        assert sum(exchange.weights["model"].values()) == pytest.approx(1.0)
        means.append(exchange.aggregate().mean("model", "0.weight"))
    assert (means[0] == means[1]).all()


def test_a_mean_of_all_is_the_mean_of_the_plain_sum(tmp_path: Path) -> None:
    rig = Rig(study(), tmp_path)
    plain = PlainSum(call_of(rig))
    exchange, replies = exchange_of(rig, tmp_path, Defence("mean", 0, "none", gate=False))
    plain.open()
    for reply in replies.values():
        plain.accept(reply)
        exchange.accept(reply)
    exchange.close()
    ours, theirs = exchange.aggregate(), plain.aggregate()
    for group in rig.arm_spec.layout.groups:
        assert ours.weight(group.name) == pytest.approx(theirs.weight(group.name))
        for info in group.tensors:
            mean = theirs.mean(group.name, info.name)
            np.testing.assert_allclose(ours.mean(group.name, info.name), mean, rtol=1e-12, atol=1e-15)
            np.testing.assert_allclose(ours.total(group.name, info.name), theirs.total(group.name, info.name))
            assert ours.peak(group.name, info.name) == pytest.approx(theirs.peak(group.name, info.name))
    assert {name: list(v) for name, v in ours.metrics.items()} == {name: list(v) for name, v in theirs.metrics.items()}


def test_a_changed_body_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    rig = Rig(study(), tmp_path)
    exchange, replies = exchange_of(rig, tmp_path)
    raw = b"".join(bytes(c) for c in replies["A"].body.chunks())
    bad = tmp_path / "bad"
    bad.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    with pytest.raises(Rejected, match="changed on the way"):
        exchange.accept(replace(replies["A"], body=FileBody(bad, len(raw))))
    bad.write_bytes(raw[:-4])
    with pytest.raises(Rejected, match="where the study says"):
        exchange.accept(replace(replies["A"], body=FileBody(bad, len(raw) - 4)))
    assert not list((tmp_path / "updates").iterdir())
    assert not exchange.receipts


def test_too_few_sites_stop_the_run(tmp_path: Path) -> None:
    rig = Rig(study(), tmp_path)
    exchange, replies = exchange_of(rig, tmp_path)
    for site in SITES[:4]:
        exchange.accept(replies[site])
    with pytest.raises(NotEnoughSites, match=r"4 updates are too few .* 2 malicious"):
        exchange.close()


def test_a_run_that_was_stopped_ends_the_same(tmp_path: Path) -> None:
    def rig(folder: Path) -> Rig:
        return Rig(study(), folder, protocol=robust(folder))

    whole = rig(tmp_path / "whole").train()
    for _ in range(4):
        # Every round in a new process, as far as anybody can tell.
        part = rig(tmp_path / "parts")
        next(part.coordinator.rounds(part.start()))
        part.journal.close()
    stopped = rig(tmp_path / "parts").journal.latest()
    assert stopped is not None
    assert stopped.public_sha256 == whole.public_sha256


def test_momentum_adds_up_to_what_was_learned() -> None:
    change = np.array([1.0, -2.0], dtype=np.float32)
    none = np.zeros(2, dtype=np.float32)
    memory: dict[str, Any] = {}
    total = np.zeros(2)
    for number in range(80):
        told = {"model": {"w": change if number == 0 else none}, "buffers": {"mean": change}}
        sent, memory = averaged(told, memory, 0.8)
        total += sent["model"]["w"]
        assert (sent["buffers"]["mean"] == change).all()
        assert sent["model"]["w"].dtype == np.float32
        np.testing.assert_allclose(sent["model"]["w"], 0.2 * 0.8**number * change, rtol=1e-5)
    np.testing.assert_allclose(total, change, rtol=1e-5)
    assert list(memory) == [f"{MOMENTUM}model/w"]


def test_a_robust_study_runs_from_end_to_end_and_keeps_its_momentum_at_the_site(tmp_path: Path) -> None:
    told = study(
        local={"steps": 2, "batch": 2, "optimizer": "sgd", "lr": 0.1}, schedule={"rounds": 2, "release": "last"}
    )
    result = wardround.run(told, toy_sites(tmp_path / "data", SITES), tmp_path / "out", engine="local")
    assert set(result.participants) <= set(SITES)
    rig = Rig(told, tmp_path / "rig")
    assert rig.host.arms[ARM].robust(told) == told.protection.robust
    learner = rig.host.learner(rig.arm_spec, "A")
    trained = learner.train(1, rig.start().public, rig.sites["A"].store.memory(0))
    assert {name for name in trained.memory if name.startswith(MOMENTUM)} == {
        f"{MOMENTUM}model/{name}" for name in trained.changes["model"]
    }


def test_a_study_says_what_does_not_go_together() -> None:
    with pytest.raises(ValidationError, match="choose one of the two"):
        study(protection={"robust": {}, "secure": True})
    with pytest.raises(ValidationError, match="release: last"):
        study(schedule={"rounds": 2})
    with pytest.raises(ValidationError, match="among at least 3 training sites, not 2"):
        toy_study(("A", "B"), protection={"robust": {}}, schedule={"rounds": 1, "release": "last"})
    with pytest.raises(StudyError, match="at least 5"):
        Robust(rule="krum").tolerated(4)
    assert [Robust().tolerated(n) for n in (3, 5, 10, 20, 24, 25)] == [1, 1, 2, 4, 4, 5]
