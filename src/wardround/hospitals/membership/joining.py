"""How a hospital joins a federation: a kit becomes a folder, and the site makes the key that signs what it says.

The same command takes a newer kit of the same federation over: certificates and the federation's file are replaced, the
site's key and its own file stay.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

from wardround.errors import Rejected, WardroundError
from wardround.hospitals.certificates import Certificate, check_certificates, read_certificate
from wardround.hospitals.federation import Federation, load_federation
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.keys import make_key, read_key
from wardround.hospitals.membership.kit_archive import FEDERATION, Kit, read_kit
from wardround.hospitals.membership.site_file import site_file
from wardround.wire.files import sync_folder, write_text


@dataclass(frozen=True)
class Joined:
    """A site in its federation: its folder, its public key (32 bytes), and what this call changed."""

    folder: SiteFolder
    federation: Federation
    site: str
    key: bytes
    certificate: Certificate
    renewed: bool
    new_key: bool


def join(kit_path: Path, root: Path | None = None) -> Joined:
    """Join the federation of a kit in a folder, by default one of the federation's name; or renew what is there.

    All or nothing: after an error the folder is as it was. Raises `Rejected` for a kit that is none, is of another
    federation, site or root than the folder's, or is older than the one before; `CertificateError` where its
    certificates are expired or do not fit; `WardroundError` where the folder holds other files.
    """
    kit = read_kit(kit_path)
    folder = SiteFolder(root or Path(kit.federation.name))
    known = _known(folder, kit)
    folder.root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(mkdtemp(dir=folder.root if known else folder.root.parent, prefix=".joining-"))
    try:
        _unpack(kit, draft)
        certificate = _checked(draft, kit, folder if known else None)
        if known:
            for name in _in_order(kit):
                target = folder.root / name
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                (draft / name).rename(target)
                sync_folder(target.parent)
        else:
            _complete(SiteFolder(draft), kit)
            folder.root.rmdir() if folder.root.exists() else None
            draft.rename(folder.root)
            sync_folder(folder.root.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    new_key = known and _complete(folder, kit)
    key = read_key(folder.identity).public
    return Joined(folder, kit.federation, kit.site, key, certificate, known, not known or new_key)


def site_of(folder: SiteFolder) -> str:
    """The name of the site that joined in a folder: that in its certificate."""
    return read_certificate(folder.certificates / "own.crt").name


def joined(root: Path) -> tuple[SiteFolder, Federation]:
    """The folder of a site that joined, and its federation; raises `WardroundError` where none did."""
    folder = SiteFolder(root)
    if not folder.federation.is_file():
        raise WardroundError(
            "the folder is not that of a site that joined a federation: give the one that `wardround site join` made",
            detail=str(root),
        )
    return folder, load_federation(folder.federation)


def _known(folder: SiteFolder, kit: Kit) -> bool:
    """Whether the folder is this site's in this federation already; raises for one that holds anything else."""
    if not os.path.lexists(folder.root):
        return False
    if folder.root.is_symlink() or not folder.root.is_dir():
        raise WardroundError("a file or link lies where the site's folder belongs", detail=str(folder.root))
    if not folder.federation.is_file():
        if any(folder.root.iterdir()):
            raise WardroundError(
                "the folder holds other files, and a site joins in a new one: choose another with --folder",
                detail=str(folder.root),
            )
        return False
    before = load_federation(folder.federation)
    if before.name != kit.federation.name:
        raise Rejected(
            f"the folder is that of federation {before.name}, and the kit of {kit.federation.name}: choose another "
            "folder with --folder, one a federation"
        )
    if before.root_key != kit.federation.root_key:
        raise Rejected(
            f"the kit is of another federation that is called {before.name} too: another root signed it. Ask the "
            "coordinator by telephone; to join a federation that was made anew, choose another folder with --folder"
        )
    return True


def _unpack(kit: Kit, draft: Path) -> None:
    """Write a kit's files, whose names were looked at; only the owner may read them."""
    for name, data in kit.files.items():
        path = draft / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


def _checked(draft: Path, kit: Kit, before: SiteFolder | None) -> Certificate:
    """The kit's certificate, once it is one of the kit's site, valid now, and newer than the one `before`."""
    certificate = check_certificates(draft / "certificates")
    if certificate.name != kit.site:
        raise Rejected("the kit's certificate is for another site than the kit: have it made again")
    if before is None or not (before.certificates / "own.crt").is_file():
        return certificate
    known = read_certificate(before.certificates / "own.crt")
    if known.name != kit.site:
        raise Rejected(f"the folder is that of site {known.name}, and the kit is for {kit.site}: choose the right one")
    if certificate.not_before < known.not_before:
        made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(kit.made))
        raise Rejected(f"the kit, of {made} UTC, is older than the one that the folder has: ask for the newest")
    return certificate


def _in_order(kit: Kit) -> list[str]:
    """The files of a kit, the federation's file last: until it is there, the same kit can be given again."""
    return sorted(kit.files, key=lambda name: (name == FEDERATION, name))


def _complete(folder: SiteFolder, kit: Kit) -> bool:
    """Make what a site has besides the kit's files where it is lacking; whether a key was made."""
    folder.root.chmod(0o700)
    for place in (folder.studies, folder.spool):
        place.mkdir(mode=0o700, exist_ok=True)
    if kit.federation.carrier == "nvflare":
        (folder.nvflare / "transfer").mkdir(mode=0o700, parents=True, exist_ok=True)
    if not folder.site.exists():
        write_text(folder.site, site_file(kit.site), durable=True)
    if folder.identity.exists():
        return False
    make_key(folder.identity)
    return True
