"""Messages over HTTPS: they arrive whole, over connections that break, and from those only who may send them."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hospitals.lines import SECONDS, House, cut_line, federation, make_kits, message, read, until
from wardround.errors import WardroundError
from wardround.hospitals.certificates import CertificateError, client_context, issue, make_authority
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.https import protocol
from wardround.hospitals.https.protocol import BODY, HELLO, INSTANCE, NEXT, PROGRESS, REPLY, header_sha256
from wardround.hospitals.https.seats import MOST_CONNECTIONS
from wardround.hospitals.https.server import HttpsCarrier
from wardround.hospitals.https.uploads import MOST_UPLOADS
from wardround.wire.message import MAX_HEADER, FileBody, Header, HeldBody, Message
from wardround.wire.parts import Part
from wardround.wire.tensors import TensorInfo

MB = 1_000_000
LARGE, LONG = 20 * MB, 8 * MB


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("kits"))


@pytest.fixture
def house(kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    # A site that was refused asks again soon.
    monkeypatch.setattr("wardround.hospitals.https.courier._LATER", 0.2)
    with closing(House(kits, tmp_path)) as started:
        yield started


class Raw:
    """A site that sends what it likes, with the certificate of `site`."""

    def __init__(self, house: House, site: str = "A", instance: str = "instance-raw") -> None:
        context = client_context(SiteFolder(house.kits / site).certificates)
        self.line = http.client.HTTPSConnection("127.0.0.1", house.port, context=context, timeout=SECONDS)
        self.headers = {INSTANCE: instance}

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.line.request(method, path, body, {**self.headers, **named})
        response = self.line.getresponse()
        return response.status, response.read()

    def next(self) -> Header:
        """The next message, once there is one."""
        while True:
            status, data = self.ask("GET", NEXT)
            assert status in (200, 204), data
            if status == 200:
                return Header.from_bytes(data)

    def close(self) -> None:
        self.line.close()


@pytest.fixture
def raw(house: House) -> Iterator[Callable[..., Raw]]:
    made: list[Raw] = []

    def make(*values: str) -> Raw:
        made.append(Raw(house, *values))
        return made[-1]

    yield make
    for each in made:
        each.close()


def answer(header: Header, body: bytes) -> Message:
    """A reply with a body to a request."""
    held = HeldBody(body)
    reply = Message(header).reply("update").header
    return Message(replace(reply, body_nbytes=len(body), body_sha256=held.sha256), held)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Whole ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 10, LARGE])
def test_a_message_and_its_reply_arrive_whole_and_leave_nothing(house: House, nbytes: int) -> None:
    house.site()
    body = os.urandom(nbytes)
    request = message("A", body)
    reply = house.exchanged(request)[request.id]
    assert reply.header.kind == "update"
    assert read(reply) == body
    until(lambda: leftovers(house.folder / "A/spool/https") == [])
    assert leftovers(house.folder / "spool/https") == []


def test_several_messages_of_several_sites_are_at_work_at_once(house: House) -> None:
    together = threading.Barrier(9, timeout=SECONDS)

    def handle(request: Message, progress: Callable[[Header], None]) -> Message:
        together.wait()
        return answer(request.header, b"".join(bytes(chunk) for chunk in request.body.chunks()))

    for site in "ABC":
        house.site(site, handle=handle)
    requests = [message(site, os.urandom(MB), round=n) for site in "ABC" for n in range(3)]
    replies = house.exchanged(*requests)
    for request in requests:
        assert read(replies[request.id]) == read(request)


def test_two_messages_with_one_body_both_get_it(house: House) -> None:
    house.site()
    body = os.urandom(MB)
    requests = [message("A", body, round=n) for n in range(4)]
    replies = house.exchanged(*requests)
    assert all(read(replies[request.id]) == body for request in requests)


def test_what_is_absent_of_a_body_does_not_travel(house: House, tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(bytes(range(40)))
    tensors = (TensorInfo("a", "float32", (4,)), TensorInfo("b", "float32", (6,)))
    file = FileBody(tmp_path / "model", 40)
    whole = Message(replace(message("A", bytes(range(40))).header, tensors=tensors), file)
    seen: list[bytes] = []

    def handle(request: Message, progress: Callable[[Header], None]) -> Message:
        seen.append(b"".join(bytes(chunk) for chunk in request.body.chunks()))
        return request.reply("update")

    house.site(handle=handle)
    house.exchanged(whole.without((Part(0, "0" * 64),)))
    # The same request, now with all of its body: its id is the same, and it is another message on the line.
    house.exchanged(whole)
    assert seen == [bytes(range(16, 40)), bytes(range(40))]


def test_progress_arrives_and_the_latest_counts(house: House) -> None:
    def handle(request: Message, progress: Callable[[Header], None]) -> Message:
        for step in range(100):
            progress(replace(request.reply("progress").header, meta={"step": step, "steps": 100}))
        until(lambda: not house.desk.progress.empty())
        return request.reply("done")

    house.site(handle=handle)
    house.exchanged(message("A"))
    assert house.desk.progress.get(timeout=SECONDS).site == "A"
    assert house.desk.progress.qsize() < 10


# Cut --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["down", pytest.param("up", marks=pytest.mark.slow)])
def test_a_transfer_that_is_cut_goes_on_where_it_was(house: House, way: str) -> None:
    body = os.urandom(LONG)
    with cut_line(house.port) as line:
        house.site(port=line.port)
        line.cuts[way] = [2 * MB, 4 * MB, 6 * MB]
        request = message("A", body)
        assert read(house.exchanged(request)[request.id]) == body
        assert line.cuts[way] == []
        # What was under way on the line when it was cut travels again, and little else.
        assert LONG < line.counts[way] < LONG + 3 * MB
        house.stop_site()


def test_a_site_that_is_started_again_goes_on_with_a_body(house: House) -> None:
    body = os.urandom(LONG)
    with cut_line(house.port) as line:
        cut = threading.Event()
        line.cuts["down"] = [4 * MB]
        line.cut_now = cut.set
        house.site(port=line.port)
        request = message("A", body)
        house.desk.ask(request)
        assert cut.wait(SECONDS)
        house.stop_site()
        house.site(port=line.port, instance="another")
        assert read(house.desk.replies.get(timeout=SECONDS)) == body
        assert line.counts["down"] < LONG + 3 * MB
        house.stop_site()


@pytest.mark.slow
def test_a_coordinator_that_is_started_again_goes_on_with_a_reply(house: House) -> None:
    body = os.urandom(LONG)
    with cut_line(house.port) as line:
        cut = threading.Event()
        line.cuts["up"] = [4 * MB]
        line.cut_now = cut.set
        courier = house.site(port=line.port)
        request = message("A", body)
        house.desk.ask(request)
        assert cut.wait(SECONDS)
        house.carrier.close()
        until(lambda: courier.state.startswith("not connected: the coordinator cannot be reached"))
        house.serve()
        assert read(house.desk.replies.get(timeout=SECONDS)) == body
        assert line.counts["up"] < LONG + 3 * MB
        until(lambda: courier.state == "connected")
        house.stop_site()


def test_a_message_that_is_handed_out_again_while_it_is_at_work_is_done_once(house: House) -> None:
    begun, go = threading.Event(), threading.Event()
    count = []

    def handle(request: Message, progress: Callable[[Header], None]) -> Message:
        count.append(request.id)
        begun.set()
        assert go.wait(SECONDS)
        return request.reply("done")

    house.site(handle=handle)
    request = message("A")
    house.desk.ask(request)
    assert begun.wait(SECONDS)
    house.desk.lost("A", "instance-A")
    until(lambda: len(house.desk.handed) == 2)
    go.set()
    assert house.desk.replies.get(timeout=SECONDS).header.reply_to == request.id
    assert count == [request.id]


def test_the_same_question_is_answered_again_once_it_was_answered(house: House) -> None:
    house.site()
    request = message("A", b"again")
    for _ in range(20):
        assert read(house.exchanged(request)[request.id]) == b"again"


# Who --------------------------------------------------------------------------------------------------------------


def test_a_site_gets_its_own_messages_alone(house: House, raw: Callable[..., Raw]) -> None:
    house.desk.ask(message("A", b"for A"))
    first, other = raw("A"), raw("B")
    header = first.next()
    name = header_sha256(header)
    assert other.ask("GET", HELLO)[0] == 204
    # The second site knows what the first was asked, and gets nothing for it.
    assert other.ask("GET", BODY + name, Range="bytes=0-4")[0] == 404
    assert other.ask("POST", REPLY, answer(header, b"false").header.to_bytes())[0] == 403
    own = replace(answer(header, b"false").header, site="B")
    assert other.ask("POST", REPLY, own.to_bytes())[0] == 410
    assert other.ask("POST", PROGRESS, replace(header, kind="progress").to_bytes())[0] == 403
    assert first.ask("GET", BODY + name, Range="bytes=0-4") == (206, b"for A")
    assert house.desk.replies.empty()


def test_a_twin_is_refused_until_the_first_is_gone(house: House) -> None:
    first = house.site()
    until(lambda: first.state == "connected")
    twin = house.site(instance="twin")
    until(lambda: "connected already" in twin.state)
    assert twin.state.startswith("refused")
    request = message("A", b"one")
    house.exchanged(request)
    house.stop_site(0)
    until(lambda: twin.state == "connected")
    assert read(house.exchanged(request)[request.id]) == b"one"


def test_a_site_that_the_federation_does_not_know_is_refused(house: House, tmp_path: Path) -> None:
    issue(house.kits / "root", tmp_path / "D-kit", "D")
    courier = house.site("D", certificates=tmp_path / "D-kit")
    until(lambda: "D is no site of this federation" in courier.state)


def test_an_expired_certificate_says_so_and_its_renewal_is_used(house: House, tmp_path: Path) -> None:
    issue(house.kits / "root", tmp_path / "kit", "A", days=0)
    courier = house.site(certificates=tmp_path / "kit")
    until(lambda: "the certificate expired on" in courier.state)
    issue(house.kits / "root", tmp_path / "kit", "A")
    until(lambda: courier.state == "connected")


def test_another_federations_site_is_refused_and_says_so(house: House, tmp_path: Path) -> None:
    make_authority(tmp_path / "root", "two")
    issue(tmp_path / "root", tmp_path / "kit", "A")
    courier = house.site(certificates=tmp_path / "kit")
    until(lambda: "of another federation" in courier.state)
    house.desk.ask(message("A"))
    assert house.desk.handed == []


def test_a_coordinator_uses_its_new_certificate_without_a_new_start(house: House, tmp_path: Path) -> None:
    house.carrier.close()
    shutil.copytree(house.kits / "coordinator", tmp_path / "coordinator")
    rules = federation(house.port)
    with closing(HttpsCarrier(house.desk, rules, tmp_path / "coordinator", tmp_path / "spool")) as carrier:
        carrier.start()
        issue(house.kits / "root", tmp_path / "coordinator", "coordinator", host="localhost")
        courier = house.site(host="localhost")
        until(lambda: courier.state == "connected")
        (tmp_path / "coordinator/own.crt").write_text("spoilt")
        other = house.site("B", host="localhost")
        until(lambda: other.state == "connected")
        house.stop_site()
        house.stop_site()


def test_a_coordinator_does_not_start_without_certificate_or_port(house: House, tmp_path: Path) -> None:
    again = HttpsCarrier(house.desk, federation(house.port), house.kits / "coordinator", tmp_path)
    with pytest.raises(WardroundError, match=f"cannot listen on port {house.port} .*; end the program that has it"):
        again.start()
    with pytest.raises(CertificateError, match="put the files of the kit in place"):
        HttpsCarrier(house.desk, federation(house.port), tmp_path / "none", tmp_path).start()
    again.close()


def test_a_site_connects_to_its_coordinator_and_to_no_other(house: House) -> None:
    called: list[tuple[str, object]] = []
    watched = {"socket.connect", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getaddrinfo", "socket.sendto"}
    on = True

    def watch(event: str, values: tuple[object, ...]) -> None:
        if on and event in watched:
            called.append((event, values[:2] if event == "socket.getaddrinfo" else values[-1]))

    sys.addaudithook(watch)
    house.carrier.close()
    house.serve()
    house.site()
    request = message("A", b"body")
    house.exchanged(request)
    on = False
    here = ("127.0.0.1", house.port)
    assert set(called) == {("socket.connect", here), ("socket.getaddrinfo", here)}


# Hostile ----------------------------------------------------------------------------------------------------------


def test_garbage_and_silence_do_not_keep_others_waiting(house: House) -> None:
    with closing(socket.create_connection(("127.0.0.1", house.port))) as silent:
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(1000), b"\x16\x03\x01\xff\xff" + bytes(100)):
            with (
                suppress(OSError),
                closing(socket.create_connection(("127.0.0.1", house.port), timeout=SECONDS)) as stranger,
            ):
                stranger.sendall(garbage)
                stranger.shutdown(socket.SHUT_WR)
                while stranger.recv(1000):
                    pass
        house.site()
        request = message("A", b"body")
        assert read(house.exchanged(request)[request.id]) == b"body"
        silent.close()


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", NEXT, {"X": "x" * 70_000}, 431),
        ("GET", "/" + "x" * 70_000, {}, 414),
        ("GET", "/../etc/passwd", {}, 404),
        ("GET", NEXT, {INSTANCE: "../x"}, 400),
        ("POST", REPLY, {"Content-Length": str(MAX_HEADER + 1)}, 413),
        ("POST", REPLY, {"Content-Length": "-1"}, 411),
        ("POST", REPLY, {"Content-Length": "9" * 30}, 411),
        ("POST", REPLY, {"Transfer-Encoding": "chunked"}, 400),
        ("POST", REPLY, {"Content-Length": "0"}, 400),
        ("PUT", f"{REPLY}/{'0' * 64}", {"Content-Length": "5"}, 404),
        ("DELETE", REPLY, {}, 501),
    ],
)
def test_a_request_that_no_site_makes_is_refused(
    house: House, raw: Callable[..., Raw], method: str, path: str, headers: dict[str, str], status: int
) -> None:
    line = raw().line
    line.putrequest(method, path)
    for name, value in ({INSTANCE: "instance-raw"} | headers).items():
        line.putheader(name, value)
    line.endheaders()
    assert line.getresponse().status == status
    # The next site is served all the same.
    house.site("B")
    house.exchanged(message("B"))


def _begun(house: House, site: Raw, body: bytes) -> Message:
    """A reply whose header was sent."""
    house.desk.ask(message("A"))
    reply = answer(site.next(), body)
    status, data = site.ask("POST", REPLY, reply.header.to_bytes())
    assert (status, json.loads(data)) == (200, {"have": 0})
    return reply


@pytest.mark.parametrize(
    ("sent", "content_range", "status"),
    [
        (b"0123456789X", "bytes 0-10/11", 400),
        (b"0123456789X", "bytes 0-10/10", 400),
        (b"0123456789X", "bytes 0-9/10", 400),
        (b"01234", "bytes 5-9/10", 416),
        (b"01234", "bytes 0-9/10", 400),
        (b"01234", "bytes 4-0/10", 400),
        (b"01234", "", 400),
    ],
)
def test_a_piece_that_is_none_of_the_body_is_refused(
    house: House, raw: Callable[..., Raw], sent: bytes, content_range: str, status: int
) -> None:
    site = raw()
    reply = _begun(house, site, b"0123456789")
    path = f"{REPLY}/{header_sha256(reply.header)}"
    assert site.ask("PUT", path, sent, Content_Range=content_range)[0] == status
    # Nothing of it counts, and the right pieces are taken.
    assert site.ask("PUT", path, b"0123", Content_Range="bytes 0-3/10")[0] == 204
    status, data = site.ask("POST", REPLY, reply.header.to_bytes())
    assert (status, json.loads(data)) == (200, {"have": 4})
    assert site.ask("PUT", path, b"456789", Content_Range="bytes 4-9/10")[0] == 204
    assert read(house.desk.replies.get(timeout=SECONDS)) == b"0123456789"


def test_a_reply_with_other_bytes_than_its_header_says_is_asked_for_again(
    house: House, raw: Callable[..., Raw]
) -> None:
    site = raw()
    reply = _begun(house, site, b"0123456789")
    path = f"{REPLY}/{header_sha256(reply.header)}"
    assert site.ask("PUT", path, b"012345678X", Content_Range="bytes 0-9/10")[0] == 204
    assert house.desk.refused == [reply.header.reply_to]
    assert site.next().site == "A"
    assert json.loads(site.ask("POST", REPLY, reply.header.to_bytes())[1]) == {"have": 0}
    assert site.ask("PUT", path, b"0123456789", Content_Range="bytes 0-9/10")[0] == 204
    assert read(house.desk.replies.get(timeout=SECONDS)) == b"0123456789"


def test_a_reply_that_is_too_long_or_was_not_asked_for_is_refused_unread(house: House, raw: Callable[..., Raw]) -> None:
    house.desk.ask(message("A"))
    site = raw()
    header = answer(site.next(), b"x").header
    too_long = replace(header, body_nbytes=federation(1).largest_nbytes + 1)
    status, text = site.ask("POST", REPLY, too_long.to_bytes())
    assert (status, b"largest_gb" in text) == (413, True)
    assert site.ask("POST", REPLY, replace(header, reply_to="0" * 64).to_bytes())[0] == 410
    assert site.ask("POST", REPLY, b"no header")[0] == 400
    assert leftovers(house.folder / "spool/https") == []


@pytest.mark.parametrize("asked", ["", "bytes=0-", "bytes=3-2", "bytes=0-1,3-4", f"bytes=0-{protocol.SEGMENT}", "x"])
def test_a_span_that_is_none_is_refused(house: House, raw: Callable[..., Raw], asked: str) -> None:
    house.desk.ask(message("A", b"12345"))
    site = raw()
    path = BODY + header_sha256(site.next())
    assert site.ask("GET", path, Range=asked)[0] == 400
    assert site.ask("GET", path, Range="bytes=3-5")[0] == 416
    assert site.ask("GET", path, Range="bytes=3-4") == (206, b"45")


def test_a_body_whose_file_is_gone_is_not_asked_for_any_more(house: House, tmp_path: Path) -> None:
    gone = message("A", b"12345")
    courier = house.site()
    house.desk.ask(Message(gone.header, FileBody(tmp_path / "gone", 5)))
    house.exchanged(message("A", b"next"))
    assert courier.state == "connected"


def test_a_body_with_other_bytes_than_its_header_says_is_not_handled(house: House) -> None:
    seen: list[str] = []

    def handle(request: Message, progress: Callable[[Header], None]) -> Message:
        seen.append(request.id)
        return request.reply("done")

    courier = house.site(handle=handle)
    right = message("A", b"12345")
    house.desk.ask(Message(right.header, HeldBody(b"1234X")))
    until(lambda: "other bytes than its header says" in courier.state)
    assert seen == []
    house.exchanged(message("A", b"next"))
    until(lambda: courier.state == "connected")


def test_a_reply_whose_file_is_gone_is_said(house: House, tmp_path: Path) -> None:
    def handle(request: Message, progress: Callable[[Header], None]) -> Message:
        reply = answer(request.header, bytes(MB))
        return Message(reply.header, FileBody(tmp_path / "gone", MB)) if request.body.nbytes else reply

    courier = house.site(handle=handle)
    house.desk.ask(message("A", b"12345"))
    until(lambda: "the file of a reply cannot be read (FileNotFoundError)" in courier.state)
    house.exchanged(message("A"))
    until(lambda: courier.state == "connected")


def test_a_message_that_is_too_long_for_a_site_is_not_fetched(house: House) -> None:
    courier = house.site(largest_gb=1e-6)
    house.desk.ask(message("A", bytes(1001)))
    until(lambda: "allows 1000; both should have the same `largest_gb`" in courier.state)
    house.exchanged(message("A", bytes(1000)))


def test_a_full_disk_is_said_and_waited_for(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    full = [house.folder / "A/spool/https", house.folder / "spool/https"]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 0 if Path(path) in full else 1 << 40))
    courier = house.site()
    house.desk.ask(message("A", bytes(5 * MB)))
    until(lambda: "; a body of 5 MB does not fit on the disk" in courier.state)
    full.pop(0)
    until(lambda: "; at the coordinator: a body of 5 MB does not fit" in courier.state)
    full.pop(0)
    assert house.desk.replies.get(timeout=SECONDS).body.nbytes == 5 * MB
    until(lambda: courier.state == "connected")


def test_a_site_has_no_more_connections_than_it_may(house: House, raw: Callable[..., Raw]) -> None:
    courier = house.site()
    until(lambda: courier.state == "connected")
    many = [raw("A", "instance-A") for _ in range(MOST_CONNECTIONS + 4)]
    for each in many:
        assert each.ask("POST", PROGRESS, replace(message("A").header, kind="progress").to_bytes())[0] == 204
    ended = 0
    for each in many[:4]:
        # A request on a connection that was ended makes the client of the library connect again: look at the socket.
        each.line.sock.settimeout(SECONDS)
        ended += each.line.sock.recv(1) == b""
    assert ended == 4
    assert courier.state == "connected"
    house.exchanged(message("A", b"served"))


def test_a_site_has_no_more_replies_under_way_than_it_may(house: House, raw: Callable[..., Raw]) -> None:
    site = raw()
    replies = []
    for n in range(MOST_UPLOADS + 2):
        house.desk.ask(message("A", round=n))
        replies.append(answer(site.next(), b"0123456789"))
        site.ask("POST", REPLY, replies[-1].header.to_bytes())
    assert len(leftovers(house.folder / "spool/https")) == MOST_UPLOADS
    # One that gave way begins anew.
    path = f"{REPLY}/{header_sha256(replies[0].header)}"
    assert site.ask("PUT", path, b"0123456789", Content_Range="bytes 0-9/10")[0] == 404
    assert json.loads(raw("A").ask("POST", REPLY, replies[0].header.to_bytes())[1]) == {"have": 0}
