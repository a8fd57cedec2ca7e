"""Rounds of a real study through a hub whose lines break: the model is that of one machine, to the last bit."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.federation.rig import Rig
from tests.protection.test_secure_rounds import SecureRig, clear, study_of
from wardround.errors import Rejected
from wardround.federation.asking import Patience
from wardround.federation.asynchronous import AsynchronousCoordinator
from wardround.federation.coordinator import Coordinator
from wardround.federation.exchange import TRAIN, Engine
from wardround.hospitals.coordinator.hub import Hub
from wardround.hospitals.federation import Deadlines
from wardround.hospitals.signing import signed
from wardround.protection.identity import Identity
from wardround.wire.message import FileBody, Message, write_body

SITES = "ABCD"
STRANGER = Identity.generate()
#: Replies of a site in a row that go wrong at most, so that none is given up.
BAD = 2


class Line:
    """Carries a site's messages in a thread, badly: replies are lost, bent and sent twice, and connections break."""

    def __init__(self, hub: Hub, site: str, key: Identity, handle: Callable[[Message], Message], spool: Path) -> None:
        self._hub, self._site, self._key, self._handle, self._spool = hub, site, key, handle, spool
        self._random = random.Random(site)
        self._count = self._bad = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(20.0)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            request = self._hub.take(self._site, "one", 0.2)
            if request is None:
                continue
            with pytest.raises(Rejected):
                self._hub.attach(self._site, "twin")
            reply = self._handle(request)
            how = self._random.choice(["well", "twice", "lost", "stranger", "bytes"])
            self._bad = self._bad + 1 if how in ("lost", "stranger", "bytes") else 0
            if self._bad > BAD:
                how, self._bad = "well", 0
            if how == "lost":
                self._hub.lost(self._site, "one")
                continue
            sent = self._spooled(reply, STRANGER if how == "stranger" else self._key)
            if how == "bytes" and isinstance(sent.body, FileBody):
                sent.body.path.write_bytes(b"\0" * sent.body.nbytes)
            self._hub.answered(self._site, "one", sent)
            if how == "twice":
                self._hub.answered(self._site, "one", self._spooled(reply, self._key))

    def _spooled(self, reply: Message, key: Identity) -> Message:
        """As it lies in the spool of a carrier."""
        if not reply.header.body_nbytes:
            return signed(reply, key)
        self._count += 1
        body, _ = write_body(self._spool / f"{self._site}{self._count}", reply.body.chunks())
        return signed(Message(reply.header, body), key)


@contextmanager
def lines(rig: Rig, folder: Path, wait: Callable[[Message], object] = lambda message: None) -> Iterator[Engine]:
    """The engine of a study whose sites are behind bad lines, and `wait` before they are at work on a message."""
    keys = {site: Identity.generate() for site in SITES}

    def public(site: str) -> bytes | None:
        return keys[site].public if site in keys else None

    hub = Hub(folder, public, Deadlines(reply=60.0), 1 << 20, proof=lambda *_: True)
    handles = {site: (lambda m, site=site: rig.sites[site].handle(m)) for site in SITES}
    turn = threading.Lock()

    def handle(message: Message) -> Message:
        wait(message)
        # One model serves all sites of this process.
        with turn:
            return handles[message.header.site](message)

    threads = [Line(hub, site, key, handle, folder) for site, key in keys.items()]
    try:
        yield hub.engine()
    finally:
        hub.close()
        for thread in threads:
            thread.close()
        assert {event.site for event in hub.events} <= set(SITES)
        # Nothing is left of any body, used or refused.
        gc.collect()
        assert [path for path in folder.rglob("*") if path.is_file()] == []


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    return clear(study_of(), tmp_path_factory.mktemp("plain")).train().public_sha256


@pytest.mark.parametrize("secure", [False, True])
def test_a_study_over_bad_lines_comes_to_the_same_model(tmp_path: Path, expected: str, secure: bool) -> None:
    study = study_of()
    rig: Rig = SecureRig(study, tmp_path) if secure else clear(study, tmp_path)
    protocol = rig.coordinator._protocol
    with lines(rig, tmp_path / "spool") as engine:
        plan = rig.host.plan("federated")
        rig.coordinator = Coordinator(plan, rig.method, engine, rig.journal, protocol, Patience(2, 0.1))
        assert rig.train().public_sha256 == expected
        reports = rig.journal.reports()
        del engine
    assert [("".join(r.participants), dict(r.missing)) for r in reports] == [(SITES, {})] * 3


def test_rounds_go_on_over_bad_lines_while_a_site_is_at_work(tmp_path: Path) -> None:
    study = study_of(schedule={"rounds": 4, "asynchronous": {"buffer": 3}})
    rig, slow = clear(study, tmp_path), threading.Event()

    def wait(message: Message) -> None:
        if message.header.site == "D" and message.header.kind == TRAIN:
            assert slow.wait(60.0)

    with lines(rig, tmp_path / "spool", wait) as engine:
        coordinator = AsynchronousCoordinator(rig.host.plan("federated"), rig.method, engine, rig.journal)
        for report in coordinator.rounds(coordinator.start(lambda: rig.host.initial(rig.arm_spec))):
            if report.round == 2:
                slow.set()
        reports = rig.journal.reports()
        del engine, coordinator
    assert [(r.participants, dict(r.at_work)) for r in reports[:2]] == [(("A", "B", "C"), {"D": 1})] * 2
    assert len(reports) == 4
    assert all(len(r.participants) == 3 for r in reports)
    assert reports[-1].validated == ("A", "B", "C", "D")
