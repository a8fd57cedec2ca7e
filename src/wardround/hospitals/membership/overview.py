"""What a coordinator sees of its federation: who is invited, admitted and present, and which certificates end soon."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wardround.errors import WardroundError
from wardround.hospitals.certificates import read_certificate
from wardround.hospitals.expiry import days_left, urgency, warning
from wardround.hospitals.federation import Federation
from wardround.hospitals.folders import CoordinatorFolder
from wardround.hospitals.membership.kits import certificate_path, coordinators, first_to_end, invited, opened, roster_of
from wardround.hospitals.roster import SignedRoster
from wardround.hospitals.site.running import is_held

# Seconds after which a service that is there and wrote nothing is taken to hang.
_SILENT = 60.0
_LARGEST = 16 << 20
_STATES = {
    "present": "present",
    "late": "late: it was asked and has not answered yet",
    "lost": "lost",
    "never": "never connected",
}


@dataclass(frozen=True)
class SiteLine:
    """A site: whether it has a kit and its key is in the list, its connection, and what is left of its certificate."""

    name: str
    invited: bool
    admitted: bool
    connection: str
    certificate: str


@dataclass(frozen=True)
class Notice:
    """What the coordinator has to act on; `urgent`: within days, or because something stands still."""

    text: str
    urgent: bool


@dataclass(frozen=True)
class Overview:
    """All of it."""

    federation: Federation
    serial: int
    admitted: tuple[str, ...]
    service: str
    sites: tuple[SiteLine, ...]
    studies: tuple[str, ...]
    notices: tuple[Notice, ...]


def overview(root: Path, now: datetime) -> Overview:
    """Look at a federation's folder. Raises `WardroundError` where there is none.

    A list of sites that the root did not sign is a notice, and counts as empty.
    """
    folder, federation = opened(root)
    notices: list[Notice] = []
    keys: Mapping[str, bytes] = {}
    serial = 0
    try:
        roster: SignedRoster = roster_of(folder, federation)
        keys, serial = roster.keys, roster.serial
    except WardroundError as error:
        notices.append(Notice(f"roster.json: {error}", True))
    live, service, at_work = _live(folder, now)
    connections = _connections(live)
    names = sorted({*invited(folder), *keys})
    lines = tuple(_line(folder, name, keys, connections, now, notices) for name in names)
    _coordinator(folder, root, now, notices)
    return Overview(federation, serial, tuple(sorted(keys)), service, lines, _studies(live, at_work), tuple(notices))


def _line(
    folder: CoordinatorFolder,
    name: str,
    keys: Mapping[str, bytes],
    connections: Mapping[str, str],
    now: datetime,
    notices: list[Notice],
) -> SiteLine:
    certificate = "-"
    path = certificate_path(folder, name)
    if path.is_file():
        found = read_certificate(path)
        certificate = f"{days_left(found, now):.0f} days left"
        if said := warning(found, now):
            fix = "make a new kit (`wardround federation invite`) and hand it over"
            notices.append(Notice(f"{name}: {said.removesuffix(': renew it')}; {fix}", urgency(found, now) != "soon"))
    return SiteLine(name, path.is_file(), name in keys, connections.get(name, "unknown"), certificate)


def _coordinator(folder: CoordinatorFolder, root: Path, now: datetime, notices: list[Notice]) -> None:
    found = read_certificate(first_to_end(coordinators(folder)))
    if said := warning(found, now):
        text = f"coordinator: {said.removesuffix(': renew it')}; run `wardround federation renew {root}`"
        notices.append(Notice(text, urgency(found, now) != "soon"))


def _live(folder: CoordinatorFolder, now: datetime) -> tuple[dict[str, Any], str, bool]:
    """What the resident process last wrote, how to say that it did, and whether it is at work.

    Empty where it wrote nothing usable. A process that was killed cannot say so: its lock is free.
    """
    path = folder.status
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(_LARGEST))
        written = path.stat().st_mtime
    except (OSError, ValueError, RecursionError):
        value = None
    at_work = is_held(folder.lock)
    if not isinstance(value, dict):
        return {}, "The service starts." if at_work else "The service was not started.", at_work
    at = datetime.fromtimestamp(written, UTC)
    if not at_work:
        return value, f"The service is not running; this is as of {at:%Y-%m-%d %H:%M} UTC.", False
    if (now - at).total_seconds() > _SILENT:
        return value, f"The service hangs: it wrote nothing since {at:%Y-%m-%d %H:%M} UTC. End it and start it.", True
    return value, "The service runs.", True


def _connections(live: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for site in _objects(live.get("sites")):
        state, seen = str(site.get("state")), site.get("seen")
        text = _STATES.get(state, state)
        if state == "lost" and isinstance(seen, int | float):
            text += f" since {datetime.fromtimestamp(seen, UTC):%Y-%m-%d %H:%M} UTC"
        found[str(site.get("name"))] = text
    return found


def _studies(live: Mapping[str, Any], at_work: bool) -> tuple[str, ...]:
    found = []
    for study in _objects(live.get("studies")):
        state = str(study.get("state"))
        if not at_work and state in ("asking", "running"):
            state = f"not at work, for the service is not running (before: {state})"
        found.append(f"{study.get('name')}: {state}" + (f" ({study['reason']})" if study.get("reason") else ""))
    return tuple(found)


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
