"""Names that NVFlare's processes and those that start them share; nothing of NVFlare is imported here."""

from __future__ import annotations

import re
from typing import Any

from wardround.errors import WireError

#: Variables of the environment: the coordinator's socket, the resident process's socket, the folder for bodies, and the
#: most bytes that a body may have.
HUB, AGENT, SPOOL, LARGEST = "WARDROUND_HUB", "WARDROUND_AGENT", "WARDROUND_SPOOL", "WARDROUND_LARGEST"

#: From the site: a sign of life with the instance of its resident process and progress; and a reply.
BEAT, REPLY = "wardround.beat", "wardround.reply"
#: To the site: a request; and that the body of a reply has arrived.
REQUEST, TAKEN = "wardround.request", "wardround.taken"
#: Both ways: a part of a body.
PART = "wardround.part"

#: Kinds of frames at the sockets of the coordinator and the resident process.
HELLO, ALIVE, LOST = "hello", "alive", "lost"

PULSE = 2.0  # seconds between two signs of life
PATIENCE = 8.0  # seconds without one until a line is lost
_INSTANCE = re.compile(r"[A-Za-z0-9_.-]{0,128}")


def instance_of(value: Any) -> str:
    """The instance that a site names, empty where its resident process is away; raises `WireError` for no such text."""
    if not isinstance(value, str) or not _INSTANCE.fullmatch(value):
        raise WireError("a site names no instance of its resident process")
    return value
