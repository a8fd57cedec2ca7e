"""Bytes that somebody made to do harm: headers that eat memory, payloads that would run code, frames of noise."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import struct
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.applied import reconstruct
from tests.federation.rig import Rig
from tests.toys import toy_study
from wardround.engines.frames import SharedBodies
from wardround.errors import WardroundError, WireError
from wardround.federation.exchange import ERROR, TRAIN, UPDATE
from wardround.wire.canonical import MAX_DEPTH, MAX_MARKS, canonical_json, parse_json
from wardround.wire.message import MAX_HEADER, FileBody, Header, Message
from wardround.wire.parts import Part
from wardround.wire.tensors import TensorInfo

STUDY = toy_study(schedule={"rounds": 1, "min_sites": 2, "validate_every": 0, "release": "last"})
VALID = Header("train", "study", "A", round=3, meta={"x": 1.5}, tensors=(TensorInfo("w", "float32", (2, 3)),))
ALLOWED = 64 << 20


# Memory --------------------------------------------------------------------------------------------------------------


def peak_of(act: Callable[[], Any]) -> int:
    """Bytes that were allocated at most while something was refused."""
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def header_with(keys: int) -> bytes:
    text = ",".join(f'"{key:x}":0' for key in range(keys))
    return VALID.to_bytes().replace(b'"x":1.5', text.encode())


def test_a_header_of_a_million_keys_is_refused_before_it_is_read() -> None:
    data = header_with(1_000_000)
    assert len(data) > MAX_HEADER
    assert peak_of(lambda: Header.from_bytes(data)) < 1 << 20
    frame = io.BytesIO(struct.pack("<II", len(data), 0) + data)
    assert peak_of(lambda: SharedBodies().read(frame)) < 1 << 20


@pytest.mark.slow
def test_as_many_values_as_a_header_may_hold_stay_within_bounds() -> None:
    """More of them than 2^18 commas and colons are refused before they are parsed; that many cost little."""
    data = canonical_json(VALID.to_json() | {f"{key:x}": 0 for key in range(MAX_MARKS // 2 - 50)})
    assert peak_of(lambda: Header.from_bytes(data)) < ALLOWED
    more = canonical_json(VALID.to_json() | {f"{key:x}": 0 for key in range(MAX_MARKS)})
    assert len(more) < MAX_HEADER
    assert peak_of(lambda: Header.from_bytes(more)) < 1 << 20


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_json_as_deep_as_a_header_is_long_is_refused(opening: bytes) -> None:
    deep = opening * (MAX_HEADER // len(opening) - MAX_DEPTH)
    assert peak_of(lambda: parse_json(deep)) < ALLOWED
    assert peak_of(lambda: Header.from_bytes(VALID.to_bytes().replace(b"1.5", deep)[:MAX_HEADER])) < ALLOWED


def test_an_update_fifty_times_too_long_is_refused_unread(tmp_path: Path) -> None:
    """Its length alone is looked at: the body raises when it is read."""

    class Endless:
        nbytes = 1 << 40

        def chunks(self, offset: int = 0) -> Any:
            raise AssertionError("was read")

    rig = Rig(STUDY, tmp_path)
    exchange = rig.engine.exchange

    def swollen(messages: Any) -> Any:
        for reply in exchange(messages):
            if reply.header.site == "B":
                yield Message(replace(reply.header, body_nbytes=Endless.nbytes), Endless())
            else:
                yield reply

    rig.engine.exchange = swollen  # type: ignore[method-assign]
    rig.train()
    (report,) = rig.journal.reports()
    assert report.participants == ("A", "C")
    assert "bytes where the study says" in report.missing["B"]


# Code ----------------------------------------------------------------------------------------------------------------


class Canary:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


def payloads(canary: Path) -> dict[str, bytes]:
    """What would write the canary's file where somebody unpickles it."""
    saved, array, archive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(Canary(canary), saved)
    np.save(array, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    np.savez(archive, allow_pickle=True, x=np.array([Canary(canary)], dtype=object))
    return {
        "pickle": pickle.dumps(Canary(canary)),
        "torch.save": saved.getvalue(),
        "npy": array.getvalue(),
        "npz": archive.getvalue(),
    }


def test_the_canary_sings(tmp_path: Path) -> None:
    for name, data in payloads(tmp_path / "canary").items():
        loaded: dict[str, Callable[[], Any]] = {
            "pickle": lambda data=data: pickle.loads(data),  # type: ignore[misc]  # noqa: S301
            "torch.save": lambda data=data: torch.load(io.BytesIO(data), weights_only=False),  # type: ignore[misc]
            "npy": lambda data=data: np.load(io.BytesIO(data), allow_pickle=True),  # type: ignore[misc]
            "npz": lambda data=data: np.load(io.BytesIO(data), allow_pickle=True)["x"],  # type: ignore[misc]
        }
        loaded[name]()
        assert (tmp_path / "canary").exists(), name
        (tmp_path / "canary").unlink()


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "npy", "npz"])
def test_a_payload_that_would_run_code_is_bytes_and_no_more(tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    data = payloads(canary)[kind]
    # As a header, and as a frame.
    with pytest.raises(WireError):
        Header.from_bytes(data)
    with pytest.raises(WireError):
        SharedBodies().read(io.BytesIO(data + bytes(8)))
    # As a model and as k-space.
    for name in ("model.safetensors", "kspace.npy"):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(WardroundError):
        reconstruct(tmp_path / "model.safetensors", tmp_path / "kspace.npy", tmp_path / "out.nii.gz")
    # As the global state of a request, with a length and hash of its own.
    rig = Rig(STUDY, tmp_path / "rig")
    exchange = rig.engine.exchange
    body = FileBody(tmp_path / "model.safetensors", len(data))
    said: list[str] = []

    def poisoned(messages: Any) -> Any:
        for message in messages:
            if message.header.kind == TRAIN and message.header.site == "C":
                header = replace(message.header, body_nbytes=len(data), body_sha256=hashlib.sha256(data).hexdigest())
                (reply,) = exchange([Message(header, body)])
                said.append(reply.header.meta["reason"])
            (reply,) = exchange([message])
            if reply.header.kind == UPDATE and reply.header.site == "B":
                # As an update: padded to its length, with the right hash.
                padded = (data + b"\xff" * reply.header.body_nbytes)[: reply.header.body_nbytes]
                (tmp_path / "update").write_bytes(padded)
                header = replace(reply.header, body_sha256=hashlib.sha256(padded).hexdigest())
                reply = Message(header, FileBody(tmp_path / "update", len(padded)))
            yield reply

    rig.engine.exchange = poisoned  # type: ignore[method-assign]
    rig.train()
    assert said == ["Rejected: the tensor table does not fit the body"]
    assert rig.journal.reports()[0].participants == ("A", "C")
    assert not canary.exists()


# Noise ---------------------------------------------------------------------------------------------------------------


def bitten(data: bytes, chance: random.Random) -> bytes:
    """Some bytes flipped, cut out, put in, doubled or swapped for those of a number that means something."""
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(6):
            case 0:
                data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
            case 1:
                data = data[:at]
            case 2:
                data = data[:at] + chance.randbytes(chance.randint(1, 9)) + data[at:]
            case 3:
                data = data[:at] + data[at : at + 20] * 2 + data[at + 20 :]
            case 4:
                data = chance.choice((b"\x00" * 8, b"\xff" * 8, struct.pack("<II", MAX_HEADER, 1 << 16))) + data[8:]
            case _:
                data = data.replace(chance.choice((b"3", b'"', b"w", b"{")), chance.choice((b"-1", b"", b"\x00", b"[")))
    return data


def test_malformed_frames_are_refused_and_nothing_else(tmp_path: Path) -> None:
    """A message, the end, or `WireError`: the thread that reads frames survives nothing else."""
    stream = io.BytesIO()
    SharedBodies().write(stream, Message(VALID, FileBody(tmp_path / "body", 0)))
    absent = Message(replace(VALID, body_nbytes=24), FileBody(tmp_path / "body", 24)).without((Part(0, "0" * 64),))
    SharedBodies().write(parts := io.BytesIO(), absent)
    goods, chance, found = (stream.getvalue(), parts.getvalue()), random.Random(25), Counter[str]()
    for turn in range(20_000):
        frames = io.BytesIO(bitten(goods[turn % 2], chance))
        try:
            while (message := SharedBodies().read(frames)) is not None:
                assert message.header.id == Header.from_bytes(message.header.to_bytes()).id
                found["read"] += 1
        except WireError:
            found["refused"] += 1
    assert found["refused"] > 15_000
    assert found["read"] > 300


def test_a_site_answers_bitten_requests_and_is_none_the_worse(tmp_path: Path) -> None:
    rig = Rig(STUDY, tmp_path)
    next(rig.states())
    seen: list[Message] = []
    exchange = rig.engine.exchange

    def listening(messages: Any) -> Any:
        seen.extend(messages)
        return exchange(seen)

    rig.engine.exchange = listening  # type: ignore[method-assign]
    expected = rig.train().public_sha256
    site, chance, answered = rig.sites["A"], random.Random(26), Counter[str]()
    good = seen[0].header.to_bytes()
    while answered.total() < 300:
        try:
            header = Header.from_bytes(bitten(good, chance))
        except WireError:
            continue
        # The number of a round is believed where it is asked for: a later one is a later round.
        reply = site.handle(Message(replace(header, round=1), seen[0].body))
        answered[reply.header.kind] += 1
        assert json.loads(reply.header.to_bytes())["site"] == header.site
    assert answered[ERROR] > 200
    again = Rig(STUDY, tmp_path / "again")
    assert again.train().public_sha256 == expected
    assert site.handle(seen[0]).header.kind == UPDATE
