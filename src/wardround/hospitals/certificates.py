"""Certificates of a federation: an authority of its own, one certificate for the coordinator, one for each site.

Keys are RSA: NVFlare signs with RSA keys alone, and its provisioning can take over this authority. No computer trusts
the authority but those of the federation, and these trust no other (X.509, RFC 5280).
"""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, generate_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from wardround.errors import WardroundError
from wardround.wire.files import reason

AUTHORITY, AUTHORITY_KEY = "ca.crt", "ca.key"
OWN, OWN_KEY = "own.crt", "own.key"
_AUTHORITY_BITS, _OWN_BITS = 3072, 2048
# A clock that is behind by less than this still takes a new certificate.
_EARLIER = timedelta(hours=1)
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,64}")
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}")
_Parsed = TypeVar("_Parsed")
_USES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


class CertificateError(WardroundError):
    """A certificate or its key cannot be used: says why, and what to do."""


@dataclass(frozen=True)
class Certificate:
    """What a certificate says: whose it is, from when until when (UTC), and the SHA-256 of the whole."""

    name: str
    not_before: datetime
    not_after: datetime
    sha256: str


def make_authority(folder: Path, name: str, days: int = 3650) -> None:
    """Make a federation's authority: `ca.crt`, and `ca.key`, which only its owner may read.

    Raises `CertificateError` where there is one already: all certificates would have to be made anew.
    """
    if (folder / AUTHORITY_KEY).exists():
        raise CertificateError(
            "the folder has an authority already, and certificates of another one would not fit; use it, or choose "
            "another folder",
            detail=str(folder),
        )
    key = generate_private_key(65537, _AUTHORITY_BITS)
    # NVFlare names an authority by its common name alone, and compares its validity with a whole number of days.
    subject = _named(name)
    begin = _now() - _EARLIER
    builder = _builder(subject, subject, key, begin, begin + timedelta(days=days), key)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage("key_cert_sign", "crl_sign", "digital_signature"), critical=True)
    _write_pair(folder, AUTHORITY, AUTHORITY_KEY, builder.sign(key, hashes.SHA256()), key)


def issue(authority: Path, folder: Path, name: str, *, host: str | None = None, days: int = 365) -> None:
    """Make a party's certificate: `own.crt`, its key `own.key`, and the authority's `ca.crt` go into `folder`.

    With `host`, a name or an address, it is a server's, and no client takes it for another host's; without, it is a
    site's, and no client takes it for a server's. It ends when the authority does, at the latest. What lies in the
    folder is replaced. Raises `CertificateError`.
    """
    ca = _read(authority / AUTHORITY)
    ca_key = _read_key(authority / AUTHORITY_KEY)
    _check_time(ca, "the authority's certificate", "make a new federation")
    if ca_key.public_key() != ca.public_key():
        raise CertificateError(
            "the authority's key does not belong to its certificate; restore both from one backup",
            detail=str(authority),
        )
    key = generate_private_key(65537, _OWN_BITS)
    begin = _now() - _EARLIER
    end = min(begin + timedelta(days=days), ca.not_valid_after_utc)
    builder = _builder(_named(name), ca.subject, key, begin, end, ca_key)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage("digital_signature", "key_encipherment"), critical=True)
    purpose = ExtendedKeyUsageOID.CLIENT_AUTH if host is None else ExtendedKeyUsageOID.SERVER_AUTH
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    if host is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([_alternative(host)]), critical=False)
    _write_pair(folder, OWN, OWN_KEY, builder.sign(ca_key, hashes.SHA256()), key)
    _write(folder / AUTHORITY, ca.public_bytes(serialization.Encoding.PEM), 0o644)


def read_certificate(path: Path) -> Certificate:
    """What a certificate says; it is not checked. Raises `CertificateError` for a file that holds none."""
    return _summary(_read(path))


def check_certificates(folder: Path) -> Certificate:
    """A party's own certificate, once it was found to be usable today.

    Raises `CertificateError` where it or its key cannot be read, is expired or not valid yet, or where the authority
    next to it did not sign it.
    """
    own, ca, key = _read(folder / OWN), _read(folder / AUTHORITY), _read_key(folder / OWN_KEY)
    _check_time(ca, "the authority's certificate", "the federation has to be made anew")
    _check_time(own, "the certificate", "ask the coordinator for a new kit (at the coordinator: issue it again)")
    try:
        own.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        raise CertificateError(
            "the certificate is of another federation's authority; use the kit that the coordinator made for this one",
            detail=str(folder),
        ) from None
    if key.public_key() != own.public_key():
        raise CertificateError(
            "the key does not belong to the certificate next to it; unpack the kit again", detail=str(folder)
        )
    return _summary(own)


def server_context(folder: Path) -> ssl.SSLContext:
    """TLS (1.2 or newer) for the coordinator: a client must show a certificate of the authority.

    Raises `CertificateError` where the folder's certificate cannot be used.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, folder)
    # Every connection shows its certificate: none is taken up again with a ticket of an earlier one.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    return context


def client_context(folder: Path) -> ssl.SSLContext:
    """TLS (1.2 or newer) for a site: the server must show a certificate of the authority for the host that was called.

    Raises `CertificateError` where the folder's certificate cannot be used.
    """
    return _context(ssl.PROTOCOL_TLS_CLIENT, folder)


def peer_name(subject: tuple[tuple[tuple[str, str], ...], ...]) -> str | None:
    """The one common name in a certificate's subject, as `getpeercert` lists it; nothing where there is none."""
    names = [value for part in subject for key, value in part if key == "commonName"]
    return names[0] if len(names) == 1 else None


_REFUSED_HERE = {
    9: "the coordinator's certificate is not valid yet; set this computer's clock",
    10: "the coordinator's certificate has expired; the coordinator has to issue itself a new one",
    62: "the coordinator's certificate is for another host name; the coordinator has to issue one for this name",
    64: "the coordinator's certificate is for another address; the coordinator has to issue one for this address",
    26: "a computer that is not the coordinator answers at its address, with a site's certificate",
}
_REFUSED_THERE = (
    ("CERTIFICATE_EXPIRED", "this site's certificate has expired; ask the coordinator for a new kit"),
    ("UNKNOWN_CA", "this site's certificate is of another federation; use the kit that this coordinator made"),
    ("DECRYPT_ERROR", "this site's certificate is of another federation; use the kit that this coordinator made"),
    ("CERTIFICATE", "the coordinator refuses this site's certificate; set this computer's clock, or use a new kit"),
)


def handshake_reason(error: ssl.SSLError) -> str:
    """Why a site and its coordinator could not agree, in a sentence with the fix, as the site sees it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        other = "the server is of another federation; check host and port, and that the kit is this federation's"
        return _REFUSED_HERE.get(error.verify_code, other)
    alert = error.reason or ""
    for word, text in _REFUSED_THERE:
        if "ALERT" in alert and word in alert:
            return text
    return f"no secure connection ({alert or 'ended by the other side'}); check that no proxy opens TLS on the way"


# Making -----------------------------------------------------------------------------------------------------------


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _named(name: str) -> x509.Name:
    if not _NAME.fullmatch(name):
        raise CertificateError("a certificate's name must have 1 to 64 printable characters; choose a shorter one")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(host: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not _HOST.fullmatch(host):
        raise CertificateError("a server's host must be a name of letters, digits, dots and hyphens, or an address")
    return x509.DNSName(host)


def _usage(*uses: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{use: use in uses for use in _USES})


def _builder(
    subject: x509.Name, issuer: x509.Name, key: RSAPrivateKey, begin: datetime, end: datetime, signing: RSAPrivateKey
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False)
    )


def _write_pair(folder: Path, name: str, key_name: str, certificate: x509.Certificate, key: RSAPrivateKey) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(folder / key_name, pem, 0o600)
    _write(folder / name, certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _write(path: Path, data: bytes, mode: int) -> None:
    """A file that is there whole or not at all, and that had its mode before it had its bytes."""
    draft = path.with_name(path.name + ".draft")
    draft.unlink(missing_ok=True)
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)


# Reading ----------------------------------------------------------------------------------------------------------


def _load(path: Path, what: str, parse: Callable[[bytes], _Parsed]) -> _Parsed:
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise CertificateError(
            f"{what} {path.name} cannot be read ({reason(error)}); put the files of the kit in place", detail=str(path)
        ) from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertificateError(f"{path.name} holds no {what}; unpack the kit again", detail=str(path)) from None


def _read(path: Path) -> x509.Certificate:
    return _load(path, "certificate", x509.load_pem_x509_certificate)


def _read_key(path: Path) -> RSAPrivateKey:
    key = _load(path, "private key", lambda data: serialization.load_pem_private_key(data, None))
    if not isinstance(key, RSAPrivateKey):
        raise CertificateError(f"{path.name} holds a key of another kind than RSA; unpack the kit again")
    return key


def _summary(certificate: x509.Certificate) -> Certificate:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return Certificate(
        str(names[0].value) if names else "",
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        certificate.fingerprint(hashes.SHA256()).hex(),
    )


def _check_time(certificate: x509.Certificate, what: str, fix: str) -> None:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise CertificateError(f"{what} expired on {certificate.not_valid_after_utc:%d %B %Y}; {fix}")
    if now < certificate.not_valid_before_utc:
        begin = f"{certificate.not_valid_before_utc:%d %B %Y %H:%M} UTC"
        raise CertificateError(f"{what} is not valid before {begin}; set this computer's clock")


def _context(protocol: int, folder: Path) -> ssl.SSLContext:
    check_certificates(folder)
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(folder / AUTHORITY)
    context.load_cert_chain(folder / OWN, folder / OWN_KEY)
    return context
