"""Who may see the page: one password, kept in a file of the coordinator's folder, and sessions in this process."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from wardround.errors import WardroundError

SESSION_SECONDS = 12 * 3600.0
_MOST_SESSIONS, _MOST_CLIENTS = 100, 1000
_LONGEST_PAUSE = 60.0


def page_token(path: Path) -> tuple[str, bool]:
    """The page's password, and whether it was made just now: 32 random bytes in a file that its owner alone reads.

    Raises `WardroundError` where others can read the file, or where it holds none.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return _kept(path), False
    token = secrets.token_urlsafe(32)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(token + "\n")
    return token, True


def _kept(path: Path) -> str:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077 or found.st_uid != os.geteuid():
        raise WardroundError(
            f"{path.name}, the password of the page, can be read by others or is no file of this user's: delete it, "
            "and a new password is made",
            detail=str(path),
        )
    token = path.read_text(encoding="ascii", errors="replace").strip()
    if len(token) < 32:
        raise WardroundError(f"{path.name} holds no password: delete it, and a new one is made", detail=str(path))
    return token


class Access:
    """Passwords in, sessions out. A client that was wrong has to wait: 1 s, 2 s, 4 s, up to a minute.

    `clock` runs on and never back, in seconds.
    """

    def __init__(self, token: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._digest = hashlib.sha256(token.encode()).digest()
        self._clock = clock
        self._lock = threading.Lock()
        # By the hash of a session's number: what lies in memory opens nothing.
        self._sessions: OrderedDict[bytes, float] = OrderedDict()
        self._wrong: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def pause(self, client: str) -> float:
        """Seconds until a client may try again."""
        with self._lock:
            _, until = self._wrong.get(client, (0, 0.0))
        return max(0.0, until - self._clock())

    def open(self, client: str, token: str) -> str | None:
        """A new session for the right password; nothing for a wrong one, or one that came too early."""
        if self.pause(client) > 0.0:
            return None
        right = hmac.compare_digest(hashlib.sha256(token.encode("utf-8", "replace")).digest(), self._digest)
        with self._lock:
            if not right:
                count = self._wrong.pop(client, (0, 0.0))[0] + 1
                self._wrong[client] = (count, self._clock() + min(2.0 ** (count - 1), _LONGEST_PAUSE))
                while len(self._wrong) > _MOST_CLIENTS:
                    self._wrong.popitem(last=False)
                return None
            self._wrong.pop(client, None)
            session = secrets.token_urlsafe(32)
            self._sessions[_hashed(session)] = self._clock() + SESSION_SECONDS
            while len(self._sessions) > _MOST_SESSIONS:
                self._sessions.popitem(last=False)
        return session

    def is_open(self, session: str | None) -> bool:
        """Whether a session was opened here and has not ended."""
        if not session:
            return False
        with self._lock:
            return self._sessions.get(_hashed(session), 0.0) > self._clock()

    def close(self, session: str | None) -> None:
        """End a session."""
        if session:
            with self._lock:
                self._sessions.pop(_hashed(session), None)


def _hashed(session: str) -> bytes:
    return hashlib.sha256(session.encode("utf-8", "replace")).digest()
