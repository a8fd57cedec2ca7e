"""Which connections a site has, which of them waits for messages, and what it was handed."""

from __future__ import annotations

import socket
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from wardround.hospitals.coordinator.hub import Hub
from wardround.hospitals.https.protocol import header_sha256
from wardround.hospitals.https.sockets import end_connection
from wardround.wire.message import Message

#: The most connections of one site: the one that was quiet for longest gives way to a new one.
MOST_CONNECTIONS = 16
#: The most messages of a site that the carrier remembers having handed out.
_MOST_HANDED = 256


@dataclass(eq=False)
class _Seat:
    instance: str = ""
    polling: socket.socket | None = None
    handed: OrderedDict[str, Message] = field(default_factory=OrderedDict)
    connections: OrderedDict[socket.socket, None] = field(default_factory=OrderedDict)


class Seats:
    """What each site has of the carrier. Safe in threads."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._lock = threading.Lock()
        self._seats: dict[str, _Seat] = {}

    def opened(self, site: str, connection: socket.socket) -> None:
        """A connection of a site; the one that was quiet for longest ends where there are too many."""
        with self._lock:
            seat = self._seats.setdefault(site, _Seat())
            others = [each for each in seat.connections if each is not seat.polling]
            crowded = len(seat.connections) >= MOST_CONNECTIONS
            seat.connections[connection] = None
        if crowded and others:
            end_connection(others[0])

    def active(self, site: str, connection: socket.socket) -> None:
        """A connection was used."""
        with self._lock:
            connections = self._seats[site].connections
            if connection in connections:
                connections.move_to_end(connection)

    def closed(self, site: str, connection: socket.socket) -> None:
        """A connection ended; with the one that waited for messages the site is lost."""
        with self._lock:
            seat = self._seats[site]
            seat.connections.pop(connection, None)
            was_polling = seat.polling is connection
            if was_polling:
                seat.polling = None
        if was_polling:
            self._hub.lost(site, seat.instance)

    def polls(self, site: str, instance: str, connection: socket.socket) -> None:
        """A connection waits for messages; another that did is given up. Raises `Rejected` for a twin."""
        with self._lock:
            seat = self._seats[site]
            if seat.polling is connection and seat.instance == instance:
                return
        self._hub.attach(site, instance)
        with self._lock:
            older, seat.polling = seat.polling, connection
            if seat.instance != instance:
                seat.instance, seat.handed = instance, OrderedDict()
        if older is not None and older is not connection:
            end_connection(older)
            # What went into the connection that was given up may never have arrived.
            self._hub.lost(site, instance)
            self._hub.attach(site, instance)

    def hand(self, site: str, instance: str, connection: socket.socket, message: Message) -> bool:
        """Remember that a message goes out; not where another connection waits for messages now."""
        with self._lock:
            seat = self._seats[site]
            if seat.polling is not connection or seat.instance != instance:
                return False
            seat.handed[header_sha256(message.header)] = message
            while len(seat.handed) > _MOST_HANDED:
                seat.handed.popitem(last=False)
            return True

    def handed(self, site: str, instance: str, sha256: str) -> Message | None:
        """The message with this SHA-256 of its header, where this process of the site was handed it."""
        with self._lock:
            seat = self._seats[site]
            return seat.handed.get(sha256) if seat.instance == instance else None

    def is_asked(self, site: str, instance: str, id: str) -> bool:
        """Whether a message with this id was handed to the process, and not answered."""
        with self._lock:
            seat = self._seats[site]
            return seat.instance == instance and any(message.id == id for message in seat.handed.values())

    def answered(self, site: str, id: str) -> None:
        """The message with this id was answered."""
        with self._lock:
            handed = self._seats[site].handed
            for key in [key for key, message in handed.items() if message.id == id]:
                del handed[key]

    def is_twin(self, site: str, instance: str) -> bool:
        """Whether another process of the site is the one that waits for messages."""
        with self._lock:
            seat = self._seats[site]
            return seat.polling is not None and seat.instance != instance

    def close(self) -> None:
        """End all connections."""
        with self._lock:
            connections = [each for seat in self._seats.values() for each in seat.connections]
        for connection in connections:
            end_connection(connection)
