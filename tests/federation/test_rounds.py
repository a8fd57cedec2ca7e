"""The coordinator's and the sites' promises: once is once, the first decision stands, unseen hospitals are refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.federation.rig import Rig
from tests.toys import toy_study
from wardround.errors import JournalError, Rejected
from wardround.federation.exchange import ERROR, TRAIN, UPDATE, Call, PlainSum
from wardround.learning.training import Learner
from wardround.protection.gates import check_body, check_reply, check_update
from wardround.storage.journal import Journal
from wardround.wire.message import FileBody, Message

STUDY = toy_study(method={"kind": "fedavg", "weights": "equal"}, schedule={"rounds": 3, "keep": 2})


def call_of(rig: Rig, number: int = 1) -> Call:
    """The training request of a round, from the latest state."""
    state = rig.start()
    return Call(
        kind=TRAIN,
        study=rig.arm_spec.identity,
        round=number,
        sites=tuple(rig.sites),
        layout=rig.arm_spec.layout,
        scales=state.scales,
        meta={"keep": [0], "validate": False},
        tensors=state.public.table,
        body=FileBody(state.public.path, state.public.nbytes),
        body_sha256=state.public_sha256,
    )


def data(message: Message) -> bytes:
    return message.header.to_bytes() + b"".join(bytes(c) for c in message.body.chunks())


def test_a_site_trains_once_for_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, trained = Rig(STUDY, tmp_path), []
    train = Learner.train
    monkeypatch.setattr(Learner, "train", lambda self, *rest: trained.append(1) or train(self, *rest))
    request = call_of(rig).message("A")
    first = data(rig.sites["A"].handle(request))
    assert data(rig.sites["A"].handle(request)) == first
    # A site that was started again answers from its store.
    again = Rig(STUDY, tmp_path)
    assert data(again.sites["A"].handle(request)) == first
    assert len(trained) == 1
    other = replace(request, header=replace(request.header, attempt=1))
    assert data(again.sites["A"].handle(other)) != first
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"study": "another"}, "StudyError"),
        ({"site": "B"}, "another site"),
        ({"kind": "dance"}, "does not know"),
        ({"meta": {"layout": "of another version"}}, "Rejected"),
        ({"meta": {"layout": ["unhashable"]}}, "TypeError"),
        ({"meta": {}}, "scale of every tensor"),
        ({"meta": {"scales": {"model/0.weight": -1.0}}}, "scale of every tensor"),
        ({"body_nbytes": 3}, "Rejected"),
        ({"body_sha256": "0" * 64}, "hash is not"),
        ({"tensors": ()}, "does not fit"),
        ({"round": 2**70}, "the study ends with round"),
    ],
)
def test_a_site_answers_a_hostile_request_with_an_error(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    rig = Rig(STUDY, tmp_path)
    request = call_of(rig).message("A")
    hostile = replace(request, header=replace(request.header, **change))
    reply = rig.sites["A"].handle(hostile)
    assert reply.header.kind == ERROR
    assert reason in str(reply.header.meta["reason"])
    assert reply.header.reply_to == hostile.id
    # It is not worse for it.
    assert rig.sites["A"].handle(request).header.kind == UPDATE


def test_late_replayed_and_foreign_replies_are_refused(tmp_path: Path) -> None:
    rig = Rig(STUDY, tmp_path)
    exchange = PlainSum(call_of(rig))
    replies = {m.header.site: rig.sites[m.header.site].handle(m) for m in exchange.open()}
    later = PlainSum(call_of(rig, 2))
    later.open()
    with pytest.raises(Rejected, match="late, replayed"):
        later.accept(replies["A"])
    with pytest.raises(Rejected, match="not asked"):
        exchange.accept(replace(replies["A"], header=replace(replies["A"].header, site="Z")))
    with pytest.raises(Rejected, match="another request"):
        exchange.accept(replace(replies["A"], header=replace(replies["A"].header, site="B")))
    with pytest.raises(Rejected, match="was expected"):
        exchange.accept(replace(replies["A"], header=replace(replies["A"].header, kind="done")))
    assert not exchange.receipts
    exchange.accept(replies["A"])
    total = exchange.aggregate().mean("model", "0.weight")
    # The same answer twice counts once; another one is refused.
    exchange.accept(replies["A"])
    assert (exchange.aggregate().mean("model", "0.weight") == total).all()
    assert exchange.aggregate().contributors == 1
    with pytest.raises(Rejected, match="twice, differently"):
        exchange.accept(replace(replies["A"], header=replace(replies["A"].header, body_sha256="0" * 64)))
    exchange.accept(replies["B"])
    assert set(exchange.receipts) == {"A", "B"}
    assert exchange.aggregate().contributors == 2


def test_gates_name_what_they_refuse(tmp_path: Path) -> None:
    rig = Rig(STUDY, tmp_path)
    layout = rig.arm_spec.layout
    request = call_of(rig).message("A")
    reply = rig.sites["A"].handle(request)
    check_reply(reply, UPDATE, {"A": request.id})
    check_update(layout, reply)
    with pytest.raises(Rejected, match="where the study says"):
        check_update(layout, replace(reply, header=replace(reply.header, body_nbytes=layout.nbytes + 12)))
    with pytest.raises(Rejected, match="another layout"):
        check_update(layout, replace(reply, header=replace(reply.header, meta={"layout": "x"})))
    raw = b"".join(bytes(c) for c in reply.body.chunks())
    bad = tmp_path / "bad"
    bad.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    with pytest.raises(Rejected, match="changed on the way"):
        check_body(replace(reply, body=FileBody(bad, len(raw))))
    with pytest.raises(Rejected, match="bytes where the header says"):
        check_body(replace(reply, body=FileBody(bad, len(raw) - 1)))


def test_the_first_decision_stands(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "identity")
    assert journal.decide(1, 0, "survivors", ["A", "B"]) == ["A", "B"]
    assert journal.decide(1, 0, "survivors", ["A"]) == ["A", "B"]
    assert journal.decide(1, 1, "survivors", ["A"]) == ["A"]
    journal.close()
    again = Journal(tmp_path, "identity")
    assert again.decide(1, 0, "survivors", []) == ["A", "B"]


def test_a_round_cannot_be_committed_twice(tmp_path: Path) -> None:
    rig = Rig(STUDY, tmp_path)
    state = rig.train()
    report = rig.journal.reports()[-1]
    before = rig.journal.reports()
    with pytest.raises(JournalError):
        rig.journal.commit(state, report, {"A": "x"})
    assert rig.journal.reports() == before
    with pytest.raises(JournalError, match="was not kept"):
        rig.journal.state(0)


def test_rounds_are_committed_before_they_are_told(tmp_path: Path) -> None:
    rig = Rig(STUDY, tmp_path)
    seen = 0
    for report in rig.coordinator.rounds(rig.start()):
        latest = rig.journal.latest()
        assert latest is not None
        assert latest.round == report.round
        seen += 1
    assert seen == 4  # three rounds, and the last one once more with its validation
    assert all(r.validation for r in rig.journal.reports())
    assert len(list(rig.journal.blobs.root.iterdir())) <= 4
    assert rig.coordinator.release().number in (1, 2, 3)


def test_a_site_that_missed_rounds_takes_part_again_with_what_it_had(tmp_path: Path) -> None:
    study = toy_study(
        method={"kind": "fedbn"},
        task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}},
        schedule={"rounds": 4, "validate_every": 0, "release": "last"},
    )
    rig = Rig(study, tmp_path)
    exchange = rig.engine.exchange

    def without_b(messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            if message.header.site == "B" and message.header.round in (2, 3):
                yield message.reply(ERROR, meta={"reason": "away"})
            else:
                yield from exchange([message])

    rig.engine.exchange = without_b  # type: ignore[method-assign]
    rig.train()
    assert [sorted(r.missing) for r in rig.journal.reports()] == [[], ["B"], ["B"], []]
    counters = {n: int(s.store.memory(4).tensors["local/1.num_batches_tracked"]) for n, s in rig.sites.items()}
    assert counters == {"A": 12, "B": 6, "C": 12}


def test_a_malicious_update_costs_one_site_and_not_the_round(tmp_path: Path) -> None:
    rig = Rig(
        toy_study(method={"kind": "fedavg", "weights": "equal"}, schedule={"rounds": 1, "min_sites": 2}), tmp_path
    )
    exchange = rig.engine.exchange

    def poisoned(messages: Iterable[Message]) -> Iterator[Message]:
        for reply in exchange(messages):
            if reply.header.site == "B" and reply.header.kind == UPDATE:
                reply = replace(reply, header=replace(reply.header, body_sha256="0" * 64))
            yield reply

    rig.engine.exchange = poisoned  # type: ignore[method-assign]
    rig.train()
    (report,) = rig.journal.reports()
    assert report.participants == ("A", "C")
    assert "changed on the way" in report.missing["B"]


def test_coordinators_start_without_torch() -> None:
    rooms = [
        "wire.canonical",
        "wire.message",
        "wire.random",
        "wire.ring",
        "wire.tensors",
        "wire.update",
        "federation.coordinator",
        "storage.journal",
        "federation.exchange",
        "plan.sums",
        "learning.methods.build",
        "protection.gates",
        "tasks.metrics",
        "engines.local",
        "engines.workers",
    ]
    code = "import sys\n" + "\n".join(
        f"import wardround.{room}\nassert 'torch' not in sys.modules, {room!r}" for room in rooms
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
