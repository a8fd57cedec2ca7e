"""The hub between studies and carriers: one reply a message, whatever comes and goes, and none that is not signed."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.hospitals.hubs import KEYS, MOST, Asking, House, anyone, message
from wardround.engines.frames import PROGRESS
from wardround.errors import Interrupted, Rejected
from wardround.federation.exchange import ERROR
from wardround.federation.facts import DELIVER
from wardround.federation.parts import LACKS
from wardround.hospitals.coordinator.attendance import ALIVE, GONE, MOST_EVENTS
from wardround.hospitals.coordinator.hub import REFUSALS, Hub
from wardround.hospitals.coordinator.replies import SpooledBody
from wardround.hospitals.federation import Deadlines
from wardround.hospitals.signing import signed
from wardround.protection.identity import Identity
from wardround.wire.message import FileBody, Header, HeldBody, Message
from wardround.wire.parts import Part
from wardround.wire.tensors import TensorInfo

ONE, TWO = "first", "second"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(tmp_path / "spool")
    yield house
    house.hub.close()


def taken(house: House, site: str = "A", instance: str = ONE) -> Message:
    found = house.hub.take(site, instance, 0.0)
    assert found is not None
    return found


def body_of(reply: Message) -> bytes:
    return b"".join(bytes(chunk) for chunk in reply.body.chunks())


def test_a_message_goes_out_once_and_its_reply_comes_back_without_the_signature(house: House) -> None:
    asking = Asking(house.hub.engine(), [message("A"), message("B")])
    assert taken(house) == message("A")
    assert house.hub.take("A", ONE, 0.0) is None
    house.hub.answered("A", ONE, house.reply(message("A"), b"abc"))
    house.hub.answered("B", TWO, house.reply(taken(house, "B", TWO), b"def"))
    assert {(r.header.site, r.header.signature, body_of(r)) for r in asking.done()} == {
        ("A", "", b"abc"),
        ("B", "", b"def"),
    }


@pytest.mark.slow
def test_a_body_lasts_as_long_as_its_reply(house: House) -> None:
    asking = Asking(house.hub.engine(), [message()])
    sent = house.reply(taken(house), b"abc")
    path = sent.body.path if isinstance(sent.body, FileBody) else None
    house.hub.answered("A", ONE, sent)
    (reply,) = asking.done()
    # The carrier may write its own name again: a reply that was sent twice, over the one that is read.
    assert path is not None
    assert not path.exists()
    house.hub.answered("A", ONE, house.reply(message(), b"xyz"))
    body = reply.body
    asking.replies.clear()
    del reply
    gc.collect()
    assert b"".join(bytes(chunk) for chunk in body.chunks()) == b"abc"
    assert len(house.files()) == 1
    del body
    gc.collect()
    assert house.files() == []


def test_a_file_outside_of_the_spool_is_not_touched(house: House, tmp_path: Path) -> None:
    asking = Asking(house.hub.engine(), [message()])
    sent = house.reply(taken(house), b"abc")
    path = tmp_path / "mine"
    path.write_bytes(b"abc")
    for _ in range(2):
        house.hub.answered("A", ONE, Message(sent.header, FileBody(path, 3)))
    asking.done().clear()
    gc.collect()
    assert path.exists()


def test_what_an_earlier_process_left_goes_and_a_carrier_s_files_stay(house: House) -> None:
    asking = Asking(house.hub.engine(), [message()])
    house.hub.answered("A", ONE, house.reply(taken(house), b"abc"))
    assert len(asking.done()) == 1
    part = house.body(b"half")
    House(house.folder)
    assert house.files() == [part]
    # Updates lie there.
    assert {path.stat().st_mode & 0o077 for path in (house.folder, house.folder / "replies")} == {0}


# Who is there -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["another instance", "lost", "lost and back", "holds nothing"])
def test_what_was_not_answered_is_handed_out_again(house: House, how: str) -> None:
    asking = Asking(house.hub.engine(), [message()])
    taken(house)
    instance = ONE
    match how:
        case "another instance":
            house.clock.now += ALIVE + 1
            house.hub.attach("A", instance := TWO)
        case "lost":
            house.hub.lost("A", ONE)
            instance = TWO
        case "lost and back":
            house.hub.lost("A", ONE)
            house.hub.attach("A", ONE)
        case _:
            house.hub.holds("A", ONE, [message().id])
            assert house.hub.take("A", ONE, 0.0) is None
            house.hub.holds("A", ONE, [])
    assert taken(house, instance=instance) == message()
    house.hub.answered("A", instance, house.reply(message()))
    assert len(asking.done()) == 1


def test_a_connection_that_another_took_over_loses_nothing_of_it(house: House) -> None:
    Asking(house.hub.engine(), [message()])
    taken(house)
    house.hub.lost("A", ONE)
    taken(house, instance=TWO)
    house.hub.lost("A", ONE)
    assert house.hub.take("A", TWO, 0.0) is None
    assert house.hub.presence()["A"].state == "present"


def test_a_twin_is_refused_and_told_why_until_the_first_is_silent(house: House) -> None:
    asking = Asking(house.hub.engine(), [message()])
    house.hub.attach("A", ONE)
    for call in (lambda: house.hub.attach("A", TWO), lambda: house.hub.take("A", TWO, 0.0)):
        with pytest.raises(Rejected, match=r"site A is connected already.*runs on two computers"):
            call()
    # Its key is the site's, and it was asked nothing.
    house.hub.answered("A", TWO, house.reply(message()))
    house.hub.heard("A", TWO)
    house.clock.now += ALIVE
    house.hub.heard("A", ONE)
    house.clock.now += ALIVE
    with pytest.raises(Rejected):
        house.hub.attach("A", TWO)
    assert [(e.site, e.count, e.at) for e in house.hub.events] == [("A", 5, house.clock() + 1e9)]
    assert "a second process" in house.hub.events[0].text
    house.clock.now += 1
    house.hub.attach("A", TWO)
    # Now the first is the twin.
    with pytest.raises(Rejected):
        house.hub.take("A", ONE, 0.0)
    house.hub.answered("A", TWO, house.reply(taken(house, instance=TWO)))
    assert len(asking.done()) == 1


def test_a_site_that_is_not_in_the_federation_gets_no_message_and_has_no_answer(house: House) -> None:
    with pytest.raises(Rejected, match="no site of this federation"):
        house.hub.attach("X", ONE)
    (reply,) = Asking(house.hub.engine(), [message("X")]).done()
    assert reply.header.kind == ERROR
    assert "this federation has no such site" in reply.header.meta["reason"]
    house.hub.heard("X", ONE)
    house.hub.answered("X", ONE, house.reply(message(), b"abc"))
    assert "X" not in house.hub.presence()
    assert house.files() == []


def test_presence_says_since_when(house: House) -> None:
    asking = Asking(house.hub.engine(), [message("A"), message("A", 2), message("B")])
    house.hub.attach("A", ONE)
    seen = house.clock() + 1e9
    states = []
    for silence in (ALIVE, GONE - ALIVE, 1.0):
        house.clock.now += silence
        states.append(house.hub.presence()["A"].state)
    assert states == ["present", "late", "lost"]
    found = house.hub.presence()
    assert (found["A"].seen, found["A"].waiting) == (seen, 2)
    assert (found["B"].state, found["B"].seen, found["B"].waiting) == ("never", None, 1)
    house.hub.heard("A", ONE)
    assert house.hub.presence()["A"].state == "present"
    house.hub.lost("A", ONE)
    assert house.hub.presence()["A"].state == "lost"
    house.hub.close()
    asking.done()


def test_a_site_that_waits_gets_a_message_when_it_is_asked(tmp_path: Path) -> None:
    found: list[Message | None] = []

    def wait() -> None:
        found.append(hub.take("A", ONE, 60.0))

    hub = Hub(tmp_path, House.key, Deadlines(), MOST, proof=anyone)
    thread = threading.Thread(target=wait)
    thread.start()
    Asking(hub.engine(), [message()])
    thread.join(5.0)
    assert found == [message()]
    thread = threading.Thread(target=wait)
    thread.start()
    hub.close()
    thread.join(5.0)
    assert found == [message(), None]


# Studies ------------------------------------------------------------------------------------------------------------


def test_two_studies_that_ask_the_same_get_one_answer_both(house: House) -> None:
    engines = [house.hub.engine(), house.hub.engine()]
    asking = [Asking(engine, [message()]) for engine in engines]
    twice = Asking(engines[0], [message(), message()])
    request = taken(house)
    assert house.hub.take("A", ONE, 0.0) is None
    house.hub.answered("A", ONE, house.reply(request, b"abc"))
    assert [len(each.done()) for each in (*asking, twice)] == [1, 1, 2]
    # Answered and asked again, it goes out again.
    again = Asking(engines[0], [message()])
    house.hub.answered("A", ONE, house.reply(taken(house)))
    assert len(again.done()) == 1


def test_closing_one_study_stops_no_other(house: House) -> None:
    engines = [house.hub.engine(), house.hub.engine()]
    asking = [Asking(engines[0], [message(), message(number=2)]), Asking(engines[1], [message()])]
    engines[0].close()
    asking[0].done()
    assert asking[0].interrupted
    # What only the first asked is not handed out any more.
    request = taken(house)
    assert (request, house.hub.take("A", ONE, 0.0)) == (message(), None)
    house.hub.answered("A", ONE, house.reply(request))
    assert len(asking[1].done()) == 1
    for messages in ([], [message()]):
        with pytest.raises(Interrupted):
            list(engines[0].exchange(messages))
    house.hub.close()
    with pytest.raises(Interrupted):
        list(engines[1].exchange([]))


def test_closing_the_hub_stops_all_and_hands_out_nothing(house: House) -> None:
    asking = [Asking(house.hub.engine(), [message()]) for _ in range(2)]
    house.hub.close()
    for each in asking:
        each.done()
        assert each.interrupted
    assert house.hub.take("A", ONE, 0.0) is None
    house.hub.answered("A", ONE, house.reply(message(), b"abc"))
    assert house.files() == []


def test_an_exchange_that_is_given_up_asks_no_more(house: House) -> None:
    asked, done = threading.Event(), threading.Event()

    def messages() -> Iterator[Message]:
        yield from (message(), message(number=2))
        asked.set()

    exchange = house.hub.engine().exchange(messages())

    def first() -> None:
        next(exchange)
        exchange.close()  # type: ignore[attr-defined]
        done.set()

    threading.Thread(target=first, daemon=True).start()
    assert asked.wait(5.0)
    house.hub.answered("A", ONE, house.reply(taken(house)))
    assert done.wait(5.0)
    assert house.hub.presence()["A"].waiting == 0


def heard_at(house: House, seconds: float) -> None:
    house.clock.now = 1000.0 + seconds
    house.hub.attach("A", ONE)


@pytest.mark.parametrize(
    ("before", "how"),
    [
        (lambda h: None, "it never connected"),
        (lambda h: h.hub.attach("A", ONE), "its connection was lost and it did not come back"),
        (lambda h: heard_at(h, 3580.0), "it was no longer heard"),
        (lambda h: heard_at(h, 3599.0), "it is connected and did not finish"),
    ],
)
def test_a_site_that_is_late_is_answered_for(house: House, before: Callable[[House], Any], how: str) -> None:
    asking = Asking(house.hub.engine(), [message()])
    before(house)
    house.clock.now = 1000.0 + 3599.0
    house.hub.expire()
    assert house.hub.presence()["A"].waiting == 1
    house.clock.now += 1.0
    house.hub.expire()
    (reply,) = asking.done()
    assert reply.header.kind == ERROR
    assert reply.header.reply_to == message().id
    assert f"no answer within 3600 s, the federation's deadline: {how}" in reply.header.meta["reason"]
    # What it sends afterwards counts for nothing.
    house.hub.answered("A", ONE, house.reply(message(), b"abc"))
    assert house.files() == []
    assert house.hub.events == []


def test_a_deadline_passes_by_the_real_clock_too(tmp_path: Path) -> None:
    hub = Hub(tmp_path, House.key, Deadlines(reply=0.05), MOST, proof=anyone)
    (reply,) = Asking(hub.engine(), [message()]).done()
    assert reply.header.kind == ERROR


def test_a_released_model_waits_longer(house: House) -> None:
    asking = Asking(house.hub.engine(), [message(kind=DELIVER)])
    house.clock.now += 7199.0
    house.hub.expire()
    house.hub.answered("A", ONE, house.reply(taken(house), kind="done"))
    assert [r.header.kind for r in asking.done()] == ["done"]


# What is refused ----------------------------------------------------------------------------------------------------


def bent(house: House, request: Message, how: str) -> tuple[str, Message]:
    """Over whose connection a reply comes, and one that is not what the site signed for the request."""
    good = house.reply(request, b"abc")
    match how:
        case "signed with another key":
            return "A", house.reply(request, b"abc", key=Identity.generate())
        case "not signed":
            return "A", Message(replace(good.header, signature=""), good.body)
        case "changed after it was signed":
            return "A", Message(replace(good.header, meta={"n": 1}), good.body)
        case "another round":
            moved = Message(replace(good.header, round=2), good.body)
            return "A", signed(Message(replace(moved.header, signature=""), moved.body), KEYS["A"])
        case "too long":
            return "A", house.reply(request, b"a" * (MOST + 1))
        case "shorter than it says":
            return "A", Message(good.header, FileBody(house.body(b"ab"), 2))
        case "other bytes":
            return "A", Message(good.header, FileBody(house.body(b"xyz"), 3))
        case "other bytes, as the carrier found":
            return "A", Message(good.header, SpooledBody(house.body(b"xyz"), 3, HeldBody(b"xyz").sha256))
        case "no file":
            return "A", Message(good.header, FileBody(house.folder / "gone", 3))
        case "over another site's connection":
            return "B", good
        case _:
            return "B", signed(Message(replace(good.header, site="B", signature="")), KEYS["B"])


OWN = [
    "signed with another key",
    "not signed",
    "changed after it was signed",
    "another round",
    "too long",
    "shorter than it says",
    "other bytes",
    "other bytes, as the carrier found",
    "no file",
]


@pytest.mark.parametrize("how", [*OWN, "over another site's connection", "for another site's request"])
def test_what_the_site_did_not_sign_answers_nothing(house: House, how: str) -> None:
    asking = Asking(house.hub.engine(), [message()])
    request = taken(house)
    by, reply = bent(house, request, how)
    house.hub.answered(by, ONE, reply)
    assert asking.replies == []
    assert [(e.site, e.count) for e in house.hub.events] == [(by, 1)]
    assert "refused" in house.hub.events[0].text
    # Only a reply of the site's own has it asked again.
    assert (house.hub.take("A", ONE, 0.0) == request) == (how in OWN)
    house.hub.answered("A", ONE, house.reply(request, b"abc"))
    assert [body_of(r) for r in asking.done()] == [b"abc"]


def test_a_site_whose_replies_are_all_refused_is_left_out(house: House) -> None:
    asking = Asking(house.hub.engine(), [message()])
    for _ in range(REFUSALS + 1):
        assert asking.replies == []
        house.hub.answered("A", ONE, house.reply(taken(house), b"abc", key=KEYS["B"]))
    (reply,) = asking.done()
    assert "4 replies were refused: a reply that the key of site A did not sign" in reply.header.meta["reason"]
    assert house.hub.take("A", ONE, 0.0) is None
    assert house.files() == []


def test_a_hash_of_the_carrier_is_enough(house: House) -> None:
    asking = Asking(house.hub.engine(), [message()])
    sent = house.reply(taken(house), b"abc")
    assert isinstance(sent.body, FileBody)
    body = SpooledBody(sent.body.path, 3, sent.header.body_sha256)
    house.hub.answered("A", ONE, Message(sent.header, body))
    assert [body_of(r) for r in asking.done()] == [b"abc"]


def test_parts_that_a_site_lacks_are_asked_for_once(house: House, tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"\0" * 16)
    table = (TensorInfo("w", "float32", (4,)),)
    header = Header("train", "study", "A", 1, tensors=table, body_nbytes=16, body_sha256=HeldBody(b"\0" * 16).sha256)
    full = Message(header, FileBody(path, 16))
    part = full.without((Part(0, "0" * 64),))
    engine = house.hub.engine()
    asking = Asking(engine, [part])
    lacks = signed(taken(house).reply(LACKS, meta={LACKS: [0]}), KEYS["A"])
    house.hub.answered("A", ONE, lacks)
    assert asking.done()[0].header.kind == LACKS
    # The same reply once more, to the whole message: it must not answer that.
    asking = Asking(engine, [full])
    house.hub.answered("A", ONE, lacks)
    house.hub.answered("A", ONE, house.reply(taken(house)))
    assert [r.header.kind for r in asking.done()] == ["update"]


def test_progress_goes_to_the_studies_that_asked(house: House) -> None:
    seen: list[tuple[Any, ...]] = []
    first = house.hub.engine(lambda *what: seen.append(("first", *what)))
    second = house.hub.engine(lambda *what: seen.append(("second", *what)))
    Asking(first, [message()])
    Asking(second, [message(study="other")])
    good = Header(PROGRESS, "study", "A", 1, meta={"step": 1, "steps": 3})
    house.hub.report(good)
    bad = [{"step": 4, "steps": 3}, {"step": "1", "steps": 3}, {}, {"step": True, "steps": 3}, {"step": -1, "steps": 3}]
    for meta in bad:
        house.hub.report(replace(good, meta=meta))
    for change in ({"study": "third"}, {"round": 2}, {"site": "B"}, {"kind": "update"}):
        house.hub.report(replace(good, **change))  # type: ignore[arg-type]
    assert seen == [("first", "study", "A", 1, 1, 3)]


def test_events_are_bounded_and_a_flood_of_one_hides_no_other(house: House, caplog: pytest.LogCaptureFixture) -> None:
    Asking(house.hub.engine(), [message()])
    house.hub.attach("A", ONE)
    for number in range(1000):
        with pytest.raises(Rejected):
            house.hub.attach("A", f"twin {number}")
    house.hub.answered("B", ONE, house.reply(message()))
    assert [(e.site, e.count) for e in house.hub.events] == [("A", 1000), ("B", 1)]
    assert len(caplog.records) == 2
    for number in range(2 * MOST_EVENTS):
        house.hub._note("A", f"event {number}")
    assert len(house.hub.events) == MOST_EVENTS
