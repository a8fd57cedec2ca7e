"""Units of systemd that keep a coordinator's or a site's resident process running, with as few rights as it needs.

The process gets no capability, gains none, writes into its own folder alone, and starts again after a crash or a
restart of the computer (systemd.exec(5), systemd.service(5)).
"""

from __future__ import annotations

import getpass
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from wardround.errors import WardroundError
from wardround.wire.files import write_text

_TEXT = """\
# Made by Wardround. Install: {install}
# Whatever ends the process, it starts again, but for: sudo systemctl stop {name}
[Unit]
Description={description}
Documentation=https://systemd.io man:systemd.exec(5)
Wants=network-online.target
After=network-online.target
# A coordinator may be away for days: the service never gives up.
StartLimitIntervalSec=0

[Service]
Type=exec
User={user}
ExecStart={command}
Restart=always
RestartSec=10
# The first signal asks it to finish what it writes; what is left of it after this time is ended.
KillMode=mixed
TimeoutStopSec=60
Environment=OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
Environment={environment}
UMask=0077
WorkingDirectory={place}

# Nothing but its own folder can be written; data are read where they lie. A ledger or history that a site's file puts
# elsewhere needs its folder here, too.
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={folder}
{hidden}PrivateTmp=yes

# No rights, and no way to get any.
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
RestrictSUIDSGID=yes
LockPersonality=yes
RestrictNamespaces=yes
RestrictRealtime=yes
SystemCallArchitectures=native
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectClock=yes
ProtectHostname=yes
# Names are looked up through netlink.
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
{devices}
[Install]
WantedBy=multi-user.target
"""
# GPUs are devices; where a site has none, its hospital may add PrivateDevices=yes.
_NO_DEVICES = "PrivateDevices=yes\n"


@dataclass(frozen=True)
class Service:
    """A unit: its name, its text, and the commands that install it."""

    name: str
    text: str
    install: str

    def write(self, folder: Path) -> Path:
        """Write the unit into a folder; the path."""
        path = folder / self.name
        write_text(path, self.text)
        return path


def coordinator_service(folder: Path, federation: str, user: str | None = None) -> Service:
    """The unit of a federation's coordinator; the private keys of the root and in kits are hidden from it."""
    return _service("federation", folder, f"Wardround: coordinator of {federation}", federation, user, coordinator=True)


def site_service(folder: Path, federation: str, site: str, user: str | None = None) -> Service:
    """The unit of a site's agent; it sees the computer's devices, for a GPU is one."""
    return _service("site", folder, f"Wardround: site {site} of {federation}", federation, user, coordinator=False)


def _service(
    group: str, folder: Path, description: str, federation: str, user: str | None, *, coordinator: bool
) -> Service:
    place = folder.absolute()
    name = f"wardround-{group}-{federation}.service"
    unit = shlex.quote(str(place / name))
    install = f"sudo cp {unit} /etc/systemd/system/ && sudo systemctl enable --now {name}"
    owner = user or _user()
    if owner != _maker():
        install = f"sudo useradd --system {owner}; sudo chown -R {owner} {shlex.quote(str(place))} && {install}"
    private = [_path(place / name) for name in ("root", "kits")] if coordinator else []
    hidden = "".join(f"InaccessiblePaths=-{path}\n" for path in private)
    text = _TEXT.format(
        install=install,
        name=name,
        description=_specified(description),
        user=owner,
        command=" ".join(_argument(part) for part in (sys.executable, "-m", "wardround", group, "start", str(place))),
        environment=_quoted(_specified(f"XDG_CACHE_HOME={place / 'cache'}")),
        folder=_path(place),
        place=_specified(str(place)),
        hidden=hidden,
        devices=_NO_DEVICES if coordinator else "",
    )
    return Service(name, text, install)


def _maker() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "root"


def _user() -> str:
    """Who runs the service: who makes it, but for root, which no service of ours runs as."""
    name = _maker()
    return "wardround" if name == "root" else name


def _path(path: Path) -> str:
    return _quoted(_specified(str(path)))


def _argument(text: str) -> str:
    """A word of a command: `$` begins a variable there."""
    return _quoted(_specified(text).replace("$", "$$"))


def _specified(text: str) -> str:
    """A text in which systemd replaces nothing. Raises `WardroundError` where it would not be one line."""
    if any(ord(sign) < 32 or ord(sign) == 127 for sign in text):
        raise WardroundError("a unit of systemd cannot name a folder with line breaks: choose another folder")
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    if not any(sign in text for sign in " \"'\\;"):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
