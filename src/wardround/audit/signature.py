"""The signature of a written audit: by the site's own key, over the bytes of both files, in a file beside them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wardround.audit.results import FILES
from wardround.errors import StudyError
from wardround.plan.arms import FEDERATED
from wardround.protection.identity import KEY_BYTES, Identity, Roster
from wardround.storage.cipher import StoreCipher
from wardround.storage.store import SiteStore
from wardround.wire.files import write_text

SIGNATURE = "audit.sig.json"
PURPOSE = "wardround audit report"
_KEYS = {"version", "site", "study_sha256", "files", "key", "signature"}


@dataclass(frozen=True)
class Signed:
    """Who signed a folder's audit: the site by its own word, and the public key in hex."""

    site: str
    key: str


def identity_of(site: str, out: Path, run: Path | None, store: Path | None, cipher: StoreCipher | None) -> Identity:
    """The site's signing key, made where it has none; in its own store, and never in the audit's folder.

    That is `store`, or the site's store in the folder of a run, or `identity/SITE` beside `out`.
    """
    used = None if run is None else run / "work" / "sites" / site / FEDERATED
    root = store or (used if used is not None and used.is_dir() else out.absolute().parent / "identity" / site)
    # A run may be at work there: its unfinished files are left alone.
    opened = SiteStore(root, cipher, tidy=False)
    try:
        return opened.enrol()
    finally:
        opened.close()


def holds_audit(out: Path, site: str) -> bool:
    """Whether a folder holds an audit of the site, which a new one may replace."""
    try:
        value = json.loads((out / FILES[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("site") == site and "study_sha256" in value


def sign(out: Path, site: str, study_sha256: str, identity: Identity) -> Path:
    """Sign the files of a folder; the path of the signature."""
    files = {name: _sha256(out / name) for name in FILES}
    value = {
        "version": 1,
        "site": site,
        "study_sha256": study_sha256,
        "files": files,
        "key": identity.public.hex(),
        "signature": identity.sign(PURPOSE, *_fields(site, study_sha256, files)).hex(),
    }
    write_text(out / SIGNATURE, json.dumps(value, indent=2, sort_keys=True) + "\n")
    return out / SIGNATURE


def verify(folder: Path, key: str | None = None) -> Signed:
    """Who signed the audit of a folder; raises `StudyError` where it is not what was signed, or not with `key`.

    Without `key` anybody may have signed: compare `Signed.key` with the one that the site gave you.
    """
    value = _read(folder)
    site, files = value["site"], value["files"]
    for name in FILES:
        if not (folder / name).is_file():
            raise StudyError(f"the audit is not whole: {name} is missing", detail=str(folder))
        if files.get(name) != _sha256(folder / name):
            raise StudyError(f"{name} is not what the site signed: it was changed", detail=str(folder))
    # Public keys of one name: what a roster verifies with.
    signer = Roster({site: bytes.fromhex(value["key"])})
    fields = _fields(site, value["study_sha256"], files)
    if not signer.verify(site, bytes.fromhex(value["signature"]), PURPOSE, *fields):
        raise StudyError(f"{SIGNATURE} was not made with the key that it names", detail=str(folder))
    if _told(folder / FILES[0]) != (site, value["study_sha256"]):
        raise StudyError(f"{SIGNATURE} speaks for another site or study than {FILES[0]}", detail=str(folder))
    if key is not None and key.lower() != value["key"]:
        raise StudyError(f"the audit was signed with another key than the one given: {value['key']}")
    return Signed(site, value["key"])


def _told(path: Path) -> tuple[Any, Any] | None:
    """The site and the study that an audit speaks of; nothing where it is none, whoever signed it."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return told["site"], told["study_sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _fields(site: str, study_sha256: str, files: dict[str, str]) -> list[str]:
    return [site, study_sha256, *(text for name in sorted(files) for text in (name, files[name]))]


def _read(folder: Path) -> dict[str, Any]:
    if not (folder / SIGNATURE).is_file():
        raise StudyError(f"the folder holds no signed audit ({SIGNATURE})", detail=str(folder))
    try:
        value = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))
        texts = [value[name] for name in ("site", "study_sha256", "key", "signature")]
        sound = (
            value.keys() == _KEYS
            and value["version"] == 1
            and sorted(value["files"]) == sorted(FILES)
            and all(isinstance(text, str) for text in [*texts, *value["files"].values()])
            and len(bytes.fromhex(value["key"])) == KEY_BYTES
            and bool(bytes.fromhex(value["signature"]))
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise StudyError(f"{SIGNATURE} cannot be read: it was changed", detail=str(folder))
    return dict(value)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
