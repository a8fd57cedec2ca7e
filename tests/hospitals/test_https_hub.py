"""A study asks hospitals through the hub over HTTPS; the coordinator's process is killed, and goes on."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hospitals.lines import SECONDS, cut_line, federation, free_port, make_kits, message, read, until
from wardround.hospitals.coordinator.hub import Hub
from wardround.hospitals.federation import Deadlines
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.https.courier import Courier, Handle
from wardround.hospitals.https.server import HttpsCarrier
from wardround.hospitals.signing import signed
from wardround.protection.identity import Identity
from wardround.wire.message import Header, HeldBody, Message

KEYS = {site: Identity.generate() for site in "ABC"}
LARGE = 8_000_000


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("kits"))


def answering(body: bytes, key: Identity) -> Handle:
    """Answers each message with these bytes, signed, after a step of progress."""

    def handle(request: Message, progress: Callable[[Header], None]) -> Message:
        progress(replace(request.reply("progress").header, meta={"step": 1, "steps": 2}))
        held = HeldBody(body)
        header = replace(request.reply("update").header, body_nbytes=len(body), body_sha256=held.sha256)
        return signed(Message(header, held), key)

    return handle


@contextmanager
def site(kits: Path, folder: Path, port: int, name: str, handle: Handle, instance: str = "one") -> Iterator[Courier]:
    """A site's courier, in a thread, for as long as it is needed."""
    certificates = SiteFolder(folder / name).certificates
    certificates.parent.mkdir(exist_ok=True)
    if not certificates.exists():
        certificates.symlink_to(SiteFolder(kits / name).certificates)
    courier, stop = Courier(federation(port), SiteFolder(folder / name), name, instance, handle), threading.Event()
    thread = threading.Thread(target=courier.run, args=(stop,), daemon=True)
    thread.start()
    try:
        yield courier
    finally:
        stop.set()
        thread.join(SECONDS)
        assert not thread.is_alive()


@contextmanager
def coordinator(kits: Path, folder: Path, port: int) -> Iterator[Hub]:
    """A hub that HTTPS serves."""
    rules = federation(port)
    spool = folder / "spool"
    hub = Hub(
        spool,
        lambda name: KEYS[name].public if name in KEYS else None,
        Deadlines(),
        rules.largest_nbytes,
        proof=lambda *_: True,
    )
    carrier = HttpsCarrier(hub, rules, kits / "coordinator", spool)
    carrier.start()
    try:
        yield hub
    finally:
        carrier.close()
        hub.close()


def test_a_study_asks_three_sites_and_gets_what_they_signed(kits: Path, tmp_path: Path) -> None:
    port = free_port()
    bodies = {name: os.urandom(1_000_000) for name in "ABC"}
    steps: list[tuple[object, ...]] = []
    with ExitStack() as house:
        hub = house.enter_context(coordinator(kits, tmp_path, port))
        for name in "ABC":
            house.enter_context(site(kits, tmp_path, port, name, answering(bodies[name], KEYS[name])))
        engine = hub.engine(lambda *values: steps.append(values))
        for number in range(3):
            requests = [message(name, b"model", round=number) for name in "ABC"]
            for reply in engine.exchange(requests):
                assert b"".join(bytes(chunk) for chunk in reply.body.chunks()) == bodies[reply.header.site]
        assert {state.state for state in hub.presence().values()} == {"present"}
        assert hub.events == []
        del reply
        gc.collect()
        assert [path for path in (tmp_path / "spool").rglob("*") if path.is_file()] == []
    assert {step[1] for step in steps} <= set("ABC")


def test_a_site_with_another_key_answers_nothing(kits: Path, tmp_path: Path) -> None:
    port = free_port()
    with ExitStack() as house:
        hub = house.enter_context(coordinator(kits, tmp_path, port))
        house.enter_context(site(kits, tmp_path, port, "A", answering(b"false", Identity.generate())))
        (reply,) = hub.engine().exchange([message("A")])
        assert reply.header.kind == "error"
        assert "did not sign" in reply.header.meta["reason"]


@pytest.mark.slow
def test_a_twin_is_let_in_once_the_first_is_gone(kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wardround.hospitals.https.courier._LATER", 0.4)
    port = free_port()
    with ExitStack() as house:
        hub = house.enter_context(coordinator(kits, tmp_path, port))
        first = ExitStack()
        courier = first.enter_context(site(kits, tmp_path, port, "A", answering(b"first", KEYS["A"])))
        until(lambda: courier.state == "connected")
        twin = house.enter_context(site(kits, tmp_path, port, "A", answering(b"twin", KEYS["A"]), "two"))
        until(lambda: twin.state.startswith("refused: site A is connected already"))
        (reply,) = hub.engine().exchange([message("A")])
        assert read(reply) == b"first"
        first.close()
        until(lambda: twin.state == "connected")
        (reply,) = hub.engine().exchange([message("A")])
        assert read(reply) == b"twin"
        assert [event.site for event in hub.events] == ["A"]


@pytest.mark.slow
def test_a_coordinator_that_is_killed_gets_the_rest_of_a_reply(kits: Path, tmp_path: Path) -> None:
    port, body = free_port(), os.urandom(LARGE)
    command = [sys.executable, "-m", "tests.hospitals.coordinator", str(kits), str(tmp_path), str(port)]
    command.append(KEYS["A"].public.hex())
    count: list[str] = []
    answer = answering(body, KEYS["A"])

    def handle(request: Message, progress: Callable[[Header], None]) -> Message:
        count.append(request.id)
        return answer(request, progress)

    with cut_line(port) as line:
        killed = threading.Event()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:

            def kill() -> None:
                first.kill()
                first.wait()
                killed.set()

            line.cuts["up"] = [4_000_000]
            line.cut_now = kill
            try:
                with site(kits, tmp_path, line.port, "A", handle) as courier:
                    assert killed.wait(SECONDS)
                    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as second:
                        try:
                            said, _ = second.communicate(timeout=2 * SECONDS)
                        finally:
                            second.kill()
                    assert said.split() == ["update", HeldBody(body).sha256]
                    assert courier.state != "stopped"
            finally:
                first.kill()
        assert line.counts["up"] < LARGE + 3_000_000
    assert set(count) == {message("A").id}
