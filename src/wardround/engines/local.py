"""The engine in one process: sites answer one after the other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator

from wardround.deidentify import describe_error
from wardround.engines.registry import Carried, Sites
from wardround.errors import Interrupted
from wardround.federation.exchange import Party
from wardround.federation.refusals import refusal
from wardround.wire.message import Header, Message

log = logging.getLogger(__name__)
STOPPED = "stopped; run the same command again to go on from here"
SiteFinder = Callable[[Header], Party]


def answer(find: SiteFinder, message: Message) -> Message:
    """The site's reply; an `error` reply when the site itself cannot be built."""
    try:
        site = find(message.header)
    except Exception as error:
        # Logs are read outside the site too: the detail is for eyes at the site alone.
        log.warning("site %s could not be opened: %s", message.header.site, describe_error(error))
        log.debug("detail: %s", getattr(error, "detail", ""), exc_info=True)
        return refusal(message, error)
    return site.handle(message)


class LocalEngine:
    """Hands each message to its site; `find` makes or finds the site that a header addresses."""

    def __init__(self, find: SiteFinder) -> None:
        self._find = find
        # One model serves all sites of a process: they take turns, whichever thread asks.
        self._turn = threading.Lock()
        self._closed = False

    def exchange(self, messages: Iterable[Message]) -> Iterator[Message]:
        """Yield one reply for each message, in order; raises `Interrupted` once the engine is closed."""
        if self._closed:
            raise Interrupted(STOPPED)
        for message in messages:
            with self._turn:
                if self._closed:
                    raise Interrupted(STOPPED)
                reply = answer(self._find, message)
            yield reply

    def close(self) -> None:
        """Let the site that is at work finish, and ask no other."""
        self._closed = True


def carried(sites: Sites) -> Carried:
    """`--engine local`: arms wait for each other."""
    return Carried(LocalEngine(sites.find), 1)
