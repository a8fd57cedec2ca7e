"""The doctor: each thing that goes wrong at hospitals is found, named as what it is, and comes with what to do."""

from __future__ import annotations

import errno
import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.hospitals.stands import run, stand_up
from wardround.hospitals import certificates
from wardround.hospitals.certificates import issue, server_context
from wardround.hospitals.federation import load_federation, save_federation
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.keys import read_key
from wardround.hospitals.membership import doctor, reach
from wardround.hospitals.membership.doctor import Finding, examine
from wardround.hospitals.membership.joining import join
from wardround.hospitals.membership.reach import Reached
from wardround.hospitals.roster import SignedRoster
from wardround.protection.identity import Identity

Connect = Callable[[str, int, Path], Reached]
WELL = Reached(True, answered=True, ahead=0.3)
PATIENT = "Doe-John"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation, and the folder of a site that joined it, ready to take part."""
    folder = tmp_path_factory.mktemp("made")
    fed = stand_up(folder, "stroke", "Alpha")
    site = join(fed / "kits" / "Alpha.zip", folder / "site").folder
    (folder / "data" / PATIENT).mkdir(parents=True)
    (folder / "data" / PATIENT / "scan.nii").write_text("x")
    site.site.write_text(site.site.read_text().replace("/path/to/the/patients", "../data"))
    root = read_key(fed / "root" / "root.key")
    keys = {"Alpha": read_key(site.identity).public, "Beta": Identity(b"b" * 32).public}
    SignedRoster.sign("stroke", 2, keys, root).save(site.roster)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """A copy of it, to be made ill; the site is in `site`, the coordinator in `stroke`."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "_REFUSAL", 0.1)


@pytest.fixture(autouse=True)
def _without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def _all(folder: Path, connect: Connect | None = None) -> dict[str, Finding]:
    found = list(examine(folder / "site", connect or (lambda host, port, certificates: WELL)))
    assert not any(PATIENT in finding.text + finding.fix for finding in found)
    assert all(finding.fix for finding in found if finding.level != "ok")
    worst: dict[str, Finding] = {}
    for finding in found:
        worst.setdefault(finding.what, finding)
    return worst


# What is looked at ------------------------------------------------------------------------------------------------


def test_a_site_that_is_well(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_memory_gb", lambda: 12.0)
    found = _all(made)
    assert {finding.level for what, finding in found.items() if what != "disk"} == {"ok"}
    assert "wardround" in found["versions"].text
    assert found["data"].text == "1 file, 1 folder"
    assert "admitted, with 1 other sites (serial 2)" in found["list of sites"].text
    assert "agrees with the coordinator's" in found["clock"].text


def test_the_command_says_each_thing_and_ends_with_1_where_one_is_ill(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "reach", lambda *_: WELL)
    well = run("site", "doctor", copy / "site")
    assert well.exit_code == 0, well.output
    assert "ok    certificate: of site Alpha" in well.stdout
    assert "This site can take part" in well.stdout
    (copy / "site" / "identity.key").chmod(0o644)
    ill = run("site", "doctor", copy / "site")
    assert ill.exit_code == 1
    assert "fail  private keys: other users of this computer can read identity.key" in ill.stdout
    assert "-> chmod 600 identity.key" in ill.stdout
    assert "1 to mend" in ill.stdout
    nothing = run("site", "doctor", copy)
    assert nothing.exit_code == 2
    assert "is not that of a site" in nothing.stderr


@pytest.mark.parametrize(("gigabytes", "level"), [(0.5, "fail"), (3.0, "warn"), (30.0, "ok"), (None, "warn")])
def test_memory(gigabytes: float | None, level: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_memory_gb", lambda: gigabytes)
    assert _all(made)["memory"].level == level


@pytest.mark.parametrize(("gigabytes", "level"), [(0.5, "fail"), (9.0, "warn"), (11.0, "ok")])
def test_disk(gigabytes: float, level: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(made)._replace(free=int(gigabytes * 1e9))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    assert _all(made)["disk"].level == level


def test_the_memory_of_this_machine_is_read() -> None:
    found = doctor._memory_gb()
    assert found is None or 0.0 < found < 1e6


def test_a_certificate_that_ends(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = copy / "site" / "certificates"
    for days, level in ((20, "warn"), (5, "warn"), (40, "ok")):
        issue(copy / "stroke" / "root", place, "Alpha", days=days)
        found = _all(copy)["certificate"]
        assert found.level == level
        assert f"for {days} more days" in found.text
    long_ago = datetime.now(UTC).replace(microsecond=0) - timedelta(days=10)
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "_now", lambda: long_ago)
        issue(copy / "stroke" / "root", place, "Alpha", days=3)
    found = _all(copy)["certificate"]
    assert found.level == "fail"
    assert "expired on" in found.text
    assert "new kit" in found.fix
    # Without a certificate nothing is tried: the coordinator would be blamed.
    assert "not tried" in _all(copy)["coordinator"].text
    (place / "own.crt").unlink()
    assert "cannot be read" in _all(copy)["certificate"].text


@pytest.mark.parametrize(("ahead", "level"), [(1.0, "ok"), (-20.0, "ok"), (45.0, "warn"), (-3600.0, "fail")])
def test_a_clock_that_is_off(ahead: float, level: str, made: Path) -> None:
    found = _all(made, lambda *_: Reached(True, answered=True, ahead=ahead))["clock"]
    assert found.level == level
    assert ("ahead of" in found.text) == (ahead > 2)
    assert ("behind" in found.text) == (ahead < -2)


def test_a_clock_is_judged_without_the_coordinator(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = Reached(False, "refused", "ask")
    assert "was not seen" in _all(copy, lambda *_: away)["clock"].text
    monkeypatch.setattr(doctor.time, "time", lambda: 1e9)
    assert _all(copy, lambda *_: away)["clock"].level == "fail"


def test_proxies_are_mentioned(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "proxy" not in _all(made)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    found = _all(made)["proxy"]
    assert found.level == "warn"
    assert "HTTPS_PROXY is set" in found.text
    assert "directly" in found.text
    assert "proxy.example" not in found.text


def test_the_list_of_sites(copy: Path) -> None:
    roster = copy / "site" / "roster.json"
    root = read_key(copy / "stroke" / "root" / "root.key")
    SignedRoster.sign("stroke", 3, {"Beta": Identity(b"b" * 32).public}, root).save(roster)
    found = _all(copy)["list of sites"]
    assert (found.level, "does not hold Alpha" in found.text) == ("fail", True)
    assert "wardround federation admit FOLDER Alpha KEY" in found.fix
    SignedRoster.sign("stroke", 3, {"Alpha": Identity(b"b" * 32).public}, root).save(roster)
    assert "another key than its own" in _all(copy)["list of sites"].text
    SignedRoster.sign("stroke", 3, {}, Identity(b"x" * 32)).save(roster)
    assert "root did not sign" in _all(copy)["list of sites"].text
    roster.write_text("hello")
    assert _all(copy)["list of sites"].level == "fail"
    roster.unlink()
    assert _all(copy)["list of sites"].level == "warn"
    (copy / "site" / "identity.key").unlink()
    assert _all(copy)["site's key"].level == "fail"


def test_the_sites_file_and_its_data(copy: Path) -> None:
    path = copy / "site" / "site.yaml"
    text = path.read_text()
    path.write_text(text.replace("minimum_cohort: 11", "minimum_cohort: 2"))
    assert "as few as 2 patients" in _all(copy)["site.yaml"].text
    for spoiled, words in (
        (text.replace("../data", "/path/to/the/patients"), "write the folder"),
        (text.replace("../data", "../absent"), "the folder does not exist"),
        (text.replace("  Alpha:", "  Alfa:"), "one entry"),
        (text.replace("threads", "treads"), "did you mean `threads`"),
        ("sites: [", "not valid YAML"),
    ):
        path.write_text(spoiled)
        found = _all(copy)["site.yaml"]
        assert (found.level, words in found.text) == ("fail", True)
    path.write_text(text)
    shutil.rmtree(copy / "data" / PATIENT)
    assert "holds no file" in _all(copy)["data"].text


def test_a_data_folder_that_may_not_be_read(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(folder: Path, onerror: Callable[[OSError], None]) -> Iterator[Any]:
        onerror(PermissionError(errno.EACCES, "Permission denied", str(folder / PATIENT)))
        yield

    monkeypatch.setattr("wardround.hospitals.membership.site_file.os.walk", walk)
    found = _all(made)["data"]
    assert (found.level, found.text) == ("fail", "cannot be read: Permission denied")


def test_a_gpu_that_is_not_there(copy: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    path = copy / "site" / "site.yaml"
    text = path.read_text()
    path.write_text(text.replace("device: cpu", "device: cuda"))
    found = _all(copy)["device"]
    assert found.level == "fail"
    assert "device: cpu" in found.fix
    path.write_text(text.replace("device: cpu", "device: auto"))
    assert (_all(copy)["device"].level, "auto is cpu" in _all(copy)["device"].text) == ("ok", True)
    path.write_text(text)
    assert "device" not in _all(copy)


@pytest.mark.parametrize(("version", "level"), [(None, "fail"), ("2.8.0", "fail"), ("2.9.1", "ok")])
def test_nvflare_where_it_carries(version: str | None, level: str, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy / "site" / "federation.yaml"
    save_federation(load_federation(path).model_copy(update={"carrier": "nvflare"}), path)
    startup = copy / "site" / "nvflare" / "startup"
    startup.mkdir(parents=True)
    shutil.copy(copy / "site" / "certificates" / "own.crt", startup / "client.crt")
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == "nvflare" else real(name))
    found = _all(copy, lambda *_: Reached(True))
    assert found["NVFlare"].level == level
    assert found["coordinator"].level == "ok"
    (startup / "client.crt").unlink()
    assert "NVFlare's kit lacks" in _all(copy)["certificate"].text


def test_a_folder_that_may_not_be_written(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    found = _all(made)["folder"]
    assert (found.level, "chown" in found.fix) == ("fail", True)


def test_a_stopped_site_says_so(copy: Path) -> None:
    SiteFolder(copy / "site").stopped.write_text("")
    assert _all(copy)["kill switch"].level == "warn"


# The connection, over real sockets --------------------------------------------------------------------------------


@contextmanager
def _listening(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server on loopback that serves one connection; its port."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.settimeout(10.0)

        def work() -> None:
            with suppress(OSError):
                line, _ = door.accept()
                line.settimeout(10.0)
                with line:
                    serve(line)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield door.getsockname()[1]
        finally:
            door.close()
            thread.join(15.0)
            assert not thread.is_alive()


def _tls(context: ssl.SSLContext, answer: bytes = b"") -> Callable[[socket.socket], None]:
    def serve(line: socket.socket) -> None:
        with context.wrap_socket(line, server_side=True) as secure:
            secure.recv(4096)
            if answer:
                secure.sendall(answer)

    return serve


def _reached(made: Path, serve: Callable[[socket.socket], None], timeout: float = 10.0) -> Reached:
    with _listening(serve) as port:
        return reach.reach("127.0.0.1", port, made / "site" / "certificates", timeout)


def test_a_coordinator_that_is_there_says_its_time(made: Path) -> None:
    context = server_context(made / "stroke" / "certificates")
    then = datetime.now(UTC) - timedelta(seconds=100)
    answer = f"HTTP/1.1 404 Not Found\r\nDate: {format_datetime(then, usegmt=True)}\r\n\r\n".encode()
    found = _reached(made, _tls(context, answer))
    assert (found.connected, found.answered) == (True, True)
    assert found.ahead is not None
    assert 99 <= found.ahead < 160
    for answer in (b"HTTP/1.1 400 Bad\r\nDate: yesterday\r\n\r\n", b"\x00\xff garbage\r\n\r\n"):
        found = _reached(made, _tls(context, answer))
        assert (found.connected, found.answered, found.ahead) == (True, True, None)
    assert _reached(made, _tls(context)) == Reached(True)


def test_a_closed_port_and_an_unknown_name(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    folder = made / "site" / "certificates"
    refused = reach.reach("127.0.0.1", port, folder)
    assert (refused.connected, "refused" in refused.fault) == (False, True)
    for error, words in (
        (socket.gaierror(-2, "unknown"), "not known here"),
        (TimeoutError(), "a firewall drops it"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "Network is unreachable"),
    ):

        def fail(*_: object, error: OSError = error) -> NoReturn:
            raise error

        monkeypatch.setattr(reach.socket, "create_connection", fail)
        found = reach.reach("coordinator.example", port, folder)
        assert words in found.fault
        assert found.fix


def test_what_is_no_coordinator(made: Path, tmp_path: Path) -> None:
    def web(line: socket.socket) -> None:
        line.recv(4096)
        line.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    def silent(line: socket.socket) -> None:
        while line.recv(4096):
            pass

    def closing(line: socket.socket) -> None:
        line.recv(4096)

    assert "speaks no TLS" in _reached(made, web).fault
    assert "says nothing in TLS" in _reached(made, silent, 0.5).fault
    hung_up = _reached(made, closing)
    assert "hung up" in hung_up.fault
    assert "firewall or proxy" in hung_up.fix
    heart = stand_up(tmp_path, "heart")
    other = _reached(made, _tls(server_context(heart / "certificates")))
    assert "another authority" in other.fault
    assert "proxy that opens TLS" in other.fix


def test_a_coordinator_that_refuses_the_site(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its certificate is the federation's, and it takes clients of another one alone."""
    heart = stand_up(tmp_path, "heart")
    own = made / "stroke" / "certificates"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own / "own.crt", own / "own.key")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(heart / "certificates" / "ca.crt")
    monkeypatch.setattr(reach, "_REFUSAL", 5.0)
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context.maximum_version = version
        found = _reached(made, _tls(context))
        assert not found.connected
        assert "another federation" in found.fault
        assert found.fix


def test_a_coordinator_whose_own_certificate_is_wrong(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = made / "stroke" / "root"
    issue(root, tmp_path / "named", "coordinator", host="other.example")
    assert "another" in _reached(made, _tls(server_context(tmp_path / "named"))).fault
    long_ago = datetime.now(UTC).replace(microsecond=0) - timedelta(days=10)
    with monkeypatch.context() as patch:
        patch.setattr(certificates, "_now", lambda: long_ago)
        # The authority is younger than this certificate.
        patch.setattr(certificates, "_check_time", lambda *_: None)
        issue(root, tmp_path / "old", "coordinator", host="127.0.0.1", days=3)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "old" / "own.crt", tmp_path / "old" / "own.key")
    assert "expired" in _reached(made, _tls(context)).fault
