"""NVFlare's client at a site, as the site's resident process sees it."""

from __future__ import annotations

import threading

from wardround.hospitals.federation import Federation
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.nvflare.names import AGENT, LARGEST, SPOOL
from wardround.hospitals.nvflare.processes import Supervised, tidy
from wardround.hospitals.nvflare.provision import ORGANISATION

_PURGE = 300.0


class ClientProcess:
    """Keeps NVFlare's client running with the kit in the site's folder; it opens no port that others reach."""

    def __init__(self, federation: Federation, folder: SiteFolder, site: str) -> None:
        self._spool = folder.spool / "nvflare"
        environment = {
            AGENT: str(folder.socket.absolute()),
            SPOOL: str(self._spool.absolute()),
            LARGEST: str(federation.largest_nbytes),
        }
        arguments = ["-s", "fed_client.json", "--set", "secure_train=true", f"uid={site}", f"org={ORGANISATION}"]
        module = "nvflare.private.fed.app.client.client_train"
        self._process = Supervised(folder.nvflare, module, [*arguments, "config_folder=config"], environment)

    @property
    def pid(self) -> int | None:
        """The process id of NVFlare's client while it lives."""
        return self._process.pid

    @property
    def state(self) -> str:
        """What to say of it in the site's status."""
        if self.pid is not None:
            return "running"
        return f"starting again after {self._process.failures} failures" if self._process.failures else "starting"

    def run(self, stop: threading.Event) -> None:
        """Keep it running until `stop` is set, then end it. Raises `WardroundError` where it cannot be started."""
        seconds = 0.0
        tidy(self._spool)
        try:
            while not stop.is_set():
                self._process.tend()
                stop.wait(0.5)
                seconds += 0.5
                if seconds >= _PURGE:
                    seconds = 0.0
                    self._process.purge()
        finally:
            self._process.close()
