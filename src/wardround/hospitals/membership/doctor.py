"""Whether a site is fit to take part: each thing that goes wrong at hospitals, looked at, with what to do about it.

Everything here is for eyes at the site. No finding is sent anywhere, and none names a patient or a file of one.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from cryptography import x509

from wardround.errors import Rejected, WardroundError, WireError
from wardround.hospitals.certificates import CertificateError, check_certificates
from wardround.hospitals.expiry import Urgency, days_left, urgency
from wardround.hospitals.federation import Federation
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.keys import fingerprint, open_to_others, read_key
from wardround.hospitals.membership.joining import joined, site_of
from wardround.hospitals.membership.reach import Reached, proxy_note, reach
from wardround.hospitals.membership.site_file import MINIMUM_COHORT, files_in, load_site
from wardround.hospitals.roster import SignedRoster, take_over
from wardround.study.sites import SiteData
from wardround.version import __version__
from wardround.wire.files import reason

Level = Literal["ok", "warn", "fail"]
Connect = Callable[[str, int, Path], Reached]
GIGABYTE = 1e9
#: GB of memory and of disk below which a site cannot work, and below which large models will not fit.
MEMORY_GB, DISK_GB = (1.0, 4.0), (1.0, 10.0)
#: Seconds that a site's clock may be off before it is said, and before certificates stop fitting.
CLOCK_S = (30.0, 600.0)
# Files that are counted at most; of more it is said that there are more.
_MOST_FILES = 100_000
_NVFLARE = "2.9."
_LEVELS: dict[Urgency, Level] = {"none": "ok", "soon": "warn", "urgent": "warn", "over": "fail"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: how it is, and what to do where it is not well."""

    level: Level
    what: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Patient:
    """What is examined: a site's folder, its federation and its name."""

    folder: SiteFolder
    federation: Federation
    site: str


def examine(root: Path, connect: Connect | None = None) -> Iterator[Finding]:
    """Look at a site that joined, one finding after the other; `connect` reaches the coordinator (default: `reach`).

    Raises `WardroundError` where the folder is not that of a site.
    """
    folder, federation = joined(root)
    yield from _versions(federation)
    yield from _disk(folder, federation)
    yield from _writable(folder)
    yield from _memory()
    yield from _modes(folder)
    try:
        site = site_of(folder)
    except CertificateError as error:
        yield Finding("fail", "certificate", str(error), "run `wardround site join` with the kit again")
        return
    patient = Patient(folder, federation, site)
    usable = [*_certificates(patient)]
    yield from usable
    yield from _connection(patient, connect or reach, able=all(finding.level != "fail" for finding in usable))
    yield from _identity(patient)
    yield from _site_file(patient)
    yield from _stopped(folder)


def _versions(federation: Federation) -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    found = ", ".join(f"{name} {_version(name) or 'missing'}" for name in ("torch", "cryptography"))
    whole = _version("torch") is not None
    fix = "" if whole else "install Wardround with all it needs: pip install wardround"
    yield Finding("ok" if whole else "fail", "versions", f"wardround {__version__}, Python {python}, {found}", fix)
    if federation.carrier != "nvflare":
        return
    nvflare = _version("nvflare")
    if nvflare is None:
        yield Finding(
            "fail", "NVFlare", "it carries this federation's messages, and is not installed here", _install_nvflare()
        )
    elif not nvflare.startswith(_NVFLARE):
        yield Finding("fail", "NVFlare", f"version {nvflare}, and {_NVFLARE}x is needed", _install_nvflare())
    else:
        yield Finding("ok", "NVFlare", f"version {nvflare}")


def _install_nvflare() -> str:
    return "pip install 'wardround[hospitals]'"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _disk(folder: SiteFolder, federation: Federation) -> Iterator[Finding]:
    free = shutil.disk_usage(folder.root).free / GIGABYTE
    # A model that arrives and the update that leaves lie there at once.
    wanted = max(DISK_GB[1], 2 * federation.largest_gb)
    level: Level = "fail" if free < DISK_GB[0] else "warn" if free < wanted else "ok"
    fix = f"make room: {wanted:.0f} GB are advised, for two messages of {federation.largest_gb:g} GB at once"
    yield Finding(level, "disk", f"{free:.1f} GB are free for the folder", "" if level == "ok" else fix)


def _writable(folder: SiteFolder) -> Iterator[Finding]:
    places = [folder.root, *(place for place in (folder.studies, folder.spool) if place.exists())]
    if not all(os.access(place, os.W_OK | os.X_OK) for place in places):
        text = "the user who runs this cannot write into the site's folder"
        yield Finding("fail", "folder", text, "run this as the user who joined, or chown the folder")


def _memory() -> Iterator[Finding]:
    free = _memory_gb()
    if free is None:
        yield Finding("warn", "memory", "this system does not say how much is free", "look with its own tools")
        return
    level: Level = "fail" if free < MEMORY_GB[0] else "warn" if free < MEMORY_GB[1] else "ok"
    fix = "stop other programs, or use a larger computer; `wardround plan` says what a study takes"
    yield Finding(level, "memory", f"{free:.1f} GB are free", "" if level == "ok" else fix)


def _memory_gb() -> float | None:
    """GB of memory that a new process could have; Linux alone says it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 / GIGABYTE
    return None


def _modes(folder: SiteFolder) -> Iterator[Finding]:
    private = [folder.identity, folder.certificates / "own.key"]
    private += sorted((folder.nvflare / "startup").glob("*.key"))
    there = [path for path in private if path.is_file()]
    exposed = [path.relative_to(folder.root).as_posix() for path in there if open_to_others(path)]
    if exposed:
        fix = f"chmod 600 {' '.join(exposed)}; if other people use this computer, ask the coordinator for new ones"
        yield Finding("fail", "private keys", f"other users of this computer can read {', '.join(exposed)}", fix)
    elif there:
        yield Finding("ok", "private keys", "only their owner can read them")


def _certificates(patient: Patient) -> Iterator[Finding]:
    try:
        certificate = check_certificates(patient.folder.certificates)
    except CertificateError as error:
        yield Finding("fail", "certificate", *_split(error, "ask the coordinator for a new kit (`federation invite`)"))
        return
    ends = [certificate.not_after]
    client = patient.folder.nvflare / "startup" / "client.crt"
    if patient.federation.carrier == "nvflare":
        try:
            ends.append(x509.load_pem_x509_certificate(client.read_bytes()).not_valid_after_utc)
        except (OSError, ValueError):
            yield Finding("fail", "certificate", "NVFlare's kit lacks its certificate", "join with the kit again")
            return
    now = datetime.now(UTC)
    first = _Span(certificate.not_before, min(ends))
    left, how = days_left(first, now), urgency(first, now)
    level = _LEVELS[how]
    fix = (
        "ask the coordinator for a new kit (`federation invite`), then run `wardround site join` with it in this folder"
    )
    text = f"of site {patient.site}, for {left:.0f} more days (until {first.not_after:%Y-%m-%d})"
    yield Finding(level, "certificate", text, "" if level == "ok" else fix)


@dataclass(frozen=True)
class _Span:
    not_before: datetime
    not_after: datetime


def _split(error: WardroundError, fix: str) -> tuple[str, str]:
    """What is wrong and what to do, of an error whose text says both."""
    text, _, own = str(error).partition("; ")
    return text, own or fix


def _connection(patient: Patient, connect: Connect, *, able: bool) -> Iterator[Finding]:
    host, port = patient.federation.host, patient.federation.port
    if note := proxy_note():
        fix = "if the coordinator is not reached, ask IT for outgoing TCP to it; else this needs nothing"
        yield Finding("warn", "proxy", note, fix)
    if not able:
        yield Finding("fail", "coordinator", "not tried: the certificate cannot be used", "see above")
        return
    found = connect(host, port, patient.folder.certificates)
    if not found.connected:
        yield Finding("fail", "coordinator", found.fault, found.fix)
        yield from _clock_by_file(patient.folder)
        return
    where = f"{host}, port {port}: reached, and both ends know each other's certificate"
    if patient.federation.carrier == "https" and not found.answered:
        fix = "ask the coordinator to look into its log; it may refuse this site"
        yield Finding("warn", "coordinator", f"{where}, but it hung up without an answer", fix)
    else:
        yield Finding("ok", "coordinator", where)
    yield from _clock(found.ahead) if found.ahead is not None else _clock_by_file(patient.folder)


def _clock(ahead: float) -> Iterator[Finding]:
    off = abs(ahead)
    level: Level = "fail" if off > CLOCK_S[1] else "warn" if off > CLOCK_S[0] else "ok"
    # The coordinator says whole seconds, and its answer takes time.
    side = "ahead of" if ahead > 0 else "behind"
    text = "agrees with the coordinator's" if off <= 2 else f"{off:.0f} s {side} the coordinator's"
    yield Finding(level, "clock", text, "" if level == "ok" else "switch on time synchronisation (NTP)")


def _clock_by_file(folder: SiteFolder) -> Iterator[Finding]:
    """Without the coordinator: a clock cannot be before the time at which the federation's file was made here."""
    made = folder.federation.stat().st_mtime
    if time.time() < made - CLOCK_S[0]:
        text = "this computer's clock is behind the time at which this site joined"
        yield Finding("fail", "clock", text, "switch on time synchronisation (NTP)")
    else:
        yield Finding("ok", "clock", "plausible; the coordinator's was not seen")


def _identity(patient: Patient) -> Iterator[Finding]:
    try:
        key = read_key(patient.folder.identity).public
    except WardroundError as error:
        fix = "restore identity.key from a copy; else join again, and the coordinator admits the new key (--replace)"
        yield Finding("fail", "site's key", str(error), fix)
        return
    yield Finding("ok", "site's key", f"{key.hex()} ({fingerprint(key)})")
    admit = f"read the key to the coordinator (`wardround federation admit FOLDER {patient.site} KEY`)"
    if not patient.folder.roster.is_file():
        text = "no list of sites came yet: the key is not admitted, or no study was proposed"
        yield Finding("warn", "list of sites", text, f"if not done, {admit}")
        return
    root_key = bytes.fromhex(patient.federation.root_key)
    name = patient.federation.name
    try:
        roster = SignedRoster.load(patient.folder.roster)
        take_over(roster, None, federation=name, root_key=root_key, site=patient.site, key=key)
    except (Rejected, WireError) as error:
        yield Finding("fail", "list of sites", str(error), admit)
    else:
        text = f"admitted, with {len(roster.keys) - 1} other sites (serial {roster.serial})"
        yield Finding("ok", "list of sites", text)


def _site_file(patient: Patient) -> Iterator[Finding]:
    try:
        entry = load_site(patient.folder, patient.site)
    except WardroundError as error:
        yield Finding("fail", "site.yaml", str(error), f"edit site.yaml in {patient.folder.root}")
        return
    least = entry.egress.minimum_cohort
    if least < MINIMUM_COHORT:
        text = f"counts over as few as {least} patients leave"
        yield Finding("warn", "site.yaml", text, f"set egress.minimum_cohort to {MINIMUM_COHORT} or more")
    else:
        yield Finding("ok", "site.yaml", f"can be read; counts over fewer than {least} patients stay")
    yield from _data(entry)
    if entry.device != "cpu":
        yield from _device(entry, patient.site)


def _data(entry: SiteData) -> Iterator[Finding]:
    try:
        files, folders = files_in(entry.data, _MOST_FILES)
    except OSError as error:
        yield Finding("fail", "data", f"cannot be read: {reason(error)}", "let the agent's user read the data folder")
        return
    if not files:
        yield Finding("fail", "data", "the data folder holds no file", "correct `data` in site.yaml, or mount the disk")
        return
    more = "at least " if files >= _MOST_FILES else ""
    counts = f"{files:,} {'file' if files == 1 else 'files'}, {folders:,} {'folder' if folders == 1 else 'folders'}"
    yield Finding("ok", "data", more + counts)


def _device(entry: SiteData, site: str) -> Iterator[Finding]:
    """Looked at last and late: torch takes seconds to import, and a broken driver breaks it."""
    try:
        import torch

        from wardround.learning.device import compute_of

        device = compute_of(entry.device, entry.precision, site).device
        text = f"{entry.device} is {device}"
        if device.type == "cuda":
            free, whole = torch.cuda.mem_get_info(device)
            text = f"{torch.cuda.get_device_name(device)}, {free / GIGABYTE:.1f} of {whole / GIGABYTE:.1f} GB free"
        yield Finding("ok", "device", text)
    except WardroundError as error:
        yield Finding("fail", "device", *_split(error, "set `device: cpu` in site.yaml"))
    except (ImportError, OSError, RuntimeError) as error:
        text = f"torch cannot use {entry.device} ({type(error).__name__})"
        yield Finding("fail", "device", text, "repair the driver or torch; or set `device: cpu` in site.yaml")


def _stopped(folder: SiteFolder) -> Iterator[Finding]:
    if folder.stopped.exists():
        text = "this site is stopped: nothing runs and nothing leaves"
        yield Finding("warn", "kill switch", text, "when it may go on: `wardround site resume`")
