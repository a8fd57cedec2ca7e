"""The kits of NVFlare are closed, the ends of a line are small, and its socket lets only the right relay speak."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.hospitals.hubs import KEYS, Asking, House, message
from wardround.engines.frames import SharedBodies
from wardround.errors import StudyError, WardroundError, WireError
from wardround.hospitals.certificates import make_authority
from wardround.hospitals.federation import Federation
from wardround.hospitals.folders import CoordinatorFolder
from wardround.hospitals.nvflare.jobs import write_job
from wardround.hospitals.nvflare.names import HELLO, LOST, instance_of
from wardround.hospitals.nvflare.provision import SERVER_NAME, admin_kit, provision, server_workspace, site_kit
from wardround.hospitals.nvflare.switchboard import Switchboard
from wardround.hospitals.socket_server import connect
from wardround.wire.message import Header, Message


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> tuple[CoordinatorFolder, Federation]:
    pytest.importorskip("nvflare", reason="NVFlare is not installed")
    folder = CoordinatorFolder(tmp_path_factory.mktemp("kits"))
    make_authority(folder.authority, "demo")
    federation = Federation(name="demo", host="hub.example.org", port=8443, root_key="0" * 64)
    for site in (None, "Aachen", "Bonn"):
        provision(folder, federation, folder.authority, site)
    return folder, federation


def test_kits_are_of_the_federations_own_authority(kits: tuple[CoordinatorFolder, Federation]) -> None:
    folder, _ = kits
    root = x509.load_pem_x509_certificate((folder.authority / "ca.crt").read_bytes())
    for kit, name, who in (
        (server_workspace(folder), "server", SERVER_NAME),
        (admin_kit(folder), "client", "coordinator@wardround.invalid"),
        (site_kit(folder, "Aachen"), "client", "Aachen"),
    ):
        certificate = x509.load_pem_x509_certificate((kit / "startup" / f"{name}.crt").read_bytes())
        certificate.verify_directly_issued_by(root)
        assert certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value == who
        assert (kit / "startup" / f"{name}.key").stat().st_mode & 0o77 == 0
        assert (kit / "startup" / "rootCA.pem").read_bytes() == (folder.authority / "ca.crt").read_bytes()
    kept = b"".join(path.read_bytes() for path in folder.nvflare.rglob("*") if path.is_file())
    assert (folder.authority / "ca.key").read_bytes() not in kept
    assert sorted(path.name for path in folder.nvflare.iterdir()) == ["admin", "server", "sites"]


def test_another_site_leaves_all_other_kits_as_they_are(kits: tuple[CoordinatorFolder, Federation]) -> None:
    folder, federation = kits
    before = {path: path.read_bytes() for path in folder.nvflare.rglob("*") if path.is_file()}
    provision(folder, federation, folder.authority, "Celle")
    assert before.items() <= {p: p.read_bytes() for p in folder.nvflare.rglob("*") if p.is_file()}.items()


def test_a_site_lets_no_code_no_other_class_no_shell_in_and_no_log_out(
    kits: tuple[CoordinatorFolder, Federation],
) -> None:
    folder, _ = kits
    for kit in (site_kit(folder, "Aachen"), server_workspace(folder)):
        resources, policy = read(kit / "local" / "resources.json"), read(kit / "local" / "authorization.json")
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert resources["class_allow_list"] == ["wardround.hospitals.nvflare."]
        for role, rights in policy["permissions"].items():
            assert {rights["byoc"], rights["shell_commands"], rights["operate"], rights["download_job"]} == {"none"}
            assert role == "lead" or set(rights.values()) == {"none"}
        assert read(next(kit.glob("startup/fed_[sc]*.json")))["require_signed_jobs"] is True
    site = read(site_kit(folder, "Aachen") / "local" / "resources.json")
    assert site["allow_log_streaming"] is False
    assert "site_log_streamer" not in {each["id"] for each in site["components"]}
    assert "/tmp/nvflare" not in (server_workspace(folder) / "local" / "resources.json").read_text()


def test_there_is_one_port(kits: tuple[CoordinatorFolder, Federation]) -> None:
    folder, federation = kits
    server = read(server_workspace(folder) / "startup" / "fed_server.json")["servers"][0]
    assert server["admin_port"] == federation.port
    assert server["service"]["target"].endswith(f":{federation.port}")
    client = read(site_kit(folder, "Bonn") / "startup" / "fed_client.json")
    assert client["servers"][0]["service"]["target"] == f"{federation.host}:{federation.port}"


@pytest.mark.parametrize("name", [SERVER_NAME, "a b", "a/b", "../x"])
def test_a_name_that_nvflare_does_not_take_is_refused(kits: tuple[CoordinatorFolder, Federation], name: str) -> None:
    folder, federation = kits
    with pytest.raises(StudyError):
        provision(folder, federation, folder.authority, name)
    assert [path.name for path in (folder.nvflare / "sites").iterdir() if path.name[0] not in "ABC"] == []


def test_a_job_has_two_classes_and_nothing_of_a_study(tmp_path: Path) -> None:
    folder = write_job(tmp_path / "line-A", "A")
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == {
        "meta.json",
        "app/config/config_fed_server.json",
        "app/config/config_fed_client.json",
    }
    assert read(folder / "meta.json")["deploy_map"] == {"app": ["server", "A"]}


def test_both_ends_of_a_line_are_without_torch() -> None:
    pytest.importorskip("nvflare", reason="NVFlare is not installed")
    code = (
        "import sys, wardround.hospitals.nvflare.relay, wardround.hospitals.nvflare.proxy;"
        "heavy = {'torch', 'nibabel', 'pydicom', 'scipy', 'pydantic'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("site", ["", "a b", "../x", 7, None, "x" * 65])
def test_a_relay_checks_what_a_job_gives_it(site: Any) -> None:
    pytest.importorskip("nvflare", reason="NVFlare is not installed")
    from wardround.hospitals.nvflare.proxy import Proxy
    from wardround.hospitals.nvflare.relay import Relay

    with pytest.raises(ValueError, match="name of a site"):
        Relay(site)
    with pytest.raises(TypeError):
        Proxy(site)


@pytest.mark.parametrize("value", [None, 7, "a b", "x" * 129, "../x", "\n"])
def test_an_instance_is_a_short_text(value: Any) -> None:
    with pytest.raises(WireError):
        instance_of(value)


class Line:
    """A relay as the coordinator's socket sees it."""

    def __init__(self, path: Path) -> None:
        self._socket = connect(path)
        self._socket.settimeout(5.0)
        self.ins, self.outs = self._socket.makefile("rb"), self._socket.makefile("wb")

    def say(self, message: Message) -> None:
        SharedBodies().write(self.outs, message)

    def hello(self, site: str, instance: str, job: str = "job") -> None:
        self.say(Message(Header(HELLO, "", site, meta={"job": job, "instance": instance})))

    def hear(self) -> Message | None:
        return SharedBodies().read(self.ins)

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        for each in (self.outs, self.ins, self._socket):
            with suppress(OSError):
                each.close()


@pytest.fixture
def board(tmp_path: Path) -> Any:
    house = House(tmp_path / "spool")
    board = Switchboard(house.hub, tmp_path / "hub.sock", lambda site: "job" if site in KEYS else None)
    board.start()
    yield house, tmp_path / "hub.sock"
    board.close()
    house.hub.close()


def test_a_relay_gets_what_its_site_is_asked_and_again_what_was_lost(board: Any) -> None:
    house, path = board
    request = message("A")
    asking = Asking(house.hub.engine(), [request])
    with Line(path) as first:
        first.hello("A", "one")
        assert first.hear() == request
    with Line(path) as second:
        second.hello("A", "one")
        assert second.hear() == request
        second.say(Message(Header(LOST, "", "A")))
        assert second.hear() == request
        second.say(house.reply(request))
        assert [reply.header.kind for reply in asking.done()] == ["update"]


@pytest.mark.parametrize(("site", "job"), [("A", "another"), ("X", "job"), ("A", "")])
def test_a_relay_of_another_job_or_site_is_not_spoken_to(board: Any, site: str, job: str) -> None:
    house, path = board
    Asking(house.hub.engine(), [message("A")])
    with Line(path) as line:
        line.hello(site, "one", job)
        assert line.hear() is None


def test_a_relay_that_speaks_for_another_site_is_cut(board: Any) -> None:
    house, path = board
    with Line(path) as line:
        line.hello("A", "one")
        line.say(house.reply(message("B")))
        assert line.hear() is None


def test_a_twin_gets_nothing_while_the_first_is_there(board: Any) -> None:
    house, path = board
    house.hub.attach("A", "first")
    request = message("A")
    Asking(house.hub.engine(), [request])
    with Line(path) as line:
        line.hello("A", "twin")
        for _ in range(500):
            if house.hub.events:
                break
            threading.Event().wait(0.01)
        assert "second process" in house.hub.events[0].text
        assert house.hub.take("A", "first", 1.0) == request


def test_a_socket_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    house = House(tmp_path / "spool")
    with pytest.raises(WardroundError, match="socket cannot be made"):
        Switchboard(house.hub, tmp_path / "missing" / "hub.sock", lambda site: None).start()


def test_the_path_of_a_socket_may_be_long(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    house = House(tmp_path / "spool")
    board = Switchboard(house.hub, folder / "hub.sock", lambda site: None)
    board.start()
    connect(folder / "hub.sock").close()
    board.close()
