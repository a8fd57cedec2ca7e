"""A coordinator's process that asks site A for one reply over HTTPS, and says what it got: to be killed."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.hospitals.lines import federation, message
from wardround.hospitals.coordinator.hub import Hub
from wardround.hospitals.federation import Deadlines
from wardround.hospitals.https.server import HttpsCarrier
from wardround.wire.message import body_sha256


def main(kits: str, folder: str, port: str, key: str) -> None:
    """Ask, and print the SHA-256 of the reply's body."""
    rules = federation(int(port))
    keys = {"A": bytes.fromhex(key)}
    hub = Hub(Path(folder) / "spool", keys.get, Deadlines(), rules.largest_nbytes, proof=lambda *_: True)
    carrier = HttpsCarrier(hub, rules, Path(kits) / "coordinator", Path(folder) / "spool")
    carrier.start()
    (reply,) = hub.engine().exchange([message("A")])
    print(reply.header.kind, body_sha256(reply.body), flush=True)
    carrier.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
