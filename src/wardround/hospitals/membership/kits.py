"""What a consortium does to stand up a federation: make it, invite hospitals with a kit each, and admit their keys.

The private keys of the root (`ca.key`, which signs certificates, and `root.key`, which signs kits and the list of
sites) are needed by these functions alone. The coordinator's resident process reads neither, so both may lie elsewhere.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from pydantic import TypeAdapter, ValidationError

from wardround.errors import MissingExtra, WardroundError
from wardround.hospitals.certificates import Certificate, issue, make_authority, read_certificate
from wardround.hospitals.federation import Federation, load_federation, save_federation
from wardround.hospitals.folders import CoordinatorFolder
from wardround.hospitals.keys import make_key, read_key
from wardround.hospitals.membership.kit_archive import CERTIFICATES, FEDERATION, NVFLARE, README, write_kit
from wardround.hospitals.roster import SignedRoster, admitted
from wardround.protection.identity import Identity
from wardround.study.schema import RESERVED_NAMES, SiteName
from wardround.wire.files import written

#: The name in the coordinator's certificate; no site can have it.
COORDINATOR = "coordinator"
NVFLARE_CLIENT = "startup/client.crt"
ROOT_KEY, AUTHORITY_CERTIFICATE, AUTHORITY_KEY = "root.key", "ca.crt", "ca.key"
# NVFlare's form of a client's name.
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")
Provision = Callable[[CoordinatorFolder, Federation, Path, str | None], Path]


@dataclass(frozen=True)
class Invitation:
    """A kit that was made for a site."""

    site: str
    kit: Path
    certificate: Certificate
    renewed: bool


@dataclass(frozen=True)
class Admission:
    """A site's key in the list of sites; `changed` is false where it was in it before."""

    site: str
    key: bytes
    roster: SignedRoster
    changed: bool


def init(root: Path, federation: Federation, authority: Path | None = None) -> Federation:
    """Make a federation in a new folder; the private keys of its root go to `authority`, by default `root/root`.

    `federation.root_key` is replaced by that of the new root. After an error nothing is left behind. Raises
    `WardroundError` where the folder holds anything already, `MissingExtra` where NVFlare is to carry and is not there.
    """
    folder = CoordinatorFolder(root)
    keys = authority or folder.authority
    for place in (root, keys):
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise WardroundError(
                "the folder holds files already, and a federation is made in a new one: choose another, or move them "
                "away",
                detail=str(place),
            )
    _check_carrier(federation)
    with _all_or_nothing(root, keys):
        for place in (root, keys):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            place.chmod(0o700)
        make_authority(keys, federation.name)
        identity = make_key(keys / ROOT_KEY)
        made = federation.model_copy(update={"root_key": identity.public.hex()})
        issue(keys, folder.certificates, COORDINATOR, host=made.host)
        SignedRoster.sign(made.name, 0, {}, identity).save(folder.roster)
        folder.kits.mkdir(mode=0o700)
        if made.carrier == "nvflare":
            _provision()(folder, made, keys, None)
        save_federation(made, folder.federation)
    return made


def invite(root: Path, site: str, authority: Path | None = None, *, days: int = 365) -> Invitation:
    """Make a certificate for a site, and the kit by which it joins; again for a known site, both are renewed.

    Raises `WardroundError` where there is no federation, the name is none that a site can have, or the root's keys are
    elsewhere.
    """
    folder, federation = opened(root)
    site = checked_name(site, federation, invited(folder))
    keys, identity = _root_keys(folder, federation, authority)
    renewed = certificate_path(folder, site).is_file()
    with TemporaryDirectory(dir=_made(folder.kits), prefix=".kit-") as scratch:
        issue(keys, Path(scratch), site, days=days)
        files = {name: (Path(scratch) / Path(name).name).read_bytes() for name in CERTIFICATES}
        files[FEDERATION] = folder.federation.read_bytes()
        files[README] = _readme(federation, site).encode()
        ends = [Path(scratch) / "own.crt"]
        if federation.carrier == "nvflare":
            made = _provision()(folder, federation, keys, site)
            files |= _nvflare_files(made)
            # The private key in it is in the kit now, and in no second place.
            ends.append(made.rename(Path(scratch) / "nvflare") / NVFLARE_CLIENT)
        kit = folder.kits / f"{site}.zip"
        write_kit(kit, federation.name, site, int(time.time()), files, identity)
        first = first_to_end(ends)
        certificate = read_certificate(first)
        with written(certificate_path(folder, site), durable=True) as file:
            file.write(first.read_bytes())
    return Invitation(site, kit, certificate, renewed)


def admit(root: Path, site: str, key: bytes, authority: Path | None = None, *, replace: bool = False) -> Admission:
    """Write a site's public key into the list of sites, and sign that with the root's key.

    Raises `WardroundError` for a site that was not invited, and `Rejected` where the site has another key already and
    `replace` is not set, or another site has this key.
    """
    folder, federation = opened(root)
    site = checked_name(site, federation, invited(folder))
    if not certificate_path(folder, site).is_file():
        known = ", ".join(invited(folder)) or "none"
        raise WardroundError(f"site {site} was not invited; invited are: {known}. Make its kit first (`invite`)")
    if key == bytes.fromhex(federation.root_key):
        raise WardroundError(
            f"this is the federation's own root key, not that of site {site}: ask the site for the line that "
            "`wardround site join` printed"
        )
    _, identity = _root_keys(folder, federation, authority)
    before = roster_of(folder, federation)
    after = admitted(before, site, key, identity, replace=replace)
    if after is not before:
        after.save(folder.roster)
    return Admission(site, key, after, after is not before)


def renew(root: Path, authority: Path | None = None, *, days: int = 365) -> Certificate:
    """Make the coordinator's own certificate anew, for the host that the federation's file names now."""
    folder, federation = opened(root)
    keys, _ = _root_keys(folder, federation, authority)
    issue(keys, folder.certificates, COORDINATOR, host=federation.host, days=days)
    if federation.carrier == "nvflare":
        _provision()(folder, federation, keys, None)
    return read_certificate(first_to_end(coordinators(folder)))


def coordinators(folder: CoordinatorFolder) -> list[Path]:
    """The certificates by which the coordinator is known: its own, and those of NVFlare's server and administrator."""
    of_nvflare = (folder.nvflare / "server/startup/server.crt", folder.nvflare / "admin/startup/client.crt")
    return [folder.certificates / "own.crt", *(path for path in of_nvflare if path.is_file())]


def first_to_end(certificates: list[Path]) -> Path:
    """Of some certificates the one that ends first. Raises `CertificateError` where one cannot be read."""
    return min(certificates, key=lambda path: read_certificate(path).not_after)


def opened(root: Path) -> tuple[CoordinatorFolder, Federation]:
    """The folder of a federation and its file; raises `WardroundError` where there is none."""
    folder = CoordinatorFolder(root)
    if not folder.federation.is_file():
        raise WardroundError(
            "the folder holds no federation: give the one that `wardround federation init` made", detail=str(root)
        )
    return folder, load_federation(folder.federation)


def roster_of(folder: CoordinatorFolder, federation: Federation) -> SignedRoster:
    """The list of sites, verified; raises `WireError` or `Rejected` where the root did not sign what lies there."""
    roster = SignedRoster.load(folder.roster)
    roster.verify(bytes.fromhex(federation.root_key))
    return roster


def invited(folder: CoordinatorFolder) -> tuple[str, ...]:
    """The sites for which there is a kit, sorted."""
    return tuple(sorted(path.stem for path in folder.kits.glob("*.crt")))


def certificate_path(folder: CoordinatorFolder, site: str) -> Path:
    """The copy of a site's certificate (of several, the one that ends first) that stays here, without its key."""
    return folder.kits / f"{site}.crt"


def checked_name(site: str, federation: Federation, known: tuple[str, ...]) -> str:
    """A site's name in the form that studies use; raises `WardroundError` for one that no site can have."""
    try:
        name = TypeAdapter(SiteName).validate_python(site)
    except ValidationError:
        raise WardroundError(
            "a site's name begins with a letter and has at most 32 letters, digits, hyphens and underscores"
        ) from None
    if name in RESERVED_NAMES:
        raise WardroundError(f"{name} is a word of results and no site's name; choose another")
    if federation.carrier == "nvflare" and _PLAIN.fullmatch(name) is None:
        raise WardroundError(f"site {name}: NVFlare takes names of the letters a to z, digits, hyphens and underscores")
    twin = next((other for other in known if other != name and other.casefold() == name.casefold()), None)
    if twin is not None:
        raise WardroundError(f"site {name}: there is a site {twin}, and people mix up the two; choose another name")
    return name


def _root_keys(folder: CoordinatorFolder, federation: Federation, authority: Path | None) -> tuple[Path, Identity]:
    keys = authority or folder.authority
    if not (keys / ROOT_KEY).is_file() or not (keys / AUTHORITY_KEY).is_file():
        raise WardroundError(
            f"the root's private keys ({AUTHORITY_KEY} and {ROOT_KEY}) are not there: put in the medium that holds "
            "them, and give its folder with --root",
            detail=str(keys),
        )
    identity = read_key(keys / ROOT_KEY)
    if identity.public.hex() != federation.root_key:
        raise WardroundError("these root keys are of another federation: give the folder of this one", detail=str(keys))
    return keys, identity


def _check_carrier(federation: Federation) -> None:
    if federation.carrier == "nvflare" and find_spec("nvflare") is None:
        raise MissingExtra("a federation whose messages NVFlare carries", "hospitals")


def _provision() -> Provision:
    """What makes NVFlare's own start-up kits; imported where it is needed, for NVFlare is an extra."""
    return cast(Provision, importlib.import_module("wardround.hospitals.nvflare.provision").provision)


def _nvflare_files(kit: Path) -> Mapping[str, bytes]:
    paths = sorted(path for path in kit.rglob("*") if path.is_file() and not path.is_symlink())
    return {NVFLARE + path.relative_to(kit).as_posix(): path.read_bytes() for path in paths}


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@contextmanager
def _all_or_nothing(*places: Path) -> Iterator[None]:
    """After an error, remove folders that were absent before, and empty those that were empty."""
    absent = [not os.path.lexists(place) for place in places]
    try:
        yield
    except BaseException:
        for place, new in zip(places, absent, strict=True):
            for path in list(place.iterdir()) if place.is_dir() else []:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if new and place.is_dir():
                place.rmdir()
        raise


def _readme(federation: Federation, site: str) -> str:
    return f"""Kit of site {site} for the federation {federation.name}

1. Install Wardround:        pip install '{"wardround[hospitals]" if federation.carrier == "nvflare" else "wardround"}'
2. Join:                     wardround site join {site}.zip
3. Call the coordinator, compare the words that both sides see, and read out your site's key.
4. Fill in site.yaml in the new folder: where the data lie, and what may leave.
5. Look whether all is well: wardround site doctor FOLDER
6. Start:                    wardround site start FOLDER

This archive holds a private key for the connection. Keep it as you keep a password, and delete it when you have joined.
Your computer connects to {federation.host}, port {federation.port} (TCP, TLS at both ends); no port of yours is opened.
"""
