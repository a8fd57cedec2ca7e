"""What sites hold already is not sent again, and nothing comes out otherwise: whatever they lost, and whoever lies."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.apart import engine_of
from tests.chain import chain_study
from tests.federation.rig import Rig, assert_billed, recorded_sessions
from tests.protection.test_secure_rounds import SecureRig
from tests.toys import toy_sites, toy_study
from wardround.errors import JournalError, Rejected
from wardround.federation.exchange import ERROR, TRAIN, UPDATE
from wardround.federation.parts import LACKS, Filling
from wardround.federation.spooled import each_update
from wardround.results.schema import Result
from wardround.runs.conduct import coordinate
from wardround.runs.session import run
from wardround.site.parts import KeptParts, Lacking
from wardround.storage.cipher import StoreCipher
from wardround.study.schema import Study
from wardround.wire.message import EMPTY, FileBody, Header, Message
from wardround.wire.parts import Part
from wardround.wire.tensors import TensorInfo

# A round folds 434 values into layers of 1,608: three rounds, and then their sum.
ROUNDS = 6


def folding(kind: str = "fedex_lora", rounds: int = ROUNDS, **changes: Any) -> Study:
    return toy_study(
        task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"features": 200}},
        adapters={"kind": "lora", "targets": ["0", "2"], "rank": 1, "alpha": 1.0},
        method={"kind": kind},
        **{"schedule": {"rounds": rounds, "release": "last"}, **changes},
    )


def rig_of(folder: Path, study: Study | None = None) -> Rig:
    return Rig(study or folding(), folder, protocol=each_update(folder / "updates"))


def down(rig: Rig, site: str) -> list[tuple[int, int, int]]:
    """Of every request to train a site: round, parts that were left out, bytes of the body that were sent."""
    asked = (sent for sent in rig.engine.sent if sent.message.header.kind == TRAIN)
    return [
        (s.message.header.round, len(s.message.header.absent), len(s.body))
        for s in asked
        if s.message.header.site == site
    ]


def kept(rig: Rig, site: str) -> dict[str, Path]:
    folder = rig.sites[site].store.root / "parts"
    return {path.name: path for path in folder.iterdir()} if folder.exists() else {}


def test_a_site_gets_what_a_round_folds_once(tmp_path: Path) -> None:
    rig = rig_of(tmp_path)
    last = rig.train()
    rounds = down(rig, "A")
    assert [number for number, _, _ in rounds] == list(range(1, ROUNDS + 1))
    # After three rounds their sum takes their place, which is sent once.
    assert [absent for _, absent, _ in rounds] == [0, 0, 1, 2, 0, 1]
    sizes = [nbytes for _, _, nbytes in rounds]
    assert sizes[1] == sizes[2] == sizes[3] == sizes[5] == sizes[0] + 4 * 434
    assert sizes[4] == sizes[0] + 4 * 1608
    # What the site keeps is what the last request named, under the hash of its bytes.
    held = kept(rig, "A")
    parts = [info.name for info in last.public.table if info.name.startswith("adapters/")]
    assert len(held) == 2
    assert len(parts) == 3
    for name, path in held.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == name
    # Beside them it keeps no copy of a broadcast.
    assert not list((rig.sites["A"].store.root / "parts").glob("whole*"))


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


LOSSES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "changed": spoil,
    "cut": lambda p: p.write_bytes(b""),
}


@pytest.mark.parametrize("loss", ["changed", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("gone", "cut"))])
def test_what_a_site_has_lost_is_sent_again_and_the_model_is_the_same(loss: str, tmp_path: Path) -> None:
    whole = rig_of(tmp_path / "whole")
    expected = whole.train().public_sha256
    rig = rig_of(tmp_path / "lost")
    for report in rig.coordinator.rounds(rig.start()):
        if report.round == 3:
            for path in kept(rig, "B").values():
                LOSSES[loss](path)
    state = rig.journal.latest()
    assert state is not None
    assert state.public_sha256 == expected
    asked = [absent for number, absent, _ in down(rig, "B") if number == 4]
    # That bytes are others shows when they are read, and then all is sent.
    assert asked == ([2, 1, 0] if loss == "changed" else [2, 0])
    assert [absent for number, absent, _ in down(rig, "A") if number == 4] == [2]
    bill = rig.journal.reports()[3].bill
    assert bill.down.total == sum(
        len(s.data)
        for s in rig.engine.sent
        if not s.message.header.reply_to and s.message.header.round == 4 and s.message.header.kind == TRAIN
    )


def test_a_site_that_was_away_gets_what_it_missed(tmp_path: Path) -> None:
    rig = Rig(folding(rounds=4), tmp_path, protocol=each_update(tmp_path / "updates"), lint=False)
    exchange, away = rig.engine.exchange, True

    def without(messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            if away and message.header.site == "C":
                yield message.reply(ERROR, meta={"reason": "away"})
            else:
                yield from exchange([message])

    rig.engine.exchange = without  # type: ignore[method-assign]
    for report in rig.coordinator.rounds(rig.start()):
        away = report.round < 3
    assert rig.journal.reports()[-1].participants == ("A", "B", "C")
    assert [absent for _, absent, _ in down(rig, "C")] == [2, 0]


@pytest.mark.slow
def test_a_sealed_store_seals_its_parts(tmp_path: Path) -> None:
    sites = toy_sites(tmp_path / "data")
    study = folding(rounds=4)
    plain = run(study, sites, tmp_path / "plain", engine="local", quiet=True)
    key = tmp_path / "key"
    key.write_text(bytes(range(32)).hex() + "\n")
    key.chmod(0o600)
    entries = {name: entry.model_copy(update={"encryption_key": str(key)}) for name, entry in sites.sites.items()}
    sealed = run(study, sites.model_copy(update={"sites": entries}), tmp_path / "sealed", engine="local", quiet=True)
    assert sealed.model_sha256 == plain.model_sha256
    assert sealed.traffic.arms["federated"].rounds == plain.traffic.arms["federated"].rounds


def test_nothing_is_kept_once_an_arm_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = recorded_sessions(monkeypatch)
    result = run(folding(rounds=4), toy_sites(tmp_path / "data"), tmp_path / "out", engine="local", quiet=True)
    assert any(each.message.header.absent for each in sent)
    assert_billed(result, sent)
    assert not list((tmp_path / "out" / "work" / "sites").rglob("parts/*"))


def test_a_stage_that_stands_still_is_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wardround.federation.parts.LEAST", 1)
    phases = [{"rounds": 4, "train": ["segment"]}, {"train": ["reconstruct", "segment"]}]
    study = chain_study(schedule={"rounds": 5, "release": "last", "phases": phases})
    rig = Rig(study, tmp_path / "plain")
    rig.train()
    rounds = down(rig, "A")
    assert [bool(absent) for _, absent, _ in rounds] == [False, True, True, True, True]
    assert rounds[1][2] < rounds[0][2]


@pytest.mark.slow
def test_a_stage_that_stands_still_is_sent_once_under_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wardround.federation.parts.LEAST", 1)
    phases = [{"train": ["segment"]}]
    schedule = {"rounds": 3, "release": "last", "phases": phases}
    study = chain_study(sites="ABCD", schedule=schedule, protection={"max_sites": 4})
    secure = SecureRig(study, tmp_path / "secure")
    last = secure.train()
    assert [bool(absent) for _, absent, _ in down(secure, "A")] == [False, True, True]
    assert last.public_sha256 == Rig(study, tmp_path / "plain").train().public_sha256


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fedex_lora", "flora"])
def test_every_engine_comes_to_the_same_model_and_bill(kind: str, tmp_path: Path) -> None:
    study, sites = folding(kind), toy_sites(tmp_path / "data")
    together = run(study, sites, tmp_path / "local", engine="local", quiet=True)
    workers = run(study, sites, tmp_path / "workers", engine="workers", processes=2, quiet=True)
    engine = engine_of(study, sites, tmp_path / "apart")
    apart = coordinate(study, tmp_path / "apart" / "coordinator", engine, quiet=True, allow_code=True)
    engine.close()
    assert workers.model_sha256 == apart.model_sha256 == together.model_sha256

    def bill(result: Result) -> Any:
        return result.traffic.arms["federated"].rounds

    assert bill(workers) == bill(together)
    # Only the engine that shares no file shows that what was left out did not travel.
    assert bill(apart).down.adapters == bill(together).down.adapters


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_parts_that_are_lost_between_two_runs_cost_bytes_alone(loss: str, tmp_path: Path) -> None:
    """A run that stops, whose sites come back without what they kept, or with other bytes."""
    expected = rig_of(tmp_path / "whole").train().public_sha256
    first = rig_of(tmp_path / "halves")
    rounds = first.coordinator.rounds(first.start())
    assert [next(rounds).round for _ in range(3)] == [1, 2, 3]
    rounds.close()
    for name in "AC":
        for path in kept(first, name).values():
            LOSSES[loss](path)
    assert rig_of(tmp_path / "halves").train().public_sha256 == expected


# Whoever lies ---------------------------------------------------------------------------------------------------------

TABLE = (TensorInfo("a", "float32", (200,)), TensorInfo("b", "float32", (300,)), TensorInfo("c", "uint8", (7,)))
BODY = np.random.default_rng(0).bytes(200 * 4 + 300 * 4 + 7)
PIECES = {0: BODY[:800], 1: BODY[800:2000], 2: BODY[2000:]}


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def request(folder: Path, absent: dict[int, str] | None = None, sent: bytes | None = None, **changes: Any) -> Message:
    """A request with that body, of which parts are named; `sent` are the bytes that come."""
    absent = absent or {}
    header = Header(TRAIN, "s", "A", tensors=TABLE, body_nbytes=len(BODY), body_sha256=sha(BODY))
    header = replace(header, **{"absent": tuple(Part(*each) for each in absent.items()), **changes})
    data = b"".join(PIECES[i] for i in PIECES if i not in absent) if sent is None else sent
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sent").write_bytes(data)
    return Message(header, FileBody(folder / "sent", len(data)) if data else EMPTY)


def read(message: Message) -> bytes:
    return b"".join(bytes(chunk) for chunk in message.body.chunks())


@pytest.mark.parametrize("cipher", [None, StoreCipher(bytes(32))], ids=["plain", "sealed"])
def test_a_whole_body_is_made_of_what_came_and_what_is_held(cipher: StoreCipher | None, tmp_path: Path) -> None:
    kept = KeptParts(tmp_path / "parts", cipher)
    with kept.whole(request(tmp_path)) as first:
        kept.keep(first, frozenset({0, 1}))
    files = {path.name for path in (tmp_path / "parts").iterdir()}
    assert files == {sha(PIECES[0]), sha(PIECES[1])}
    if cipher is not None:
        assert not any(
            piece in path.read_bytes() for path in (tmp_path / "parts").iterdir() for piece in PIECES.values()
        )
    for absent in ([0], [1], [0, 1]):
        with kept.whole(request(tmp_path, {i: sha(PIECES[i]) for i in absent})) as whole:
            assert read(whole) == BODY
            assert not whole.header.absent
    with pytest.raises(Lacking) as lacking, kept.whole(request(tmp_path, {i: sha(PIECES[i]) for i in range(3)})):
        pass
    assert lacking.value.places == [2]
    assert {path.name for path in (tmp_path / "parts").iterdir()} == files
    # Another key opens nothing: it is asked for again.
    if cipher is not None:
        with (
            pytest.raises(Lacking),
            KeptParts(tmp_path / "parts", StoreCipher(bytes([1] * 32))).whole(request(tmp_path, {0: sha(PIECES[0])})),
        ):
            pass
    kept.clear()
    assert not list((tmp_path / "parts").iterdir())


@pytest.mark.parametrize(
    ("absent", "sent", "changes", "error"),
    [
        ({0: sha(PIECES[0])}, BODY, {}, "bytes of a body where the header says"),
        ({0: sha(PIECES[0])}, b"", {}, "bytes of a body where the header says"),
        ({0: sha(PIECES[0])}, None, {"tensors": TABLE[:2]}, "does not fit"),
        ({0: sha(PIECES[0])}, None, {"body_nbytes": 1 << 40}, "does not fit"),
    ],
)
def test_a_header_that_does_not_fit_its_body_is_refused(
    absent: dict[int, str], sent: bytes | None, changes: dict[str, Any], error: str, tmp_path: Path
) -> None:
    kept = KeptParts(tmp_path / "parts")
    with kept.whole(request(tmp_path)) as first:
        kept.keep(first, frozenset({0}))
    with pytest.raises(Rejected, match=error), kept.whole(request(tmp_path, absent, sent, **changes)):
        pass


def test_a_part_in_the_place_of_another_is_no_body_that_was_signed(tmp_path: Path) -> None:
    """A coordinator names another part of the same size where the whole's hash says otherwise."""
    rig = rig_of(tmp_path, folding(rounds=4))
    exchange = rig.engine.exchange
    said: list[str] = []

    def swapped(messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            absent = message.header.absent
            if message.header.kind == TRAIN and message.header.site == "A" and len(absent) == 2:
                first, second = absent
                wrong = (replace(first, sha256=second.sha256), replace(second, sha256=first.sha256))
                (reply,) = exchange([message.without(wrong)])
                said.append(str(reply.header.meta["reason"]))
            yield from exchange([message])

    rig.engine.exchange = swapped  # type: ignore[method-assign]
    rig.train()
    assert said == ["Rejected: a body whose bytes changed on the way: its hash is not the header's"]
    assert rig.journal.reports()[-1].participants == ("A", "B", "C")


def test_a_site_that_always_lacks_something_gets_all_of_it_and_no_more(tmp_path: Path) -> None:
    body = request(tmp_path).body
    assert isinstance(body, FileBody)
    message = replace(request(tmp_path), body=body).without((Part(0, sha(PIECES[0])), Part(1, sha(PIECES[1]))))
    asked: list[Message] = []

    class Greedy:
        def __init__(self, *answers: Any) -> None:
            self.answers = iter(answers)

        def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
            for each in messages:
                asked.append(each)
                yield each.reply(LACKS, meta=next(self.answers))

        def close(self) -> None:
            pass

    for answers, sizes in (
        (({LACKS: [0]}, {LACKS: [1]}, {LACKS: [1]}), [7, 807, 2007]),
        (({LACKS: [5]}, {LACKS: [0]}), [7, 2007]),
        (({LACKS: []}, {}), [7, 2007]),
        (({LACKS: [True]}, {}), [7, 2007]),
        (({LACKS: "0"}, {}), [7, 2007]),
        (({LACKS: [0], "x": 1}, {}), [7, 2007]),
    ):
        asked.clear()
        (reply,) = Filling(Greedy(*answers)).exchange([message])
        # It is an answer like any other then, and no update.
        assert reply.header.kind == LACKS
        assert [each.body.nbytes for each in asked] == sizes
        assert {each.id for each in asked} == {message.id}
        assert read(asked[-1]) == BODY


def test_a_site_lets_out_nothing_but_places_where_it_lacks_parts(tmp_path: Path) -> None:
    rig = rig_of(tmp_path, folding(rounds=3))
    for report in rig.coordinator.rounds(rig.start()):
        if report.round == 2:
            shutil.rmtree(rig.sites["A"].store.root / "parts")
    (answer,) = [s.message for s in rig.engine.sent if s.message.header.kind == LACKS]
    assert dict(answer.header.meta) == {LACKS: [5]}
    assert not answer.header.tensors
    assert answer.body.nbytes == 0
    assert [s.message.header.kind for s in rig.engine.sent if s.message.header.reply_to == answer.header.reply_to] == [
        LACKS,
        UPDATE,
    ]


def test_the_folder_of_parts_is_no_way_out(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "parts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(JournalError, match="symbolic link"):
        KeptParts(tmp_path / "parts")
