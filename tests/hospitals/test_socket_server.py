"""The socket of a site's process: closed to other users, and made without a change to the rest of the process."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from wardround.hospitals.socket_server import HELLO, SocketServer, connect
from wardround.wire.message import Message


def test_a_socket_is_closed_to_others_and_the_umask_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The umask is of the process: of two sockets that start at once, one would leave it at what the other set."""
    before = os.umask(0)
    try:
        with monkeypatch.context() as patched:
            patched.delattr(os, "umask")
            server = SocketServer(tmp_path / "site.socket", lambda message, progress: Message(message.header), HELLO)
            server.start()
        try:
            assert stat.S_IMODE((tmp_path / "site.socket").stat().st_mode) == 0o600
            connect(tmp_path / "site.socket").close()
        finally:
            server.close()
    finally:
        os.umask(before)
    assert not (tmp_path / "site.socket").exists()
