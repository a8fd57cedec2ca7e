"""Headers, canonical JSON and tensor tables: what comes from outside is refused before it can do harm."""

from __future__ import annotations

import io
import json
import math
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wardround.engines.frames import CopiedBodies, SharedBodies
from wardround.errors import WireError
from wardround.wire.canonical import MAX_DEPTH, canonical_json, digest, parse_json
from wardround.wire.message import (
    CHUNK,
    EMPTY,
    SMALL,
    FileBody,
    Header,
    HeldBody,
    Message,
    body_sha256,
    held,
    write_body,
)
from wardround.wire.parts import Part
from wardround.wire.random import public_generator, public_seed
from wardround.wire.tensors import DTYPES, TensorFile, TensorInfo, TensorWriter, parse_table, table_of, tensors_sha256

NAMES = st.text(max_size=20)
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | NAMES
)
JSON = st.recursive(
    SCALARS, lambda part: st.lists(part, max_size=4) | st.dictionaries(NAMES, part, max_size=4), max_leaves=12
)
TABLES = st.lists(
    st.builds(
        TensorInfo,
        NAMES,
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 2**39), max_size=8).map(tuple),
    ),
    max_size=4,
    unique_by=lambda info: info.name,
).map(tuple)
HEADERS = st.builds(
    Header,
    kind=NAMES,
    study=NAMES,
    site=NAMES,
    round=st.integers(0, 2**40),
    attempt=st.integers(0, 9),
    phase=st.integers(0, 9),
    reply_to=NAMES,
    meta=st.dictionaries(NAMES, JSON, max_size=3),
    tensors=TABLES,
    body_nbytes=st.integers(0, 2**60),
    body_sha256=NAMES,
)  # fmt: skip
VALID = Header("train", "study", "A", round=3, meta={"x": 1.5}, tensors=(TensorInfo("w", "float32", (2, 3)),))


# Canonical JSON ------------------------------------------------------------------------------------------------------


@given(value=JSON)
def test_canonical_json_is_one_sequence_that_reads_back(value: Any) -> None:
    data = canonical_json(value)
    assert data.isascii()
    assert parse_json(data) == value
    assert canonical_json(parse_json(data)) == data
    if isinstance(value, dict):
        assert canonical_json(dict(reversed(value.items()))) == data
        assert digest(value) == digest(dict(reversed(value.items())))


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [-math.inf]}])
def test_what_is_not_finite_is_not_json(value: Any) -> None:
    with pytest.raises(ValueError):
        canonical_json(value)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"\xff\xfe", b"nul", b"{'a': 1}", b"NaN", b"[Infinity]", b"[-Infinity]", b'{"a": 1e999}',
        b'{"a": -1e999}', b'{"a": 1, "a": 2}', b'{"b": {"a": 1, "a": 1}}', b"[" * 100_000, b'{"a":' * 5_000,
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), b"9" * 10_000,
    ],
)  # fmt: skip
def test_hostile_json_is_refused(text: bytes) -> None:
    with pytest.raises(WireError):
        parse_json(text)


def test_the_deepest_allowed_json_passes() -> None:
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


# Headers -------------------------------------------------------------------------------------------------------------


@given(header=HEADERS)
def test_headers_round_trip(header: Header) -> None:
    again = Header.from_bytes(header.to_bytes())
    assert again == header
    assert again.id == header.id
    assert Header.from_bytes(memoryview(header.to_bytes())) == header


def test_the_id_depends_on_everything() -> None:
    others = [
        replace(VALID, **{name: value})
        for name, value in {
            "kind": "x", "study": "x", "site": "x", "round": 9, "attempt": 9, "phase": 9, "reply_to": "x",
            "meta": {"x": 2}, "tensors": (), "body_nbytes": 9, "body_sha256": "x",
        }.items()
    ]  # fmt: skip
    assert len({VALID.id, *(h.id for h in others)}) == 12


@given(
    key=st.sampled_from(sorted(VALID.to_json())),
    value=st.one_of(JSON, st.integers(-9, -1), st.just(True), st.just([{}]), st.just([["a"]])),
)
def test_a_value_of_another_type_is_refused_or_harmless(key: str, value: Any) -> None:
    hostile = {**VALID.to_json(), key: value}
    try:
        header = Header.from_bytes(canonical_json(hostile))
    except WireError:
        return
    # What passes is of the schema's type, in its range, and reads back.
    assert type(header.to_json()[key]) is type(VALID.to_json()[key])
    assert header.round >= 0
    assert header.body_nbytes >= 0
    assert Header.from_bytes(header.to_bytes()) == header


@given(data=st.data())
def test_what_is_absent_is_named_and_changes_no_id(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    table = tuple(TensorInfo(str(place), "uint8", (size,)) for place, size in enumerate(sizes))
    body = bytes(range(sum(sizes)))
    places = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1)))
    path = tmp_path_factory.mktemp("parts") / "body"
    path.write_bytes(body)
    whole = Message(replace(VALID, tensors=table, body_nbytes=len(body)), FileBody(path, len(body)))
    sent = whole.without(tuple(Part(place, f"{place:064x}") for place in places))
    assert sent.id == whole.id
    again = Header.from_bytes(sent.header.to_bytes())
    assert again == sent.header
    assert again.id == whole.id
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    left = [body[at : at + size] for at, size in zip(starts, sizes, strict=True)]
    expected = b"".join(piece for place, piece in enumerate(left) if place not in places)
    assert again.sent_nbytes == sent.body.nbytes == len(expected)
    offset = data.draw(st.integers(0, len(expected)))
    assert b"".join(bytes(chunk) for chunk in sent.body.chunks(offset)) == expected[offset:]
    # Asked for again, or all of it.
    assert sent.without(()) == whole
    # Through both kinds of frames.
    for frames in (SharedBodies(), CopiedBodies(path.parent / "spool")):
        stream = io.BytesIO()
        frames.write(stream, sent)
        stream.seek(0)
        read = frames.read(stream)
        assert read is not None
        assert read.header == sent.header
        assert b"".join(bytes(chunk) for chunk in read.body.chunks()) == expected


SHA = "0" * 64
TWO = {**VALID.to_json(), "tensors": [{"name": n, "dtype": "uint8", "shape": [9]} for n in "ab"], "body_nbytes": 18}


@pytest.mark.parametrize(
    "absent",
    [
        [], [[0, SHA], [0, SHA]], [[1, SHA], [0, SHA]], [[2, SHA]], [[-1, SHA]], [[True, SHA]], [[0.0, SHA]], [[0]],
        [[0, "0" * 63]], [[0, "G" * 64]], [[0, SHA + "\n"]], [[0, SHA, 1]], [[0, 5]], {"0": SHA}, "0", None,
        [[0, SHA], [1, SHA], [2, SHA]], [[n, SHA] for n in range(100_000)], [[2**70, SHA]],
    ],
)  # fmt: skip
def test_parts_that_a_table_does_not_have_once_and_in_order_are_refused(absent: Any) -> None:
    with pytest.raises(WireError):
        Header.from_bytes(canonical_json({**TWO, "absent": absent}))


def test_parts_are_no_larger_than_the_body() -> None:
    assert Header.from_bytes(canonical_json({**TWO, "absent": [[0, SHA], [1, SHA]]})).sent_nbytes == 0
    for nbytes in (0, 8, 17):
        with pytest.raises(WireError, match="larger than its body"):
            Header.from_bytes(canonical_json({**TWO, "body_nbytes": nbytes, "absent": [[0, SHA], [1, SHA]]}))
    # Of shapes whose bytes no memory holds.
    huge = [{"name": n, "dtype": "float64", "shape": [2**40 - 1] * 8} for n in "ab"]
    with pytest.raises(WireError, match="larger than its body"):
        Header.from_bytes(canonical_json({**TWO, "tensors": huge, "absent": [[1, SHA]]}))


@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        Header.from_bytes(data)


@given(data=st.data())
def test_a_bitten_header_is_refused_or_another_header(data: st.DataObject) -> None:
    good = bytearray(VALID.to_bytes())
    good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = Header.from_bytes(bytes(good))
    except WireError:
        return
    assert header.id == Header.from_bytes(header.to_bytes()).id


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1}, {"schema": 2}, {"schema": True}, {"round": -1}, {"round": 1.0}, {"round": True}, {"round": "1"},
        {"meta": []}, {"tensors": {}}, {"tensors": [1]}, {"tensors": [{"name": "w"}]}, {"kind": None},
        {"tensors": [{"name": "w", "dtype": "object", "shape": [1]}]},
        {"tensors": [{"name": "w", "dtype": "float32", "shape": [-1]}]},
        {"tensors": [{"name": "w", "dtype": "float32", "shape": [1.0]}]},
        {"tensors": [{"name": "w", "dtype": "float32", "shape": [True]}]},
        {"tensors": [{"name": "w", "dtype": "float32", "shape": [2**41]}]},
        {"tensors": [{"name": "w", "dtype": "float32", "shape": [1] * 9}]},
        {"tensors": [{"name": "w", "dtype": "float32", "shape": [1], "code": "x"}]},
        {"tensors": [{"name": "w", "dtype": "float32", "shape": [1]}] * 2},
    ],
)  # fmt: skip
def test_a_hostile_header_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        Header.from_bytes(json.dumps({**VALID.to_json(), **change}).encode())


def test_a_missing_key_is_refused() -> None:
    for key in VALID.to_json():
        with pytest.raises(WireError):
            Header.from_bytes(canonical_json({k: v for k, v in VALID.to_json().items() if k != key}))


def test_huge_promises_allocate_nothing() -> None:
    huge = replace(VALID, tensors=(TensorInfo("w", "float64", (2**39, 2**39)),), body_nbytes=2**60)
    long = canonical_json({**VALID.to_json(), "meta": {"x": "y" * (5 << 20)}})
    tracemalloc.start()
    header = Header.from_bytes(huge.to_bytes())
    assert header.tensors[0].nbytes == 2**81
    with pytest.raises(WireError, match="over the limit"):
        Header.from_bytes(long)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_body_shorter_than_promised_is_refused_without_a_big_buffer(tmp_path: Path) -> None:
    path = tmp_path / "body"
    path.write_bytes(b"abc")
    tracemalloc.start()
    with pytest.raises(WireError, match="ends"):
        body_sha256(FileBody(path, 2**50))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * CHUNK


# Bodies and tensors --------------------------------------------------------------------------------------------------


@given(size=st.integers(0, 40), offset=st.integers(0, 40))
def test_a_body_reads_from_any_offset(tmp_path_factory: pytest.TempPathFactory, size: int, offset: int) -> None:
    path = tmp_path_factory.mktemp("body") / "body"
    data = bytes(range(size))
    body, sha = write_body(path, [data[:7], memoryview(data)[7:]])
    assert body.nbytes == size
    assert sha == body_sha256(body)
    assert b"".join(bytes(c) for c in body.chunks(min(offset, size))) == data[offset:]


def test_chunks_of_a_large_body_never_cut_an_element(tmp_path: Path) -> None:
    data = np.arange(600_000, dtype="<u4").tobytes()
    body, _ = write_body(tmp_path / "body", [data])
    sizes = [len(c) for c in body.chunks()]
    assert sum(sizes) == len(data)
    assert all(size % 12 == 0 for size in sizes[:-1])
    assert max(sizes) <= CHUNK


def test_replies_are_addressed_by_their_request() -> None:
    request = Message(replace(VALID, attempt=2, phase=1, body_nbytes=7))
    reply = request.reply("done", meta={"a": 1})
    assert reply.header.reply_to == request.id
    assert (reply.header.study, reply.header.site, reply.header.round) == ("study", "A", 3)
    assert (reply.header.attempt, reply.header.phase, reply.header.tensors) == (2, 1, ())
    assert reply.header.body_nbytes == 0
    assert request.nbytes == len(request.header.to_bytes()) + EMPTY.nbytes


@given(seed=st.integers(0, 1000))
def test_tensors_round_trip_one_at_a_time(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    random = np.random.default_rng(seed)
    tensors = {
        f"t{i}": (100 * random.standard_normal(tuple(random.integers(0, 4, random.integers(0, 4))))).astype(dtype)
        for i, dtype in enumerate(DTYPES)
    }
    path = tmp_path_factory.mktemp("tensors") / "file"
    with path.open("wb") as file:
        writer = TensorWriter(file)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    found = TensorFile(path, parse_table([info.to_json() for info in writer.table]))
    assert writer.table == table_of(tensors)
    assert found.nbytes == writer.nbytes == path.stat().st_size
    assert list(found) == list(tensors)
    assert all(found[n].tobytes() == t.tobytes() and found[n].shape == t.shape for n, t in tensors.items())
    assert tensors_sha256(found) == tensors_sha256(dict(reversed(tensors.items())))


def test_a_tensor_that_is_not_sent_or_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file, pytest.raises(WireError, match="not sent"):
        TensorWriter(file).add("w", np.zeros(3, dtype=object))
    path.write_bytes(bytes(8))
    with pytest.raises(WireError, match="'w' are missing"):
        TensorFile(path, (TensorInfo("w", "float32", (3,)),))["w"]


def test_the_identity_of_a_model_is_in_names_types_shapes_and_values() -> None:
    a = np.arange(6, dtype=np.float32)
    hashes = [
        tensors_sha256(t) for t in ({"a": a}, {"b": a}, {"a": a.reshape(2, 3)}, {"a": a.view(np.int32)}, {"a": -a})
    ]
    assert len(set(hashes)) == 5


def test_public_randomness_depends_on_every_name() -> None:
    seeds = {
        public_seed(1, "A", 2),
        public_seed(2, "A", 2),
        public_seed(1, "B", 2),
        public_seed(1, "A", 3),
        public_seed(1),
    }
    assert len(seeds) == 5
    assert public_generator(1, "A").random() == public_generator(1, "A").random()


def test_a_small_body_is_held_and_a_large_one_left_in_its_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 2000
    body, sha256 = write_body(tmp_path / "body", [data])
    small = held(body)
    assert isinstance(small, HeldBody)
    assert (small.nbytes, body_sha256(small), held(small), held(EMPTY)) == (len(data), sha256, small, EMPTY)
    for offset in (0, 1, CHUNK, len(data) - 1, len(data)):
        assert b"".join(small.chunks(offset)) == data[offset:]
    # What was verified is what is used, whatever happens to the file.
    (tmp_path / "body").write_bytes(bytes(len(data)))
    assert body_sha256(small) == sha256
    large = FileBody(tmp_path / "body", SMALL + 1)
    assert held(large) is large
    with pytest.raises(WireError, match="ends 1 bytes before its length"):
        held(FileBody(tmp_path / "body", len(data) + 1))
