"""Start-up kits of NVFlare from the federation's own authority, hardened: what NVFlare leaves open is closed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wardround.errors import MissingExtra, StudyError, WardroundError
from wardround.hospitals.federation import Federation
from wardround.hospitals.folders import CoordinatorFolder

SERVER, ADMIN = "server", "admin"
#: The name in the certificate of NVFlare's server, by which sites know it; no site may have it.
SERVER_NAME = "coordinator"
ADMIN_NAME = "coordinator@wardround.invalid"
ORGANISATION = "wardround"
#: What a job may build: classes of this package, which check what they are given. Code of a job's own is refused.
ALLOWED = ("wardround.hospitals.nvflare.",)
#: Seconds without a heart-beat (one each 10 s) after which NVFlare's server drops a client.
HEARTBEAT = 60
_ROLE = "lead"
_RIGHTS = (
    "submit_job",
    "clone_job",
    "manage_job",
    "download_job",
    "view",
    "operate",
    "shell_commands",
    "byoc",
    "server-predeployed-flwr",
)


def provision(folder: CoordinatorFolder, federation: Federation, authority: Path, site: str | None) -> Path:
    """Make the kit of a site, or with None those of the server and of the administrator; the folder it lies in.

    `authority` holds `ca.crt` and `ca.key`. Each kit has a key of its own, signed by that authority; kits that were
    made before stay as they are. The kit of one name that is made again replaces the earlier one. A kit holds a private
    key: whoever has it can connect, and cannot answer for the site, as replies are signed by another key.

    Raises `MissingExtra` without NVFlare, `StudyError` for a name that NVFlare does not take, `WardroundError` where
    NVFlare makes no kit.
    """
    if site == SERVER_NAME:
        raise StudyError(f"site {site}: this name is the coordinator's own; choose another")
    folder.nvflare.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Beside the kits, so that they are moved and not copied; NVFlare's own records hold every key and go with it.
    with tempfile.TemporaryDirectory(dir=folder.nvflare, prefix=".kits-") as scratch:
        made = _build(Path(scratch), federation, authority, site)
        if site is not None:
            _harden_site(made / site)
            return _place(made / site, site_kit(folder, site))
        _harden_server(made / SERVER_NAME, server_workspace(folder))
        _harden_admin(made / ADMIN_NAME)
        _place(made / SERVER_NAME, server_workspace(folder))
        _place(made / ADMIN_NAME, admin_kit(folder))
    return folder.nvflare


def site_kit(folder: CoordinatorFolder, site: str) -> Path:
    """Where the kit of a site lies at the coordinator until it is handed over."""
    return folder.nvflare / "sites" / site


def server_workspace(folder: CoordinatorFolder) -> Path:
    """The folder that NVFlare's server runs in."""
    return folder.nvflare / SERVER


def admin_kit(folder: CoordinatorFolder) -> Path:
    """The kit by which the coordinator hands jobs to NVFlare's server."""
    return folder.nvflare / ADMIN


def _build(scratch: Path, federation: Federation, authority: Path, site: str | None) -> Path:
    """Let NVFlare make the kits; the folder that holds one folder a participant."""
    try:
        from nvflare.lighter.entity import Participant, Project
        from nvflare.lighter.impl.cert import CertBuilder
        from nvflare.lighter.impl.static_file import StaticFileBuilder
        from nvflare.lighter.impl.workspace import WorkspaceBuilder
        from nvflare.lighter.provisioner import Provisioner
    except ImportError:
        raise MissingExtra("the carrier NVFlare", "hospitals") from None
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    root, key = (authority / "ca.crt").read_bytes(), (authority / "ca.key").read_bytes()
    ports = {"fed_learn_port": federation.port, "admin_port": federation.port}
    hosts = {"default_host": federation.host, "host_names": [federation.host, "localhost"]}
    try:
        parties = [Participant("server", SERVER_NAME, ORGANISATION, {**ports, **hosts})]
        if site is None:
            parties.append(Participant("admin", ADMIN_NAME, ORGANISATION, {"role": _ROLE}))
        else:
            parties.append(Participant("client", site, ORGANISATION))
        project = Project(federation.name, "", parties, None, root, load_pem_private_key(key, password=None))
    except ValueError as error:
        raise StudyError(f"NVFlare takes no such name: {error}") from None
    builders = [WorkspaceBuilder(), StaticFileBuilder(config_folder="config", require_signed_jobs=True), CertBuilder()]
    quiet = _Quiet()
    made = Provisioner(str(scratch), builders).provision(project, logger=quiet)
    if made.get("build_error") or "current_prod_dir" not in made:
        raise WardroundError("NVFlare made no start-up kit", detail="\n".join(quiet.said))
    return Path(made["current_prod_dir"])


class _Quiet:
    """What NVFlare says while it makes kits: kept, not printed."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def info(self, text: str) -> None:
        self.said.append(text)

    debug = warning = error = info


def _place(made: Path, kit: Path) -> Path:
    kit.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in made.rglob("*"):
        if path.suffix == ".key":
            path.chmod(0o600)
    made.chmod(0o700)
    if kit.exists():
        shutil.rmtree(kit)
    os.replace(made, kit)
    return kit


def _harden_site(kit: Path) -> None:
    """No logs leave, no code comes in, only this package's classes are built, and the coordinator has no shell."""
    resources = _defaults(kit)
    components = [each for each in resources["components"] if each["id"] != "site_log_streamer"]
    resources |= {**_allow_list(), "allow_log_streaming": False, "components": components}
    _write(kit / "local" / "resources.json", resources)
    _write(kit / "local" / "authorization.json", _policy("submit_job", "manage_job"))


def _harden_server(kit: Path, workspace: Path) -> None:
    """As at a site; and jobs lie in a folder of this server's own, as many as there are sites."""
    resources = _defaults(kit)
    resources["servers"][0]["heart_beat_timeout"] = HEARTBEAT
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(workspace.absolute() / SNAPSHOTS)
    components = [each for each in resources["components"] if each["id"] != "log_receiver"]
    for each in components:
        if each["id"] == "job_manager":
            each["args"]["uri_root"] = str(workspace.absolute() / JOBS)
        if each["id"] == "job_scheduler":
            # A job of a site that is away waits for it; NVFlare gives up after ten attempts by itself.
            each["args"] = {
                "max_jobs": 1000,
                "max_schedule_count": 1_000_000_000,
                "min_schedule_interval": 1.0,
                "max_schedule_interval": 5.0,
            }
    _write(kit / "local" / "resources.json", {**resources, **_allow_list(), "components": components})
    allowed = ("submit_job", "manage_job", "view")
    _write(kit / "local" / "authorization.json", _policy(*allowed))


SNAPSHOTS, JOBS = "snapshots", "jobs"


def _harden_admin(kit: Path) -> None:
    """The administrator is on the server's machine: it takes the short way, whatever name sites have for it."""
    path = kit / "startup" / "fed_admin.json"
    config = json.loads(path.read_text())
    config["admin"]["host"] = "localhost"
    _write(path, config)


def _defaults(kit: Path) -> dict[str, Any]:
    return dict(json.loads((kit / "local" / "resources.json.default").read_text()))


def _allow_list() -> dict[str, Any]:
    return {"class_list_enforcement_mode": "enforce", "class_allow_list": list(ALLOWED)}


def _policy(*allowed: str) -> Mapping[str, Any]:
    closed = dict.fromkeys(_RIGHTS, "none")
    roles = dict.fromkeys(("project_admin", "org_admin", "member"), closed)
    return {"format_version": "1.0", "permissions": {**roles, _ROLE: closed | dict.fromkeys(allowed, "any")}}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
