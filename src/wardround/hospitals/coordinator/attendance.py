"""Which site is there: the one process that speaks for it, when it was last heard, and what was odd about it.

Nothing here locks: the hub does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from wardround.errors import Rejected

Clock = Callable[[], float]
#: Seconds for which a site that was heard counts as there; it gives a sign of life more often than that.
ALIVE = 10.0
#: Seconds after which a site that is not heard counts as lost, though its connection was never seen to end.
GONE = 60.0
MOST_EVENTS = 200

State = Literal["present", "late", "lost", "never"]


@dataclass(frozen=True)
class Presence:
    """A site as the coordinator sees it: `seen` in Unix time, `waiting` the messages that it has not answered."""

    state: State
    seen: float | None
    waiting: int


@dataclass(frozen=True)
class Event:
    """Something that a person should look at: when it last happened (Unix time), and how often it did."""

    at: float
    site: str
    text: str
    count: int = 1


class Events:
    """The last few kinds of events: one that is repeated stands once, so that no flood of one hides the others."""

    def __init__(self, wall: Clock) -> None:
        self._wall = wall
        self._kept: OrderedDict[tuple[str, str], Event] = OrderedDict()

    def note(self, site: str, text: str) -> int:
        """Keep an event, and say how often it happened; the oldest goes where there are too many."""
        known = self._kept.pop((site, text), None)
        count = 1 if known is None else known.count + 1
        self._kept[site, text] = Event(self._wall(), site, text, count)
        if len(self._kept) > MOST_EVENTS:
            self._kept.popitem(last=False)
        return count

    def listed(self) -> list[Event]:
        """All of them, the latest last."""
        return list(self._kept.values())


@dataclass(frozen=True)
class _Heard:
    instance: str
    at: float
    seen: float
    connected: bool = True


class Attendance:
    """The instance that speaks for each site. Another is let in once the first was not heard for `ALIVE` seconds.

    `clock` runs on and never back, in seconds; `wall` is Unix time.
    """

    def __init__(self, clock: Clock, wall: Clock) -> None:
        self._clock = clock
        self._wall = wall
        self._heard: dict[str, _Heard] = {}

    def admit(self, site: str, instance: str) -> None:
        """A sign of life of an instance; raises `Rejected` for a twin, while the first is there."""
        if self._is_twin(site, instance):
            raise Rejected(
                f"site {site} is connected already, from a process that was heard less than {ALIVE:.0f} s ago. A "
                "process that was just started again is let in after that time, without a new start. If this message "
                "stays, the site's kit runs on two computers: stop one of them, and report it if the other is not yours"
            )
        self._heard[site] = _Heard(instance, self._clock(), self._wall())

    def lost(self, site: str, instance: str) -> bool:
        """The connection of an instance is gone; whether it was the one that speaks for the site."""
        heard = self._heard.get(site)
        if heard is None or heard.instance != instance:
            return False
        self._heard[site] = replace(heard, connected=False)
        return True

    def state(self, site: str) -> tuple[State, float | None]:
        """How a site is, and when it was last heard."""
        heard = self._heard.get(site)
        if heard is None:
            return "never", None
        silent = self._clock() - heard.at
        if not heard.connected or silent > GONE:
            return "lost", heard.seen
        return ("present" if silent <= ALIVE else "late"), heard.seen

    @property
    def sites(self) -> frozenset[str]:
        """The sites that were ever heard."""
        return frozenset(self._heard)

    def _is_twin(self, site: str, instance: str) -> bool:
        heard = self._heard.get(site)
        if heard is None or heard.instance == instance or not heard.connected:
            return False
        return self._clock() - heard.at <= ALIVE
