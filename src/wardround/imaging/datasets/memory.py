"""What a site keeps in memory of its examples, within a limit. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

CACHE_BYTES = 2**28


class Sized(Protocol):
    """A stored scan or slice."""

    @property
    def nbytes(self) -> int:
        """Its size in memory."""
        ...


SizedT = TypeVar("SizedT", bound=Sized)


class ScanCache(Generic[SizedT]):
    """Keeps what fits: examples come in random order, so nothing is worth throwing out for another.

    The last one made is kept whatever its size, as a slice's image and mask are asked for one after the other.
    """

    def __init__(self, capacity: int) -> None:
        self._room = capacity
        self._kept: dict[Hashable, SizedT] = {}
        self._last: tuple[Hashable, SizedT] | None = None

    def get(self, key: Hashable, make: Callable[[], SizedT]) -> SizedT:
        """What is kept under a key, made where it is not there."""
        found = self._kept.get(key)
        if found is None and self._last is not None and self._last[0] == key:
            return self._last[1]
        if found is None:
            found = make()
            self._last = (key, found)
            if found.nbytes <= self._room:
                self._room -= found.nbytes
                self._kept[key] = found
        return found
