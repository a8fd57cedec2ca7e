"""The law of the sum: any order, grouping and chunking gives the same bits, and nothing impossible gets in."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wardround.errors import Rejected, StudyError, WireError
from wardround.wire import update as wire_update
from wardround.wire.message import FileBody
from wardround.wire.ring import ExactSum, Ring, dequantise, levels, quantise, value_bits
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import (
    ALIGNMENT,
    TAIL,
    Aggregate,
    Group,
    Layout,
    Metric,
    check_range,
    encode,
    scale_key,
)

Array = npt.NDArray[Any]
RINGS = st.sampled_from([16, 24, 32])
SEEDS = st.integers(0, 2**32)


@dataclass(frozen=True)
class Bytes:
    """A body in memory, in chunks of one size."""

    data: bytes
    size: int = ALIGNMENT

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self, offset: int = 0) -> Iterator[memoryview]:
        for start in range(offset, len(self.data), self.size):
            yield memoryview(self.data)[start : start + self.size]


def layout_of(first: int = 32, second: int = 16, max_sites: int = 8, max_weight: float = 10.0) -> Layout:
    return Layout(
        (
            Group("model", (TensorInfo("w", "float32", (3, 5)), TensorInfo("b", "float32", (7,))), first),
            Group("control", (TensorInfo("w", "float32", (11,)),), second),
        ),
        (Metric("loss", -1e6, 1e6, 1e-7), Metric("draws", 0.0, 50.0, 0.5, size=3)),
        max_sites,
        max_weight,
    )


def update_of(layout: Layout, seed: int, *, weight: float = 1.0, spread: float = 0.1) -> tuple[bytes, dict[str, Any]]:
    """One site's update and what it says."""
    random = np.random.default_rng(seed)
    tensors = {
        g.name: {t.name: random.normal(0.0, spread, t.shape).astype(np.float32) for t in g.tensors}
        for g in layout.groups
    }
    metrics = {"loss": float(random.normal()), "draws": random.integers(0, 100, 3) / 2}
    data = b"".join(
        bytes(chunk)
        for chunk in encode(
            layout, scales_of(layout), dict.fromkeys([g.name for g in layout.groups], weight), tensors, metrics, random
        )
    )
    return data, {"tensors": tensors, "metrics": metrics}


def scales_of(layout: Layout, value: float = 1.0) -> dict[str, float]:
    return {scale_key(g.name, t.name): value for g in layout.groups for t in g.tensors}


def total_of(layout: Layout, updates: list[bytes]) -> ExactSum:
    total = ExactSum(layout.segments)
    for data in updates:
        total.add(data, 0)
    return total


# Order, grouping, chunking ------------------------------------------------------------------------------------------


@given(first=RINGS, second=RINGS, seed=SEEDS, sites=st.integers(1, 8), data=st.data())
def test_any_order_and_chunking_gives_the_same_bits(
    first: int, second: int, seed: int, sites: int, data: st.DataObject
) -> None:
    layout = layout_of(first, second)
    updates = [update_of(layout, seed + i)[0] for i in range(sites)]
    expected = total_of(layout, updates).to_bytes()

    pieces = []
    for update in updates:
        size = ALIGNMENT * data.draw(st.integers(1, 20))
        pieces += [(update[start : start + size], start) for start in range(0, len(update), size)]
    total = ExactSum(layout.segments)
    for chunk, offset in data.draw(st.permutations(pieces)):
        total.add(chunk, offset)
    assert total.to_bytes() == expected


@given(first=RINGS, second=RINGS, seed=SEEDS, cut=st.integers(1, 5))
def test_sums_of_sums_are_the_sum(first: int, second: int, seed: int, cut: int) -> None:
    layout = layout_of(first, second)
    updates = [update_of(layout, seed + i)[0] for i in range(6)]
    halves = [total_of(layout, part).to_bytes() for part in (updates[:cut], updates[cut:])]
    assert total_of(layout, halves).to_bytes() == total_of(layout, updates).to_bytes()


@given(bits=RINGS, seed=SEEDS)
def test_the_sum_is_that_of_big_integers(bits: int, seed: int) -> None:
    random, ring = np.random.default_rng(seed), Ring(bits)
    rows = random.integers(0, 1 << bits, (5, 12), dtype=np.uint64)
    total = ExactSum(((12 * ring.itemsize, ring),))
    for row in rows:
        total.add(ring.pack(row.astype(ring.dtype)), 0)
    expected = [sum(int(v) for v in column) % (1 << bits) for column in rows.T]
    assert [int(v) for v in ring.unpack(total.to_bytes())] == expected


def test_groups_are_padded_so_that_no_chunk_cuts_an_element() -> None:
    layout = layout_of(24, 16)
    sizes = [size for size, _ in layout.segments]
    assert all(size % ALIGNMENT == 0 for size in sizes[:-1])
    assert sizes[0] >= 22 * 3
    assert len(update_of(layout, 1)[0]) == layout.nbytes == sum(sizes)


def test_a_chunk_outside_the_update_or_through_an_element_is_refused() -> None:
    total = ExactSum(layout_of().segments)
    before = total.to_bytes()
    for chunk, offset in ((b"\1" * 12, total.nbytes - 11), (b"\1" * 12, -12), (b"\1" * 5, 0), (b"\1" * 4, 2)):
        with pytest.raises(WireError):
            total.add(chunk, offset)
    assert total.to_bytes() == before


def test_memory_does_not_grow_with_the_number_of_sites() -> None:
    layout = Layout((Group("model", (TensorInfo("w", "float32", (100_000,)),), 24),), (), 64)
    data = update_of(layout, 0, weight=1.0)[0]
    body = Bytes(data, 12 << 10)
    total = ExactSum(layout.segments)

    def add(sites: int) -> int:
        tracemalloc.start()
        for _ in range(sites):
            offset = 0
            for chunk in body.chunks():
                total.add(chunk, offset)
                offset += len(chunk)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    add(1)
    one, many = add(1), add(40)
    assert many < one + 20_000
    assert many < layout.nbytes


# The quantiser -----------------------------------------------------------------------------------------------------


@given(bits=st.integers(4, 32), scale=st.floats(1e-6, 1e6), seed=SEEDS)
def test_the_error_is_below_one_step_and_zero_stays_zero(bits: int, scale: float, seed: int) -> None:
    ring = Ring(32)
    random = np.random.default_rng(seed)
    values = np.concatenate([random.uniform(-scale, scale, 200) * (1 - 1e-9), [0.0]])
    elements, saturated = quantise(values, scale, bits, ring, random)
    back = dequantise(elements, scale, bits, ring)
    # Float noise is one u < 1 in single precision, so a value may round across a step by its rounding error.
    assert np.abs(back - values).max() <= scale / levels(bits) * (1 + 1e-6) + scale * 1e-12
    assert back[200] == 0.0
    assert saturated == 0


def test_rounding_is_unbiased() -> None:
    ring, random, repeats = Ring(16), np.random.default_rng(1), 40_000
    for value in (0.123, -0.77, 0.5, 1e-4):
        elements, _ = quantise(np.full(repeats, value), 1.0, 6, ring, random)
        back = dequantise(elements, 1.0, 6, ring)
        step = 1.0 / levels(6)
        # Six standard errors of the mean of a Bernoulli variable of height `step`.
        assert abs(back.mean() - value) < 6 * 0.5 * step / math.sqrt(repeats)
        assert len(np.unique(back)) == 2


@given(bits=st.integers(4, 16), seed=SEEDS)
def test_values_out_of_scale_saturate_and_are_counted(bits: int, seed: int) -> None:
    ring, random = Ring(16), np.random.default_rng(seed)
    values = np.array([0.5, 3.0, -2.0, 1.0 + 1e-9, -1.0])
    elements, saturated = quantise(values, 1.0, bits, ring, random)
    back = dequantise(elements, 1.0, bits, ring)
    assert saturated == 3
    assert back[1] == 1.0
    assert back[2] == -1.0


@given(bits=RINGS, max_sites=st.integers(1, 512))
def test_sums_of_the_largest_values_never_wrap(bits: int, max_sites: int) -> None:
    room = value_bits(bits, max_sites)
    ring, top = Ring(bits), levels(room)
    total = ExactSum(((12 * ring.itemsize, ring),))
    extremes = np.array([top, -top] * 6, dtype=np.int64).astype(ring.dtype)
    for _ in range(max_sites):
        total.add(ring.pack(extremes), 0)
    signed = ring.signed(total.segment(0))
    assert signed[0] == max_sites * top
    assert signed[1] == -max_sites * top


def test_a_ring_without_room_is_refused() -> None:
    with pytest.raises(StudyError, match="larger ring"):
        value_bits(16, 8192)
    with pytest.raises(StudyError, match="16, 24 or 32"):
        Ring(8)


# Digits, weights, metrics --------------------------------------------------------------------------------------------


@given(data=st.data(), max_sites=st.sampled_from([1, 2, 64, 4096]))
def test_digits_round_trip_and_add(data: st.DataObject, max_sites: int) -> None:
    layout = layout_of(max_sites=max_sites)
    sites = data.draw(st.integers(1, min(max_sites, 8)))
    rows = [[data.draw(st.integers(0, largest)) for largest in layout.largest] for _ in range(sites)]
    assert layout.from_digits(layout.to_digits(rows[0])) == rows[0]
    total = ExactSum((layout.segments[-1],))
    for row in rows:
        total.add(TAIL.pack(layout.to_digits(row)), 0)
    assert layout.from_digits(total.segment(0)) == [sum(column) for column in zip(*rows, strict=True)]


def test_the_largest_digits_of_all_sites_add_without_wrapping() -> None:
    layout = layout_of(max_sites=64)
    largest = list(layout.largest)
    total = ExactSum((layout.segments[-1],))
    for _ in range(64):
        total.add(TAIL.pack(layout.to_digits(largest)), 0)
    assert layout.from_digits(total.segment(0)) == [64 * n for n in largest]


@given(seed=SEEDS, weights=st.lists(st.floats(0.01, 10.0), min_size=1, max_size=8))
def test_the_weighted_mean_is_within_the_stated_error(seed: int, weights: list[float]) -> None:
    layout = layout_of()
    told = [update_of(layout, seed + i, weight=w) for i, w in enumerate(weights)]
    aggregate = Aggregate(layout, total_of(layout, [data for data, _ in told]), scales_of(layout))
    assert aggregate.contributors == len(weights)
    assert aggregate.weight("model") == pytest.approx(sum(weights), rel=1e-7, abs=1e-7)
    shares = [round(w / 10.0 * 2**30) / 2**30 for w in weights]
    for group in layout.groups:
        for info in group.tensors:
            exact = sum(
                s * said["tensors"][group.name][info.name].astype(np.float64)
                for s, (_, said) in zip(shares, told, strict=True)
            ) / sum(shares)
            step = 1.0 / levels(layout.bits_of(group))
            found = aggregate.mean(group.name, info.name)
            assert np.abs(found - exact).max() <= len(weights) * step / sum(shares) * (1 + 1e-6)
    loss = sum(said["metrics"]["loss"] for _, said in told)
    assert aggregate.metrics["loss"][0] == pytest.approx(loss, abs=len(weights) * 1e-7)
    assert np.array_equal(aggregate.metrics["draws"], sum(said["metrics"]["draws"] for _, said in told))


@pytest.mark.parametrize("size", [1, 4, 1 << 20])
@given(seed=SEEDS)
def test_a_tensor_moves_by_the_mean_whatever_the_pieces(size: int, seed: int) -> None:
    layout = layout_of(first=24)
    told = [update_of(layout, seed + i, weight=1.0 + i)[0] for i in range(3)]
    aggregate = Aggregate(layout, total_of(layout, told), scales_of(layout))
    for group in layout.groups:
        for info in group.tensors:
            old = np.random.default_rng(seed).normal(size=info.shape).astype(np.float32)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(wire_update, "_PIECE", size)
                moved = aggregate.moved(group.name, info.name, old)
            whole = (old + aggregate.mean(group.name, info.name)).astype(np.float32)
            assert moved.dtype == np.float32
            assert moved.tobytes() == whole.tobytes()


def test_a_site_without_weight_changes_nothing_but_the_count() -> None:
    layout = layout_of()
    data, _ = update_of(layout, 3, weight=2.0)
    idle, _ = update_of(layout, 4, weight=0.0)
    one = Aggregate(layout, total_of(layout, [data]), scales_of(layout))
    two = Aggregate(layout, total_of(layout, [data, idle]), scales_of(layout))
    assert two.contributors == 2
    assert np.array_equal(one.mean("model", "w"), two.mean("model", "w"))
    with pytest.raises(Rejected, match="sum to zero"):
        Aggregate(layout, total_of(layout, [idle]), scales_of(layout)).mean("model", "w")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_at_the_site_by_name(value: float) -> None:
    layout = layout_of()
    tensors = {g.name: {t.name: np.zeros(t.shape, np.float32) for t in g.tensors} for g in layout.groups}
    weights = {"model": 1.0, "control": 1.0}
    random = np.random.default_rng(0)
    tensors["model"]["b"][3] = value
    with pytest.raises(Rejected, match="'b'"):
        list(encode(layout, scales_of(layout), weights, tensors, {}, random))
    tensors["model"]["b"][3] = 0.0
    with pytest.raises(Rejected, match="'loss'"):
        list(encode(layout, scales_of(layout), weights, tensors, {"loss": value}, random))
    with pytest.raises(Rejected, match="weight"):
        list(encode(layout, scales_of(layout), {**weights, "model": value}, tensors, {}, random))


def test_a_wrong_shape_or_weight_is_refused_at_the_site() -> None:
    layout = layout_of()
    tensors = {g.name: {t.name: np.zeros(t.shape, np.float32) for t in g.tensors} for g in layout.groups}
    random = np.random.default_rng(0)
    for weight in (-0.1, 10.1):
        with pytest.raises(Rejected, match="max_weight"):
            list(encode(layout, scales_of(layout), {"model": weight, "control": 1.0}, tensors, {}, random))
    tensors["control"]["w"] = np.zeros(12, np.float32)
    with pytest.raises(Rejected, match="'w' has shape"):
        list(encode(layout, scales_of(layout), {"model": 1.0, "control": 1.0}, tensors, {}, random))


# The gate ------------------------------------------------------------------------------------------------------------


@given(seed=SEEDS, spread=st.sampled_from([0.0, 0.1, 100.0]), first=RINGS, chunk=st.integers(1, 30))
def test_the_gate_lets_every_honest_update_pass(seed: int, spread: float, first: int, chunk: int) -> None:
    layout = layout_of(first)
    check_range(layout, Bytes(update_of(layout, seed, weight=10.0, spread=spread)[0], chunk * ALIGNMENT))


def _with_tail(layout: Layout, data: bytes, change: dict[int, int]) -> bytes:
    size = layout.segments[-1][0]
    integers = layout.from_digits(TAIL.unpack(data[-size:]))
    for index, value in change.items():
        integers[index] = value
    digits, base = [], layout.digit_bits
    for value, bits in zip(integers, layout.entries, strict=True):
        count = math.ceil(bits / base)
        digits += [(value >> (base * i)) & ((1 << base) - 1) for i in range(count)]
    return data[:-size] + bytes(TAIL.pack(np.array(digits, dtype=TAIL.dtype)))


@given(first=RINGS, where=st.integers(0, 21), sign=st.sampled_from([-1, 1]), chunk=st.integers(1, 30))
def test_the_gate_refuses_an_element_that_no_site_can_have_sent(first: int, where: int, sign: int, chunk: int) -> None:
    layout = layout_of(first)
    data = bytearray(update_of(layout, 7)[0])
    ring, top = Ring(first), levels(layout.bits_of(layout.groups[0]))
    at = where * ring.itemsize
    for value, honest in ((sign * top, True), (sign * (top + 1), False)):
        data[at : at + ring.itemsize] = ring.pack(np.array([value], dtype=np.int64).astype(ring.dtype))
        if honest:
            check_range(layout, Bytes(bytes(data), chunk * ALIGNMENT))
        else:
            with pytest.raises(Rejected, match="'model'"):
                check_range(layout, Bytes(bytes(data), chunk * ALIGNMENT))


def test_the_gate_refuses_an_update_that_counts_twice_or_weighs_too_much() -> None:
    layout = layout_of()
    data, _ = update_of(layout, 7)
    check_range(layout, Bytes(_with_tail(layout, data, {})))
    check_range(layout, Bytes(_with_tail(layout, data, {1: 1 << 30, 2: 15})))
    for index, value, text in (
        (0, 2, "2 times"),
        (0, 0, "0 times"),
        (1, (1 << 30) + 1, "declared range"),  # a weight just above max_weight
        (2, 16, "declared range"),  # more saturated values than the tensor has
    ):
        with pytest.raises(Rejected, match=text):
            check_range(layout, Bytes(_with_tail(layout, data, {index: value})))


def test_the_gate_refuses_a_digit_that_is_too_big() -> None:
    layout = layout_of(24, 16)
    data, _ = update_of(layout, 7)
    size = layout.segments[-1][0]
    high = bytearray(data)
    high[-size + 3] = 0xFF
    with pytest.raises(Rejected, match="digit"):
        check_range(layout, Bytes(bytes(high)))


def test_a_body_on_disk_passes_the_same_gate(tmp_path: Path) -> None:
    layout = layout_of()
    data, _ = update_of(layout, 7)
    path = tmp_path / "body"
    path.write_bytes(data)
    check_range(layout, FileBody(path, len(data)))
    with pytest.raises(WireError, match="ends 1 bytes before"):
        check_range(layout, FileBody(path, len(data) + 1))
