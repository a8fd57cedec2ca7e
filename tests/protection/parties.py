"""A secure sum played out in memory, every step of which a test can bend."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.protection.identity import Identity, Roster
from wardround.protection.secure_coordinator import CoordinatorSession
from wardround.protection.secure_site import SiteSession
from wardround.protection.secure_sum import Announcement, Attempt, MaskStream
from wardround.wire.ring import ExactSum, Ring

Segments = tuple[tuple[int, Ring], ...]
PHASES = ("advert", "shares", "upload", "consent", "reveal")


def fixed_entropy(name: str) -> Callable[[int], bytes]:
    """Not secret at all: so that a test, or a test vector, can be repeated."""
    counter = itertools.count()
    return lambda size: hashlib.shake_256(f"{name}/{next(counter)}".encode()).digest(size)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"S{i:02d}" for i in range(count))


def identity(site: str) -> Identity:
    return Identity.generate(fixed_entropy(f"identity of {site}"))


def roster_of(sites: Sequence[str]) -> Roster:
    return Roster({site: identity(site).public for site in sites})


def context_of(roster: Roster, threshold: int, **changes: Any) -> Attempt:
    values = {"study": "s" * 64, "round": 3, "attempt": 0, "request": "r" * 64, "model": "m" * 64, "layout": "l" * 64}
    return Attempt(**{**values, "roster": roster.sha256, "threshold": threshold, **changes})


def safe_threshold(count: int) -> int:
    return 2 * count // 3 + 1


class Records(dict[str, str]):
    """What sites wrote down before they signed, by site; it outlives sessions."""

    def of(self, site: str) -> Callable[[str], str]:
        return lambda value: self.setdefault(site, value)


def update_of(site: str, segments: Segments) -> list[bytes]:
    """A site's clear update: uniform bytes, one chunk a segment."""
    random = np.random.default_rng(int.from_bytes(hashlib.sha256(site.encode()).digest()[:8], "little"))
    return [random.bytes(size) for size, _ in segments]


def sum_of(sites: Collection[str], segments: Segments) -> bytes:
    total = ExactSum(segments)
    for site in sites:
        total.add(b"".join(update_of(site, segments)), 0)
    return total.to_bytes()


def cut(data: bytes, sizes: Iterator[int]) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        step = next(sizes)
        yield data[at : at + step]
        at += step


@dataclass
class Play:
    """One attempt among `count` sites."""

    count: int
    segments: Segments = ((24, Ring(32)),)
    threshold: int = 0
    attempt: int = 0
    records: Records = field(default_factory=Records)
    entropy: str | None = None

    def __post_init__(self) -> None:
        self.sites = names(self.count)
        self.threshold = self.threshold or safe_threshold(self.count)
        self.roster = roster_of(self.sites)
        self.context = context_of(self.roster, self.threshold, attempt=self.attempt)
        self.session = {site: self.join(site) for site in self.sites}
        self.coordinator = CoordinatorSession(self.roster, self.context)
        self.total = ExactSum(self.segments)
        self.masked: dict[str, bytes] = {}

    def join(self, site: str, **changes: Any) -> SiteSession:
        """A site's session; `changes` to the context are what this site alone is told."""
        context = context_of(self.roster, self.threshold, attempt=self.attempt, **changes)
        extra = {} if self.entropy is None else {"entropy": fixed_entropy(f"{self.entropy} of {site}")}
        return SiteSession(site, identity(site), self.roster, context, **extra)

    def run(self, lost: Mapping[str, str] | None = None, chunk: int = 12) -> bytes:
        """The whole protocol; `lost[site]` is the phase whose reply never comes. The unmasked sum."""
        gone: set[str] = set()

        def alive(phase: str, among: Collection[str]) -> list[str]:
            gone.update(site for site, when in (lost or {}).items() if when == phase)
            return [site for site in among if site not in gone]

        for site in alive("advert", self.sites):
            self.coordinator.advert(self.session[site].advertise())
        roll = self.coordinator.roll()
        for site in alive("shares", sorted(self.coordinator.adverts)):
            self.coordinator.shares(self.session[site].share(roll))
        deals = self.coordinator.deals()
        for site in alive("upload", sorted(deals)):
            self.upload(site, deals[site], chunk)
        announcement = self.coordinator.announce()
        for site in alive("consent", announcement.survivors):
            self.coordinator.consent(self.sign(site, announcement))
        quorum = self.coordinator.quorum()
        for site in alive("reveal", sorted(self.coordinator.consents)):
            self.coordinator.reveal(self.session[site].reveal(quorum))
        return self.unmasked()

    def upload(self, site: str, deal: Any, chunk: int = 12) -> None:
        stream = MaskStream(self.session[site].mask(deal), self.segments)
        clear = b"".join(update_of(site, self.segments))
        self.masked[site] = b"".join(bytes(part) for part in stream.masked(cut(clear, itertools.repeat(chunk))))
        self.total.add(self.masked[site], 0)
        self.coordinator.uploaded(site)

    def sign(self, site: str, announcement: Announcement) -> Any:
        return self.session[site].sign(announcement, self.records.of(site))

    def unmasked(self) -> bytes:
        MaskStream(self.coordinator.unmask(), self.segments).add_to(self.total)
        return self.total.to_bytes()

    def to_shares(self) -> Any:
        """Play up to the roll."""
        for site in self.sites:
            self.coordinator.advert(self.session[site].advertise())
        return self.coordinator.roll()

    def to_deals(self) -> Any:
        """Play up to the deals."""
        roll = self.to_shares()
        for site in self.sites:
            self.coordinator.shares(self.session[site].share(roll))
        return self.coordinator.deals()

    def to_announcement(self, lost: Collection[str] = ()) -> Announcement:
        """Play up to the survivor list."""
        for site, deal in self.to_deals().items():
            if site not in lost:
                self.upload(site, deal)
        return self.coordinator.announce()


def bits(data: bytes) -> npt.NDArray[np.uint8]:
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8))
