"""A federation over NVFlare on loopback: a coordinator with a Hub, sites with an echo in place of their process."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from wardround.engines.frames import SharedBodies
from wardround.hospitals.certificates import make_authority
from wardround.hospitals.coordinator.hub import Hub
from wardround.hospitals.federation import Deadlines, Federation
from wardround.hospitals.folders import CoordinatorFolder, SiteFolder
from wardround.hospitals.nvflare.carrier import NvflareCarrier
from wardround.hospitals.nvflare.client import ClientProcess
from wardround.hospitals.nvflare.names import HELLO
from wardround.hospitals.nvflare.provision import provision, server_workspace, site_kit
from wardround.hospitals.signing import signed
from wardround.protection.identity import Identity
from wardround.wire.message import FileBody, Header, Message, body_sha256, write_body

LIMIT = 120.0


class Echo:
    """A site's resident process: it signs what it is asked and sends it back."""

    def __init__(self, path: Path, site: str, identity: Identity) -> None:
        self.site, self.identity, self.path = site, identity, path
        self.instance = uuid.uuid4().hex
        self.asked = 0
        self.pause = 0.0
        path.unlink(missing_ok=True)
        self._connections: list[socket.socket] = []
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(20)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """As its death: all connections end."""
        for each in [self._listening, *self._connections]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        frames = SharedBodies()
        with suppress(OSError), connection, connection.makefile("rb") as ins, connection.makefile("wb") as outs:
            while (asked := frames.read(ins)) is not None:
                if asked.header.kind == HELLO:
                    frames.write(outs, asked.reply(HELLO, meta={"instance": self.instance}))
                    continue
                self.asked += 1
                time.sleep(self.pause)
                size, sha256 = asked.header.body_nbytes, asked.header.body_sha256
                bare = replace(asked.reply("echo").header, body_nbytes=size, body_sha256=sha256)
                frames.write(outs, signed(Message(bare, asked.body), self.identity))


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Stand:
    """Provisions, and starts and ends the processes."""

    def __init__(self, root: Path, sites: Sequence[str]) -> None:
        self.sites = tuple(sites)
        self.folder = CoordinatorFolder(root / "c")
        self.folder.root.mkdir(parents=True)
        make_authority(self.folder.authority, "demo")
        self.federation = Federation(name="demo", host="localhost", port=free_port(), root_key="0" * 64)
        provision(self.folder, self.federation, self.folder.authority, None)
        self.keys = {site: Identity.generate() for site in sites}
        self.folders = {site: SiteFolder(root / site) for site in sites}
        for site, folder in self.folders.items():
            folder.root.mkdir()
            folder.spool.mkdir()
            provision(self.folder, self.federation, self.folder.authority, site)
            os.replace(site_kit(self.folder, site), folder.nvflare)
        keys = {site: key.public.hex() for site, key in self.keys.items()}
        self.folder.roster.write_text(json.dumps({"keys": keys}))
        self.echoes: dict[str, Echo] = {}
        self._clients: list[tuple[threading.Thread, threading.Event]] = []
        self._round = 0

    def start(self) -> None:
        """Start all, and wait until all sites are there."""

        def key(site: str) -> bytes | None:
            return self.keys[site].public if site in self.keys else None

        self.hub = Hub(
            self.folder.spool, key, Deadlines(reply=LIMIT), self.federation.largest_nbytes, proof=lambda *_: True
        )
        self.carrier = NvflareCarrier(self.hub, self.federation, self.folder)
        self.carrier.start()
        for site, folder in self.folders.items():
            self.echoes[site] = Echo(folder.socket, site, self.keys[site])
            self.client(site, folder)
        self.wait()

    def client(self, site: str, folder: SiteFolder) -> threading.Event:
        """Start NVFlare's client of a site; the event ends it."""
        stop = threading.Event()
        thread = threading.Thread(target=ClientProcess(self.federation, folder, site).run, args=(stop,))
        thread.start()
        self._clients.append((thread, stop))
        return stop

    def wait(self) -> None:
        """Wait until all sites are there."""
        until(lambda: {s for s, p in self.hub.presence().items() if p.state == "present"} == set(self.sites))

    def ask(self, body: FileBody, sha256: str) -> list[str]:
        """Ask all sites for an echo; the kinds of their replies, whose bodies are compared."""
        self._round += 1
        kinds = []
        head = Header("echo", "study", "", round=self._round, body_nbytes=body.nbytes, body_sha256=sha256)
        engine = self.hub.engine()
        for reply in engine.exchange(Message(replace(head, site=site), body) for site in self.sites):
            kinds.append(reply.header.kind)
            if kinds[-1] == "echo":
                assert body_sha256(reply.body) == sha256
        engine.close()
        return kinds

    def processes(self, workspace: Path, kind: str = "") -> list[int]:
        """Living processes of NVFlare in a folder, those whose module's name ends with `kind`."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if str(workspace) in command and any(part.endswith(kind) and "nvflare." in part for part in command):
                    found.append(int(entry.name))
        return found

    @property
    def workspaces(self) -> list[Path]:
        """Where NVFlare's processes run."""
        return [server_workspace(self.folder), *(folder.nvflare for folder in self.folders.values())]

    def close(self) -> None:
        """End all processes."""
        for _, stop in self._clients:
            stop.set()
        for thread, _ in self._clients:
            thread.join(LIMIT)
        self.carrier.close()
        self.hub.close()
        for echo in self.echoes.values():
            echo.close()


def random_body(path: Path, nbytes: int) -> tuple[FileBody, str]:
    """A body of bytes that do not compress."""
    return write_body(path, [os.urandom(nbytes)])


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, "not within the limit"
        time.sleep(0.1)
