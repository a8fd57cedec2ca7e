"""Fewer bits: the rotation, the projections, error feedback, and what the coordinator refuses of a sparse update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard as matrix

from tests.laws.test_sum import Bytes
from wardround.errors import Rejected, WireError
from wardround.federation.exchange import Call, PlainSum
from wardround.protection.compression import RESIDUAL, Codec, RotationCodec, SubspaceCodec, TopKCodec
from wardround.protection.rotation import hadamard, rotate, unrotate
from wardround.wire.message import FileBody, Message, write_body
from wardround.wire.ring import ExactSum, Ring
from wardround.wire.scales import next_scales
from wardround.wire.sparse import DENSE, SMALLEST, Sparse
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Aggregate, Group, Layout, Metric, encode, limits, scale_key

Array = np.ndarray[Any, Any]
SEEDS = st.integers(0, 2**32)
CODECS: dict[str, Codec] = {
    "none": Codec(7),
    "rotation": RotationCodec(7, frozenset({"buffers"})),
    "subspace": SubspaceCodec(7, frozenset({"buffers"}), 0.3),
    "top_k": TopKCodec(7, frozenset({"buffers"}), 0.1),
}


def layout_of(ring_bits: int = 32) -> Layout:
    tensors = (TensorInfo("w", "float32", (13, 11)), TensorInfo("b", "float32", (5,)))
    buffers = (TensorInfo("running_var", "float32", (90,)),)
    return Layout(
        (Group("model", tensors, ring_bits), Group("buffers", buffers, ring_bits)), (Metric("loss", 0, 10, 1e-6),), 8
    )


def changes_of(layout: Layout, seed: int, spread: float = 0.1) -> dict[str, dict[str, Array]]:
    """Heavy-tailed: Student's t with two degrees of freedom."""
    random = np.random.default_rng(seed)
    return {
        g.name: {t.name: (spread * random.standard_t(2, t.shape)).astype(np.float32) for t in g.tensors}
        for g in layout.groups
    }


def scales_of(layout: Layout, value: float = 50.0) -> dict[str, float]:
    return {scale_key(g.name, t.name): value for g in layout.groups for t in g.tensors}


def body_of(codec: Codec, layout: Layout, changes: Any, number: int = 1, memory: Any = None) -> tuple[bytes, Any]:
    """What a site sends, and what it keeps."""
    sent = codec.sent(layout)
    weights = {g.name: 1.0 for g in layout.groups}
    told, kept = codec.compress(number, changes, memory or {}, limits(sent, scales_of(sent), weights))
    chunks = encode(sent, scales_of(sent), weights, told, {"loss": 1.0}, np.random.default_rng(1))
    return b"".join(bytes(c) for c in codec.form.pack(sent, chunks)), kept


def sum_of(codec: Codec, layout: Layout, bodies: list[bytes], size: int = 12) -> ExactSum:
    sent = codec.sent(layout)
    total = ExactSum(sent.segments)
    for data in bodies:
        offset = 0
        for chunk in codec.form.unpack(sent, Bytes(data, size)).chunks():
            total.add(chunk, offset)
            offset += len(chunk)
        assert offset == sent.nbytes
    return total


def restored(codec: Codec, layout: Layout, bodies: list[bytes], number: int = 1) -> Aggregate:
    sent = codec.sent(layout)
    return codec.restore(number, layout, Aggregate(sent, sum_of(codec, layout, bodies), scales_of(sent)))


# The rotation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(8))
def test_the_transform_is_the_hadamard_matrix(bits: int) -> None:
    size = 1 << bits
    found = np.stack([hadamard(row) for row in np.eye(size)])
    assert np.allclose(found, matrix(size) / np.sqrt(size), atol=1e-14)


@given(size=st.integers(0, 300), seed=SEEDS)
def test_the_rotation_is_orthonormal_and_its_inverse_exact(size: int, seed: int) -> None:
    def draw() -> np.random.Generator:
        return np.random.default_rng(seed)

    values = np.random.default_rng(seed + 1).standard_t(2, size)
    turned = rotate(values, draw())
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(values), rel=1e-12)
    assert np.allclose(unrotate(turned, draw()), values, rtol=0.0, atol=1e-6 * max(1.0, np.abs(values).max(initial=0)))
    if 0 < size <= 70:
        columns = np.stack([rotate(row, draw()) for row in np.eye(size)])
        assert np.allclose(columns @ columns.T, np.eye(size), atol=1e-12)


@pytest.mark.parametrize("size", [4096, 4097, 5000, 8191])
@pytest.mark.parametrize("where", [0, 1500, -1])
def test_one_large_value_is_spread_wherever_it_lies(size: int, where: int) -> None:
    values = np.zeros(size)
    values[where] = 1.0
    # A transform over blocks of 4096 and less makes 1/64; the second pass may add a few of them up.
    assert np.abs(rotate(values, np.random.default_rng(0))).max() < 6 / 64


@pytest.mark.parametrize("ring_bits", [16, 24])
def test_rotation_makes_heavy_tails_cheap(ring_bits: int) -> None:
    # One tensor whose scale is set by its largest value, as the coordinator sets it.
    layout = Layout((Group("model", (TensorInfo("w", "float32", (20_000,)),), ring_bits),), (), 64)
    changes = changes_of(layout, 3)
    exact = changes["model"]["w"].astype(np.float64)
    errors = []
    for codec in (Codec(7), RotationCodec(7)):
        told, _ = codec.compress(1, changes, {}, {})
        scales = {"model/w": 4.0 * float(np.abs(told["model"]["w"]).max())}
        total = ExactSum(layout.segments)
        total.add(b"".join(map(bytes, encode(layout, scales, {"model": 1.0}, told, {}, np.random.default_rng(0)))), 0)
        mean = codec.restore(1, layout, Aggregate(layout, total, scales)).mean("model", "w")
        errors.append(np.linalg.norm(mean - exact) / np.linalg.norm(exact))
    assert errors[1] < 0.3 * errors[0]


# Sums --------------------------------------------------------------------------------------------------------------


@given(kind=st.sampled_from(sorted(CODECS)), ring_bits=st.sampled_from([16, 24, 32]), seed=SEEDS, data=st.data())
def test_any_order_gives_the_same_bits(kind: str, ring_bits: int, seed: int, data: st.DataObject) -> None:
    codec, layout = CODECS[kind], layout_of(ring_bits)
    bodies = [body_of(codec, layout, changes_of(layout, seed + i))[0] for i in range(4)]
    assert {len(b) for b in bodies} == {codec.form.nbytes(codec.sent(layout))}
    shuffled = sum_of(codec, layout, data.draw(st.permutations(bodies)), 12 * data.draw(st.integers(1, 50)))
    assert shuffled.to_bytes() == sum_of(codec, layout, bodies).to_bytes()


@pytest.mark.parametrize("kind", CODECS)
def test_the_restored_mean_is_the_mean_of_what_was_sent(kind: str) -> None:
    codec, layout = CODECS[kind], layout_of()
    told = [changes_of(layout, seed) for seed in range(3)]
    made = [body_of(codec, layout, t) for t in told]
    found = restored(codec, layout, [body for body, _ in made])
    assert found.contributors == 3
    assert found.layout == layout
    assert found.weight("model") == pytest.approx(3.0)
    assert found.metrics["loss"][0] == pytest.approx(3.0, abs=1e-5)
    for group in layout.groups:
        for info in group.tensors:
            kept = [memory.get(RESIDUAL + scale_key(group.name, info.name), 0.0) for _, memory in made]
            sent = np.mean([t[group.name][info.name] - k for t, k in zip(told, kept, strict=True)], axis=0)
            assert found.mean(group.name, info.name).shape == info.shape
            assert np.allclose(found.mean(group.name, info.name), sent, atol=1e-5)
            assert np.allclose(found.total(group.name, info.name), 3 * sent, atol=3e-5)
            assert found.peak(group.name, info.name) == pytest.approx(3 * np.abs(sent).max(), abs=3e-5)
    # Small tensors and buffers travel whole, so nothing of them stays behind.
    assert all(set(memory) <= {RESIDUAL + "model/w"} for _, memory in made)
    assert bool(made[0][1]) == (kind in ("subspace", "top_k"))


@pytest.mark.parametrize(("kind", "part"), [("subspace", 0.3), ("top_k", 0.1)])
@given(seed=SEEDS, constant=st.booleans())
def test_error_feedback_recovers_the_full_change(kind: str, part: float, seed: int, constant: bool) -> None:
    """What arrived and what still waits is, after any number of rounds, all that was ever to be said.

    Heavy tails go over the scale now and then: what saturates waits too.
    """
    codec, layout, memory = CODECS[kind], layout_of(), dict[str, Array]()
    arrived, meant = np.zeros((13, 11)), np.zeros((13, 11))
    rounds = 30
    for number in range(1, rounds + 1):
        changes = changes_of(layout, seed if constant else seed + number)
        body, memory = body_of(codec, layout, changes, number, memory)
        arrived += restored(codec, layout, [body], number).mean("model", "w")
        meant += changes["model"]["w"]
        assert np.allclose(arrived + memory[RESIDUAL + "model/w"], meant, atol=1e-4 * rounds)
    if constant:
        # The residual is bounded, so of a constant change all but a few rounds' worth has arrived.
        assert np.linalg.norm(arrived - meant) < 0.6 * np.linalg.norm(meant)


@pytest.mark.parametrize("kind", ["subspace", "top_k"])
def test_what_saturates_or_has_no_weight_waits(kind: str) -> None:
    codec, layout = CODECS[kind], layout_of()
    changes = changes_of(layout, 4)
    sent = codec.sent(layout)
    for weight, scale in ((0.0, 1.0), (1.0, 1e-9)):
        largest = limits(sent, scales_of(sent, scale), dict.fromkeys(("model", "buffers"), weight))
        _, memory = codec.compress(1, changes, {}, largest)
        assert np.allclose(memory[RESIDUAL + "model/w"], changes["model"]["w"], atol=1e-6)


def test_the_projection_is_the_nearest_point_of_its_subspace() -> None:
    codec, layout = CODECS["subspace"], layout_of()
    changes = changes_of(layout, 5)
    body, memory = body_of(codec, layout, changes)
    sent, left = restored(codec, layout, [body]).mean("model", "w"), memory[RESIDUAL + "model/w"]
    assert np.sum(sent * left) == pytest.approx(0.0, abs=1e-3 * float(np.linalg.norm(left)))
    # Another round looks in other directions.
    again, _ = body_of(codec, layout, changes, 2)
    assert again != body


# Sparse bodies -----------------------------------------------------------------------------------------------------


def sparse_body(ring_bits: int = 32) -> tuple[Sparse, Layout, bytearray, int]:
    """A good body, and how many places it gives of the first tensor; they lie at its start."""
    codec, layout = CODECS["top_k"], layout_of(ring_bits)
    assert isinstance(codec.form, Sparse)
    data, _ = body_of(codec, layout, changes_of(layout, 1))
    return codec.form, layout, bytearray(data), codec.count("model", 143)


def expand(form: Sparse, layout: Layout, data: bytes) -> bytes:
    return b"".join(bytes(c) for c in form.unpack(layout, Bytes(data, 36)).chunks())


def test_a_sparse_body_is_as_long_as_the_study_says() -> None:
    form, layout, data, count = sparse_body(24)
    assert count == 15
    assert form.nbytes(layout) == len(data) == 15 * 7 + 5 * 3 + 90 * 3 + layout.segments[-1][0]
    assert SMALLEST > 5


def places(indices: Array) -> Callable[[bytearray], bytes]:
    return lambda data: indices.astype("<u4").tobytes() + bytes(data[60:])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (places(np.arange(15)[::-1]), "ascending"),
        (places(np.repeat(np.arange(8), 2)[:15]), "ascending"),
        (places(np.arange(15) + 129), "outside"),
        (places(np.append(np.arange(14), 2**32 - 1)), "outside"),
        (lambda data: bytes(data[:-4]), "ends before"),
        (lambda data: b"", "ends before"),
    ],
)
def test_a_malformed_sparse_body_is_refused(change: Callable[[bytearray], bytes], reason: str) -> None:
    form, layout, data, _ = sparse_body()
    assert len(expand(form, layout, bytes(data))) == layout.nbytes
    with pytest.raises(WireError, match=reason):
        expand(form, layout, change(data))


@given(junk=st.binary(max_size=200), at=st.integers(0, 500))
def test_no_bytes_break_the_reader(junk: bytes, at: int) -> None:
    form, layout, data, _ = sparse_body()
    data[at : at + len(junk)] = junk
    with contextlib.suppress(WireError):
        assert len(expand(form, layout, bytes(data[: form.nbytes(layout)]))) == layout.nbytes


def test_a_sparse_body_can_be_read_from_anywhere() -> None:
    form, layout, data, _ = sparse_body()
    whole = expand(form, layout, bytes(data))
    for offset in (0, 1, 12, 500, 600, len(whole)):
        rest = b"".join(bytes(c) for c in form.unpack(layout, Bytes(bytes(data))).chunks(offset))
        assert rest == whole[offset:]


def test_more_values_than_allowed_never_leave() -> None:
    layout, form = layout_of(), Sparse(0.1)
    weights = dict.fromkeys(("model", "buffers"), 1.0)
    chunks = encode(layout, scales_of(layout), weights, changes_of(layout, 1), {}, np.random.default_rng(0))
    with pytest.raises(WireError, match="allows 15"):
        list(form.pack(layout, chunks))


def test_a_large_tensor_is_expanded_in_pieces() -> None:
    size = 200_001
    layout = Layout((Group("model", (TensorInfo("w", "float32", (size,)),), 24),), (), 8)
    codec = TopKCodec(1, frozenset(), 0.01)
    body, memory = body_of(codec, layout, changes_of(layout, 2))
    found = restored(codec, layout, [body])
    expected = changes_of(layout, 2)["model"]["w"] - memory[RESIDUAL + "model/w"]
    assert np.count_nonzero(expected) == 2001
    assert np.allclose(found.mean("model", "w"), expected, atol=50.0 / 2**19)
    assert max(len(c) for c in codec.form.unpack(layout, Bytes(body)).chunks()) <= 3 << 16


def test_the_exchange_takes_a_good_sparse_update_and_refuses_others(tmp_path: Path) -> None:
    form, layout, data, _ = sparse_body()
    call = Call("train", "study", 1, ("A", "B"), layout, scales_of(layout), form=form)

    def reply(exchange: PlainSum, data: bytes, site: str = "A") -> Message:
        request = next(m for m in exchange.open() if m.header.site == site)
        body, sha256 = write_body(tmp_path / site, [data])
        header = request.reply("update", meta={"layout": layout.sha256}).header
        return Message(replace(header, body_nbytes=len(data), body_sha256=sha256), FileBody(body.path, len(data)))

    exchange = PlainSum(call)
    exchange.accept(reply(exchange, bytes(data)))
    assert exchange.aggregate().contributors == 1
    before = exchange.aggregate().total("model", "w").tobytes()
    outside = np.arange(130, 145).astype("<u4").tobytes() + bytes(data[60:])
    beyond = bytes(data[:60]) + Ring(32).pack(np.full(15, 2**31, "<u4")) + bytes(data[120:])
    for bad, why in (
        (outside, "outside"),
        (data[:-4], "study says"),
        (beyond, "no site"),
        (data + b"\0", "study says"),
    ):
        with pytest.raises(Rejected, match=why):
            exchange.accept(reply(exchange, bytes(bad), "B"))
    assert exchange.aggregate().total("model", "w").tobytes() == before
    whole = b"".join(map(bytes, DENSE.unpack(layout, Bytes(expand(form, layout, bytes(data)))).chunks()))
    with pytest.raises(Rejected, match="study says"):
        exchange.accept(reply(exchange, whole, "B"))


def test_saturation_counts_against_what_was_sent() -> None:
    codec, layout = TopKCodec(7, frozenset(), 0.01), Layout((Group("model", (TensorInfo("w", "float32", (10_000,)),)),))
    told, _ = codec.compress(1, changes_of(layout, 1), {}, {"model/w": 1e-6})
    scales = {"model/w": 1e-6}
    chunks = encode(layout, scales, {"model": 1.0}, told, {}, np.random.default_rng(0))
    total = ExactSum(layout.segments)
    total.add(b"".join(map(bytes, chunks)), 0)
    following, saturated = next_scales(Aggregate(layout, total, scales), codec.count)
    assert saturated == {"model/w": 1.0}
    assert following == {"model/w": 16e-6}
