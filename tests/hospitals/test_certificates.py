"""Certificates: whose they are, what they are for, and what is said of one that cannot be used."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from wardround.hospitals import certificates
from wardround.hospitals.certificates import (
    CertificateError,
    check_certificates,
    client_context,
    handshake_reason,
    issue,
    make_authority,
    peer_name,
    read_certificate,
    server_context,
)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two federations, each with its authority, a coordinator and site A."""
    root = tmp_path_factory.mktemp("kits")
    for federation in ("one", "two"):
        make_authority(root / federation / "root", federation)
        issue(root / federation / "root", root / federation / "coordinator", "coordinator", host="127.0.0.1")
        issue(root / federation / "root", root / federation / "A", "Site A")
    return root


@pytest.fixture
def kit(kits: Path, tmp_path: Path) -> Path:
    """A copy of the first federation, to be changed."""
    return Path(shutil.copytree(kits / "one", tmp_path / "one"))


def shaken(server: Path, client: Path, host: str = "127.0.0.1") -> tuple[str | None, ssl.SSLError | None]:
    """The name that a server sees of its client, and the error that the client sees."""
    seen: list[str | None] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for end in (ours, theirs):
            end.settimeout(10.0)
        context = server_context(server)

        def serve() -> None:
            with suppress(OSError), context.wrap_socket(ours, server_side=True) as line:
                seen.append(peer_name((line.getpeercert() or {})["subject"]))  # type: ignore[arg-type]
                line.sendall(b"welcome")

        thread = threading.Thread(target=serve)
        thread.start()
        error = None
        try:
            with client_context(client).wrap_socket(theirs, server_hostname=host) as line:
                # With TLS 1.3 a client learns only now that its certificate is refused.
                assert line.recv(10) == b"welcome"
        except ssl.SSLError as raised:
            error = raised
        theirs.close()
        thread.join(10.0)
        assert not thread.is_alive()
    return (seen[0] if seen else None), error


def test_a_site_and_its_coordinator_trust_each_other_and_the_name_is_the_sites(kits: Path) -> None:
    assert shaken(kits / "one/coordinator", kits / "one/A") == ("Site A", None)


def test_a_certificate_says_whose_it_is_and_until_when(kits: Path) -> None:
    found = read_certificate(kits / "one/A/own.crt")
    assert found == check_certificates(kits / "one/A")
    assert found.name == "Site A"
    assert found.not_after - found.not_before == timedelta(days=365)
    assert found.not_before < datetime.now(UTC) < found.not_after
    assert len(found.sha256) == 64


def test_what_a_certificate_is_for_is_written_in_it(kits: Path) -> None:
    def read(name: str) -> x509.Extensions:
        return x509.load_pem_x509_certificate((kits / name).read_bytes()).extensions

    authority = read("one/root/ca.crt")
    assert authority.get_extension_for_class(x509.BasicConstraints).critical
    assert authority.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    assert authority.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    for name, purpose in (("A", ExtendedKeyUsageOID.CLIENT_AUTH), ("coordinator", ExtendedKeyUsageOID.SERVER_AUTH)):
        leaf = read(f"one/{name}/own.crt")
        assert not leaf.get_extension_for_class(x509.BasicConstraints).value.ca
        assert not leaf.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
        assert list(leaf.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]


@pytest.mark.parametrize(
    ("host", "kind"), [("10.0.0.7", x509.IPAddress), ("::1", x509.IPAddress), ("hub.example.org", x509.DNSName)]
)
def test_a_servers_certificate_names_its_host(kits: Path, tmp_path: Path, host: str, kind: type) -> None:
    issue(kits / "one/root", tmp_path, "coordinator", host=host)
    extensions = x509.load_pem_x509_certificate((tmp_path / "own.crt").read_bytes()).extensions
    (name,) = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert type(name) is kind
    assert str(name.value) == host


def test_only_the_owner_may_read_keys_and_an_authority_is_not_replaced(kits: Path) -> None:
    for name in ("root/ca.key", "coordinator/own.key", "A/own.key"):
        assert (kits / "one" / name).stat().st_mode & 0o777 == 0o600
    assert not (kits / "one/A/ca.key").exists()
    with pytest.raises(CertificateError, match="has an authority already"):
        make_authority(kits / "one/root", "again")


def test_a_certificate_ends_with_its_authority(tmp_path: Path) -> None:
    make_authority(tmp_path / "root", "short", days=10)
    issue(tmp_path / "root", tmp_path / "A", "A")
    authority, own = read_certificate(tmp_path / "root/ca.crt"), read_certificate(tmp_path / "A/own.crt")
    assert own.not_after == authority.not_after


def test_a_certificate_is_renewed_in_place(kit: Path) -> None:
    before = read_certificate(kit / "A/own.crt")
    issue(kit / "root", kit / "A", "Site A", days=30)
    assert check_certificates(kit / "A").sha256 != before.sha256
    assert shaken(kit / "coordinator", kit / "A") == ("Site A", None)


def test_an_expired_certificate_is_refused_and_the_fix_is_named(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    issue(kit / "root", kit / "A", "Site A", days=0)
    with pytest.raises(CertificateError, match=r"expired on .*; ask the coordinator for a new kit"):
        client_context(kit / "A")
    # A site whose program does not look is refused by the coordinator, and the other way round.
    monkeypatch.setattr(certificates, "_check_time", lambda *_: None)
    seen, error = shaken(kit / "coordinator", kit / "A")
    assert seen is None
    assert error is not None
    assert "this site's certificate has expired; ask" in handshake_reason(error)
    issue(kit / "root", kit / "A", "Site A")
    issue(kit / "root", kit / "coordinator", "coordinator", host="127.0.0.1", days=0)
    _, error = shaken(kit / "coordinator", kit / "A")
    assert error is not None
    assert "the coordinator's certificate has expired" in handshake_reason(error)


def test_a_certificate_of_tomorrow_is_refused(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tomorrow = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    monkeypatch.setattr(certificates, "_now", lambda: tomorrow)
    issue(kit / "root", kit / "A", "Site A")
    with pytest.raises(CertificateError, match=r"not valid before .*; set this computer's clock"):
        check_certificates(kit / "A")
    monkeypatch.setattr(certificates, "_check_time", lambda *_: None)
    seen, error = shaken(kit / "coordinator", kit / "A")
    assert seen is None
    assert error is not None
    assert "set this computer's clock" in handshake_reason(error)


def test_another_federation_is_refused_from_both_ends(kits: Path, kit: Path) -> None:
    seen, error = shaken(kits / "one/coordinator", kits / "two/A")
    assert seen is None
    assert error is not None
    assert "another federation" in handshake_reason(error)
    # A site that trusts this federation and shows a certificate of the other.
    for name in ("own.crt", "own.key"):
        shutil.copy(kits / "two/A" / name, kit / "A" / name)
    with pytest.raises(CertificateError, match="of another federation's authority; use the kit"):
        client_context(kit / "A")


def test_a_stranger_with_an_authority_of_the_same_name_is_refused(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_authority(tmp_path / "false", "one")
    issue(tmp_path / "false", tmp_path / "A", "Site A")
    shutil.copy(kit / "A/ca.crt", tmp_path / "A/ca.crt")
    monkeypatch.setattr(certificates, "check_certificates", lambda _: None)
    seen, error = shaken(kit / "coordinator", tmp_path / "A")
    assert seen is None
    assert error is not None
    assert "this site's certificate" in handshake_reason(error)


def test_a_site_cannot_pose_as_the_coordinator_nor_for_another_host(kit: Path) -> None:
    _, error = shaken(kit / "A", kit / "A")
    assert error is not None
    assert "not the coordinator" in handshake_reason(error)
    _, error = shaken(kit / "coordinator", kit / "A", host="hub.example.org")
    assert error is not None
    assert "another host name" in handshake_reason(error)
    _, error = shaken(kit / "coordinator", kit / "A", host="127.0.0.2")
    assert error is not None
    assert "another address" in handshake_reason(error)


@pytest.mark.parametrize("name", ["own.crt", "own.key", "ca.crt"])
def test_a_file_that_cannot_be_read_is_named(kit: Path, name: str) -> None:
    (kit / "A" / name).write_bytes(b"-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n")
    with pytest.raises(CertificateError, match=f"{name} holds no .*; unpack the kit again"):
        check_certificates(kit / "A")
    (kit / "A" / name).unlink()
    with pytest.raises(CertificateError, match=rf"{name} cannot be read \(No such file.*put the files of the kit"):
        check_certificates(kit / "A")


def test_a_key_of_another_certificate_is_noticed(kits: Path, kit: Path) -> None:
    shutil.copy(kits / "two/A/own.key", kit / "A/own.key")
    with pytest.raises(CertificateError, match="the key does not belong to the certificate"):
        client_context(kit / "A")
    shutil.copy(kits / "two/root/ca.key", kit / "root/ca.key")
    with pytest.raises(CertificateError, match="the authority's key does not belong to its certificate"):
        issue(kit / "root", kit / "B", "B")


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb"])
def test_a_name_that_no_certificate_can_have_is_refused(kits: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(CertificateError, match="1 to 64 printable characters"):
        issue(kits / "one/root", tmp_path, name)


def test_nvflares_provisioning_takes_over_the_authority(kits: Path) -> None:
    utils = pytest.importorskip("nvflare.lighter.utils", reason="NVFlare is not installed")
    root = utils.load_crt(str(kits / "one/root/ca.crt"))
    key = utils.load_private_key_file(str(kits / "one/root/ca.key"))
    name = root.subject.rfc4514_string().removeprefix("CN=")
    pair = utils.generate_keys()
    leaf = utils.generate_cert(utils.Identity("A"), utils.Identity(name), key, pair[1])
    utils.verify_cert_chain(leaf, [], root)
    utils.verify_content("text", utils.sign_content("text", key), root.public_key())
    assert root.not_valid_after_utc - root.not_valid_before_utc == timedelta(days=3650)
