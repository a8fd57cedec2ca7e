"""A start-up kit: one archive with what a site needs to join, whose list of files the federation's root signs.

An archive comes by mail or on a stick, so what is in it is hostile until it was looked at: its files are read into
memory within bounds, each under a name that a kit may have, and nothing is written before all of them are accepted.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import Field, ValidationError

from wardround.errors import Rejected, StudyError, WireError
from wardround.hospitals.federation import Federation
from wardround.protection.identity import SIGNATURE_BYTES, Identity, frame
from wardround.study.base import Config
from wardround.study.load import validate
from wardround.study.schema import SiteName
from wardround.study.yaml_text import parse_yaml
from wardround.wire.canonical import canonical_json, parse_json
from wardround.wire.files import reason, written

FEDERATION, MANIFEST, README = "federation.yaml", "kit.json", "README.txt"
CERTIFICATES = ("certificates/ca.crt", "certificates/own.crt", "certificates/own.key")
NVFLARE = "nvflare/"
#: Bytes that an archive, one of its files and all of them may have. A kit has 15 kB, one with NVFlare's files 40 kB.
LARGEST_ARCHIVE, LARGEST_FILE, LARGEST_SUM = 8 << 20, 1 << 20, 8 << 20
MOST_FILES = 100
_PURPOSE = "wardround/kit"
_REQUIRED = frozenset({FEDERATION, MANIFEST, README, *CERTIFICATES})
_OF_NVFLARE = re.compile(r"nvflare/(?:(?:startup|local)/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED = 0x1
# What the standard library raises of archives that were cut or changed.
_DAMAGES = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    OverflowError,
    ValueError,
    KeyError,
)
_DAMAGED = "the kit is damaged or no kit at all: have it sent again"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Manifest(Config):
    """`kit.json`: whose kit it is, when it was made, and the hash of each other file, under the root's signature."""

    version: Literal[1] = 1
    federation: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    site: SiteName
    made: int = Field(ge=0, lt=1 << 53, strict=True, description="unix time, seconds; a site takes no earlier kit")
    files: dict[str, Sha256] = Field(max_length=MOST_FILES)
    signature: str = Field(pattern=rf"^[0-9a-f]{{{2 * SIGNATURE_BYTES}}}$")


@dataclass(frozen=True)
class Kit:
    """What an archive holds, once it was found to be a kit: `files` has each file but the list of them."""

    federation: Federation
    site: str
    made: int
    files: Mapping[str, bytes]

    @property
    def root_key(self) -> bytes:
        """The public key of the root that signed it."""
        return bytes.fromhex(self.federation.root_key)


def write_kit(path: Path, federation: str, site: str, made: int, files: Mapping[str, bytes], root: Identity) -> None:
    """Write a kit that the root signs; only the owner may read it, for it holds a private key."""
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    signature = root.sign(_PURPOSE, *_fields(federation, site, made, hashes))
    manifest = Manifest(federation=federation, site=site, made=made, files=hashes, signature=signature.hex())
    with written(path, durable=True) as file:
        os.fchmod(file.fileno(), 0o600)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in sorted({**files, MANIFEST: canonical_json(manifest.model_dump()) + b"\n"}.items()):
                entry = zipfile.ZipInfo(name)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (stat.S_IFREG | 0o600) << 16
                archive.writestr(entry, data)


def read_kit(path: Path) -> Kit:
    """Read a kit and look at all of it but the time that its certificates hold.

    The signature is compared with the root's key in the kit itself: a person compares that with what the coordinator
    says (`keys.fingerprint`), or a site with the root that it joined. Raises `Rejected`, with the reason, for what is
    no kit, holds what a kit does not, or was changed; `WireError` where it cannot be read.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > LARGEST_ARCHIVE:
                raise Rejected(f"the kit has more than {LARGEST_ARCHIVE:,} bytes: it is no kit of a federation")
            files = _files(file)
    except OSError as error:
        raise WireError(f"the kit cannot be read: {reason(error)}", detail=str(path)) from error
    if missing := sorted(_REQUIRED - files.keys()):
        raise Rejected(f"the kit lacks {', '.join(missing)}: have it sent again")
    manifest = _manifest(files.pop(MANIFEST))
    federation = _federation(files[FEDERATION])
    if manifest.federation != federation.name:
        raise Rejected(f"the list of the kit's files is of another federation than its {FEDERATION}")
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    if hashes != manifest.files:
        raise Rejected("a file of the kit is not the one that its list names: the kit was changed; have it sent again")
    signed = frame(_PURPOSE, *_fields(manifest.federation, manifest.site, manifest.made, manifest.files))
    try:
        root = Ed25519PublicKey.from_public_bytes(bytes.fromhex(federation.root_key))
        root.verify(bytes.fromhex(manifest.signature), signed)
    except (InvalidSignature, ValueError):
        raise Rejected("the federation's root did not sign this kit: have it sent again") from None
    return Kit(federation, manifest.site, manifest.made, files)


def _fields(federation: str, site: str, made: int, hashes: Mapping[str, str]) -> list[bytes | str | int]:
    return [federation, site, made, *(field for name in sorted(hashes) for field in (name, hashes[name]))]


def _files(file: BinaryIO) -> dict[str, bytes]:
    """All files of an archive; sizes are looked at before anything is unpacked, and again while it is."""
    found: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _accept(entries)
            for entry in entries:
                with archive.open(entry) as packed:
                    data = packed.read(LARGEST_FILE + 1)
                if len(data) != entry.file_size:
                    raise Rejected(_DAMAGED)
                found[entry.filename] = data
    except Rejected:
        raise
    except _DAMAGES:
        raise Rejected(_DAMAGED) from None
    return found


def _accept(entries: list[zipfile.ZipInfo]) -> None:
    if len(entries) > MOST_FILES:
        raise Rejected(f"the kit holds more than {MOST_FILES} files: it is no kit of a federation")
    if len({_folded(entry.filename) for entry in entries}) != len(entries):
        raise Rejected("the kit holds two files of one name: it is no kit of a federation")
    if sum(entry.file_size for entry in entries) > LARGEST_SUM:
        raise Rejected(f"the kit's files have more than {LARGEST_SUM:,} bytes: it is no kit of a federation")
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG):
            raise Rejected("the kit holds a link or a folder where files alone belong: it is no kit of a federation")
        if entry.filename not in _REQUIRED and _OF_NVFLARE.fullmatch(entry.filename) is None:
            raise Rejected("the kit holds a file of a name that no kit has: it is no kit of a federation")
        if entry.flag_bits & _ENCRYPTED or entry.compress_type not in _METHODS:
            raise Rejected("the kit is packed in another way than kits are: have it sent again")
        if entry.file_size > LARGEST_FILE:
            raise Rejected(f"a file of the kit has more than {LARGEST_FILE:,} bytes: it is no kit of a federation")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _manifest(data: bytes) -> Manifest:
    try:
        return Manifest.model_validate(parse_json(data))
    except (WireError, ValidationError):
        raise Rejected(f"the kit's {MANIFEST} is not of the form that this version reads: {_DAMAGED}") from None


def _federation(data: bytes) -> Federation:
    try:
        return validate(Federation, parse_yaml(data.decode("utf-8"), "kit's federation"), "kit's federation")
    except UnicodeDecodeError:
        raise Rejected(_DAMAGED) from None
    except StudyError as error:
        raise Rejected(str(error)) from None
