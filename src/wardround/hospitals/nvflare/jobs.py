"""NVFlare's jobs of this package: one a site, of two classes of ours, without code and without anything of a study."""

from __future__ import annotations

import json
import logging
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from wardround.errors import MissingExtra
from wardround.hospitals.nvflare.provision import ADMIN_NAME

_PACKAGE = "wardround.hospitals.nvflare"
# Seconds between two questions of a site for a task. There are none: messages come at once, and need no question.
_POLL = 10.0
#: States of a job that waits to be started: for its site, mostly.
WAITING = frozenset({"SUBMITTED", "APPROVED"})
#: States of a job that is being started, or runs.
RUNNING = frozenset({"DISPATCHED", "RUNNING"})


def write_job(folder: Path, site: str) -> Path:
    """Write the job of a site's line into `folder`, anew."""
    shutil.rmtree(folder, ignore_errors=True)
    config = folder / "app" / "config"
    config.mkdir(parents=True)
    filters: dict[str, Any] = {"task_data_filters": [], "task_result_filters": [], "components": []}
    relay = {"id": "relay", "path": f"{_PACKAGE}.relay.Relay", "args": {"site": site}}
    proxy = {"tasks": ["none"], "executor": {"path": f"{_PACKAGE}.proxy.Proxy", "args": {}}}
    server = {"format_version": 2, "server": {"task_request_interval": _POLL}, **filters, "workflows": [relay]}
    client = {"format_version": 2, **filters, "executors": [proxy]}
    meta = {"name": folder.name, "resource_spec": {}, "deploy_map": {"app": ["server", site]}, "min_clients": 1}
    for path, value in (
        (config / "config_fed_server.json", server),
        (config / "config_fed_client.json", client),
        (folder / "meta.json", meta),
    ):
        path.write_text(json.dumps(value, indent=1) + "\n")
    return folder


class Jobs:
    """NVFlare's server, as its administrator uses it. A call that fails ends the session; the next begins another."""

    def __init__(self, kit: Path, scratch: Path) -> None:
        self._kit, self._scratch = kit, scratch
        self._session: Any = None

    def submit(self, site: str) -> str:
        """Hand in the job of a site; its number. Raises an error of NVFlare's where the server is away."""
        return self.hand_in(write_job(self._scratch / f"line-{site}", site))

    def hand_in(self, folder: Path) -> str:
        """Hand in the job in a folder; its number."""
        return str(self._call("submit_job", str(folder)))

    def state(self, job: str) -> str:
        """What NVFlare says of a job, for example RUNNING or FINISHED:COMPLETED."""
        return str(self._call("get_job_meta", job).get("status", ""))

    def abort(self, job: str) -> None:
        """End a job, whatever it does."""
        self._call("abort_job", job)

    def delete(self, job: str) -> None:
        """Remove a job that ended from the server's store."""
        self._call("delete_job", job)

    def close(self) -> None:
        """End the session."""
        session, self._session = self._session, None
        if session is not None:
            with suppress(Exception):
                session.close()

    def _call(self, name: str, *arguments: str) -> Any:
        try:
            return getattr(self._opened(), name)(*arguments)
        except Exception:
            self.close()
            raise

    def _opened(self) -> Any:
        if self._session is None:
            try:
                from nvflare.fuel.flare_api.flare_api import new_secure_session
            except ImportError:
                raise MissingExtra("the carrier NVFlare", "hospitals") from None
            # Its attempts to connect are ours to make: each of its own is a line in the log.
            logging.getLogger("nvflare").setLevel(logging.CRITICAL)
            self._session = new_secure_session(ADMIN_NAME, str(self._kit), timeout=5.0)
        return self._session
