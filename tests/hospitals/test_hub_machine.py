"""Whatever order sites come, go, answer and are posed as: each message has one reply, and only what the key signed."""

from __future__ import annotations

import gc
import tempfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.hospitals.hubs import KEYS, SITES, Asking, House, message
from wardround.errors import Rejected
from wardround.federation.exchange import ERROR
from wardround.protection.identity import Identity
from wardround.wire.message import FileBody, Message

site_names = st.sampled_from(SITES)
instances = st.sampled_from(["one", "two"])
STRANGER = Identity.generate()


class Traffic(RuleBasedStateMachine):
    """Two studies, two sites, and up to two processes of each site."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.house = House(Path(self.folder.name))
        self.hub = self.house.hub
        self.engines = [self.hub.engine(), self.hub.engine()]
        self.asking: list[Asking] = []
        # What each instance was handed, and the bodies that sites signed for each request.
        self.handed: list[tuple[str, str, Message]] = []
        self.honest: set[tuple[str, bytes]] = set()

    @rule(engine=st.integers(0, 1), asked=st.lists(st.tuples(site_names, st.integers(1, 3)), min_size=1, max_size=3))
    @precondition(lambda self: len(self.asking) < 8)
    def ask(self, engine: int, asked: list[tuple[str, int]]) -> None:
        self.asking.append(Asking(self.engines[engine], [message(site, number) for site, number in asked]))

    @rule(site=site_names, instance=instances)
    def attach(self, site: str, instance: str) -> None:
        with suppress(Rejected):
            self.hub.attach(site, instance)

    @rule(site=site_names, instance=instances)
    def take(self, site: str, instance: str) -> None:
        with suppress(Rejected):
            found = self.hub.take(site, instance, 0.0)
            if found is not None:
                assert found.header.site == site
                self.handed.append((site, instance, found))

    @rule(site=site_names, instance=instances)
    def lose(self, site: str, instance: str) -> None:
        self.hub.lost(site, instance)

    @rule(site=site_names, instance=st.sampled_from(["one", "two", "fresh"]), cut=st.booleans())
    def come_back(self, site: str, instance: str, cut: bool) -> None:
        """A process that lost its connection, or one in its place, is handed all that waits for its site."""
        self.house.clock.now += 11.0
        self.hub.attach(site, instance)
        self.hub.lost(site, instance)
        if cut:
            # Another took over, and is gone as well.
            self.hub.attach(site, "another")
            while self.hub.take(site, "another", 0.0) is not None:
                pass
            self.hub.lost(site, "another")
        self.hub.expire()
        waiting = self.hub.presence()[site].waiting
        found = [self.hub.take(site, instance, 0.0) for _ in range(waiting + 1)]
        assert found[-1] is None
        self.handed += [(site, instance, each) for each in found if each is not None]
        assert len({each.id for each in found if each is not None}) == waiting

    @rule(seconds=st.sampled_from([1.0, 11.0, 70.0, 1900.0]))
    def wait(self, seconds: float) -> None:
        self.house.clock.now += seconds
        self.hub.expire()

    @rule(pick=st.integers(0, 1 << 10), instance=instances, data=st.binary(max_size=4), whole=st.booleans())
    @precondition(lambda self: self.handed)
    def answer(self, pick: int, instance: str, data: bytes, whole: bool) -> None:
        site, _, request = self.handed[pick % len(self.handed)]
        reply = self.house.reply(request, data)
        if whole:
            self.honest.add((request.id, data))
        elif isinstance(reply.body, FileBody):
            reply.body.path.write_bytes(bytes(255 - byte for byte in data))
        else:
            return
        self.hub.answered(site, instance, reply)

    @rule(pick=st.integers(0, 1 << 10), by=site_names, how=st.sampled_from(["stranger", "other", "name", "round"]))
    @precondition(lambda self: self.handed)
    def pose(self, pick: int, by: str, how: str) -> None:
        site, instance, request = self.handed[pick % len(self.handed)]
        other = SITES.replace(site, "")
        match how:
            case "stranger":
                reply = self.house.reply(request, b"forged", key=STRANGER)
            case "other":
                reply = self.house.reply(request, b"forged", key=KEYS[other])
            case "name":
                reply = self.house.reply(request, b"forged", key=KEYS[other])
                reply = Message(replace(reply.header, site=other), reply.body)
            case _:
                reply = self.house.reply(request, b"forged")
                reply = Message(replace(reply.header, round=99), reply.body)
        self.hub.answered(by, instance, reply)

    @invariant()
    def replies_are_of_what_was_asked(self) -> None:
        for asking in self.asking:
            assert len(asking.replies) <= len(asking.messages)

    def teardown(self) -> None:
        self.house.clock.now += 3601.0
        self.hub.expire()
        for asking in self.asking:
            self._check(asking)
            asking.replies.clear()
        assert all(site.waiting == 0 for site in self.hub.presence().values())
        self.hub.close()
        # Nothing is left of any body, used or refused.
        if self.house.files():
            gc.collect()
        assert self.house.files() == []
        self.folder.cleanup()

    def _check(self, asking: Asking) -> None:
        replies = asking.done()
        assert sorted(r.header.reply_to for r in replies) == sorted(m.id for m in asking.messages)
        for reply in replies:
            sent = b"".join(bytes(chunk) for chunk in reply.body.chunks())
            assert reply.header.kind == ERROR or (reply.header.reply_to, sent) in self.honest
            assert not reply.header.signature


Traffic.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestTraffic: Any = Traffic.TestCase
