"""The site's end of the HTTPS carrier: asks the coordinator for messages, and brings the replies."""

from __future__ import annotations

import http.client
import logging
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from wardround.errors import Rejected, WardroundError, WireError
from wardround.hospitals.certificates import CertificateError, handshake_reason
from wardround.hospitals.federation import Federation
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.https.link import Backoff, Elsewhere, Later, Line, Link, NotAsked, Refused
from wardround.hospitals.https.partial import NoSpace
from wardround.hospitals.https.protocol import HELLO, NEXT, PROGRESS, WAIT, header_sha256
from wardround.hospitals.https.transfers import Downloads, Sending
from wardround.wire.message import EMPTY, Body, FileBody, Header, Message

log = logging.getLogger(__name__)
Handle = Callable[[Message, Callable[[Header], None]], Message]

#: The most messages that are at work at once, and bodies under way.
_MOST_MESSAGES, _MOST_TRANSFERS = 64, 4
#: Seconds until the next attempt where a person may have to do something first.
_LATER = 5.0
#: Seconds between two reports of progress.
_PROGRESS = 0.5
#: Seconds for which an answer may be late.
_SLOW = 10.0
#: How often a body with wrong bytes is fetched anew.
_WRONG = 3
_BROKEN = (OSError, http.client.HTTPException)
_ENDED = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)


class _Stopped(Exception):
    pass


class _Transfer(Protocol):
    @property
    def moved(self) -> int: ...

    def go_on(self, line: Line) -> FileBody | None: ...


@dataclass(eq=False)
class _Work:
    """A message at the site. The coordinator may ask `again` while the reply is on its way: that reply may be lost."""

    replying: bool = False
    again: bool = False


class Courier:
    """Carries messages between the coordinator and `handle`, in threads of its own, until it is stopped.

    What breaks is tried again: after a cut connection from the byte where it was cut. `handle` gets each message at
    least once. `instance` is the random name of the site's process.
    """

    def __init__(self, federation: Federation, folder: SiteFolder, site: str, instance: str, handle: Handle) -> None:
        self._site = site
        self._handle = handle
        self._most = federation.largest_nbytes
        self._link = Link(federation, folder.certificates, instance)
        self._downloads = Downloads(folder.spool / "https")
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._work: dict[str, _Work] = {}
        self._room = threading.Semaphore(_MOST_MESSAGES)
        self._transfers = threading.Semaphore(_MOST_TRANSFERS)
        self._progress = _Progress(self._link)
        self._unreached, self._refused = Backoff(), Backoff(_LATER / 8, _LATER)
        self._connection, self._trouble = "not connected yet", ""

    @property
    def state(self) -> str:
        """How it is, in words: `connected`, or what is in the way."""
        return f"{self._connection}; {self._trouble}" if self._trouble else self._connection

    def run(self, stop: threading.Event) -> None:
        """Carry messages until `stop` is set. Work of `handle` that is under way then is not waited for."""
        for name, target in (("stop", lambda: self._end_with(stop)), ("progress", self._progress.run)):
            threading.Thread(target=target, name=f"courier-{name}", daemon=True).start()
        while not stop.is_set():
            pause = self._connected()
            if not stop.is_set():
                log.info("site %s: %s", self._site, self._connection)
                stop.wait(pause)
        self._connection = "stopped"

    def _end_with(self, stop: threading.Event) -> None:
        stop.wait()
        self._stop.set()
        self._progress.stop()
        self._link.close()

    # Messages ---------------------------------------------------------------------------------------------------------

    def _connected(self) -> float:
        """Ask for messages on one connection until it breaks; the seconds until the next one should be made."""
        try:
            with self._link.line() as line:
                line.expect_within(WAIT + _SLOW)
                line.ask("GET", HELLO)
                self._connection = "connected"
                self._unreached.reset()
                self._refused.reset()
                while self._has_room():
                    status, data = line.ask("GET", NEXT)
                    if status == http.client.OK:
                        self._arrived(data)
        except _ENDED as error:
            self._connection = f"not connected: the coordinator cannot be reached ({_words(error)})"
            return self._unreached.seconds()
        except ssl.SSLError as error:
            self._connection = f"not connected: {handshake_reason(error)}"
            return _LATER
        except _BROKEN as error:
            self._connection = f"not connected: the coordinator cannot be reached ({_words(error)})"
            return self._unreached.seconds()
        except Rejected as error:
            self._connection = f"refused: {error}"
            return self._refused.seconds()
        except WardroundError as error:
            self._connection = f"not connected: {error}"
            return _LATER
        return 0.0

    def _has_room(self) -> bool:
        """Wait until fewer messages are at work than may be; not where it is stopped."""
        while not self._stop.is_set():
            if self._room.acquire(timeout=1.0):
                self._room.release()
                return True
        return False

    def _arrived(self, data: bytes) -> None:
        """Begin with a message, unless it is at work already."""
        try:
            header = Header.from_bytes(data)
            if header.site != self._site:
                raise WireError("the coordinator sent a message for another site")
            if header.sent_nbytes > self._most:
                raise WireError(
                    f"the coordinator sends {header.sent_nbytes} bytes in one message and this site's federation.yaml "
                    f"allows {self._most}; both should have the same `largest_gb`"
                )
        except WireError as error:
            return self._in_trouble(str(error))
        name = header_sha256(header)
        with self._lock:
            if (work := self._work.get(name)) is not None:
                work.again = work.replying
                return None
            work = self._work[name] = _Work()
        self._room.acquire()
        threading.Thread(target=self._serve, args=(header, name, work), name="courier-message", daemon=True).start()
        return None

    def _serve(self, header: Header, name: str, work: _Work) -> None:
        try:
            again = True
            while again:
                work.replying = work.again = False
                self._answer(header, work)
                with self._lock:
                    again = work.again
                    if not again:
                        del self._work[name]
        except _Stopped:
            pass
        except Exception:
            # The coordinator asks again after its deadline, or when this process is started again.
            log.exception("site %s: a message could not be answered", self._site)
            with self._lock:
                self._work.pop(name, None)
        finally:
            self._room.release()

    def _answer(self, header: Header, work: _Work) -> None:
        body: Body = EMPTY
        try:
            if header.sent_nbytes:
                body = self._fetched(header)
            reply = self._handle(Message(header, body), self._progress.put)
            with self._lock:
                work.replying = True
            self._moved(Sending(reply))
        except NotAsked as error:
            log.info("site %s: a %s is not waited for any more: %s", self._site, header.kind, error)
        except (WireError, Refused) as error:
            self._in_trouble(f"a {header.kind} could not be carried: {error}")
        finally:
            if isinstance(body, FileBody):
                with suppress(OSError):
                    body.path.unlink(missing_ok=True)

    # Bodies -----------------------------------------------------------------------------------------------------------

    def _fetched(self, header: Header) -> FileBody:
        with self._downloads.turn(header):
            download = self._downloads.open(header)
            try:
                body = self._moved(download)
            finally:
                download.close()
        assert body is not None
        return body

    def _moved(self, transfer: _Transfer) -> FileBody | None:
        """Go on with a transfer, over one connection after the other, until all of it is there."""
        backoff, wrong, moved = Backoff(), 0, transfer.moved
        while not self._stop.is_set():
            try:
                with self._transfers, self._link.line() as line:
                    done = transfer.go_on(line)
                self._trouble = ""
                return done
            except (Rejected, Later, NoSpace, CertificateError) as error:
                # Before the wire's errors, of which the first is one: it is another process's turn.
                self._in_trouble(str(error))
                pause = _LATER
            except WireError as error:
                wrong += 1
                if wrong >= _WRONG:
                    raise
                log.warning("site %s: %s", self._site, error)
                pause = backoff.seconds()
            except (Elsewhere, *_BROKEN) as error:
                log.info("site %s: a transfer goes on after %s", self._site, type(error).__name__)
                if transfer.moved > moved:
                    backoff.reset()
                pause, moved = backoff.seconds(), transfer.moved
            self._stop.wait(pause)
        raise _Stopped

    def _in_trouble(self, text: str) -> None:
        if text != self._trouble:
            log.warning("site %s: %s", self._site, text)
        self._trouble = text


class _Progress:
    """Tells the coordinator how far messages are: the latest of each, a few times a second at most."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._some = threading.Condition()
        self._latest: dict[tuple[str, int, str], Header] = {}
        self._stopped = threading.Event()

    def put(self, header: Header) -> None:
        """Send a header of progress soon, unless a later one takes its place."""
        with self._some:
            self._latest[header.study, header.round, header.reply_to] = header
            self._some.notify()

    def run(self) -> None:
        """Send what is put, until it is stopped. What cannot be sent is forgotten."""
        while not self._stopped.is_set():
            with self._some:
                self._some.wait_for(lambda: self._latest or self._stopped.is_set())
                latest, self._latest = list(self._latest.values()), {}
            if self._stopped.is_set():
                return
            try:
                with self._link.line() as line:
                    for header in latest:
                        line.ask("POST", PROGRESS, header.to_bytes())
            except (WardroundError, *_BROKEN) as error:
                log.debug("progress is not sent: %s", error)
            self._stopped.wait(_PROGRESS)

    def stop(self) -> None:
        """End `run`."""
        self._stopped.set()
        with self._some:
            self._some.notify()


def _words(error: BaseException) -> str:
    """Why a connection broke."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) and error.strerror:
        return error.strerror
    return "it ended the connection"
