"""An update: one vector of integers that holds everything a site says in a round.

    body = group 1 | group 2 | ... | tail

A group is named tensors in fixed point, one after the other, each with its own scale. The tail is 32-bit digits: the
contributor count (1 for each site), every group's weight, every tensor's number of saturated values, and the metrics.
Whatever lies in an update adds up; nothing travels beside it.

A site sends y = (w / max_weight) x delta and w; the coordinator divides the sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.errors import Rejected, StudyError, WireError
from wardround.wire.canonical import digest
from wardround.wire.message import Body
from wardround.wire.ring import ExactSum, Ring, Uniform, dequantise, levels, quantise, value_bits, whole_elements
from wardround.wire.tensors import TensorInfo

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
WEIGHT_BITS = 30
# Elements have 2, 3 or 4 bytes; a body's chunks are a multiple of this (see wire.message.CHUNK).
ALIGNMENT = 12
TAIL = Ring(32)


@dataclass(frozen=True)
class Metric:
    """A number, or `size` of them, that is summed: in [low, high] in steps of `resolution`; 0 must be in range."""

    name: str
    low: float
    high: float
    resolution: float
    size: int = 1

    @property
    def largest(self) -> int:
        """The largest integer that one site may send."""
        return max(1, math.ceil((self.high - self.low) / self.resolution))

    def encode(self, values: Any) -> list[int]:
        """Non-negative integers of the values, clipped to the range; raises `Rejected` for NaN."""
        if self.size == 1 and isinstance(values, float | int):
            if not math.isfinite(values):
                raise Rejected(f"metric {self.name!r} is not a finite number")
            return [round((min(max(values, self.low), self.high) - self.low) / self.resolution)]
        array = np.broadcast_to(np.asarray(values, dtype=np.float64), (self.size,))
        if not np.isfinite(array).all():
            raise Rejected(f"metric {self.name!r} is not a finite number")
        clipped = np.clip(array, self.low, self.high)
        return [int(n) for n in np.rint((clipped - self.low) / self.resolution)]

    def decode(self, totals: list[int], contributors: int) -> Floats:
        """The sum over `contributors` sites from the sum of their integers."""
        return np.array([n * self.resolution + contributors * self.low for n in totals], dtype=np.float64)


@dataclass(frozen=True)
class Group:
    """Tensors that share a weight and a ring."""

    name: str
    tensors: tuple[TensorInfo, ...]
    ring_bits: int = 32

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(t.size for t in self.tensors)


@dataclass(frozen=True)
class Layout:
    """Where everything lies in an update: a pure function of study, method and model, the same at every site."""

    groups: tuple[Group, ...]
    metrics: tuple[Metric, ...] = ()
    max_sites: int = 64
    max_weight: float = 1.0

    def __post_init__(self) -> None:
        names = [g.name for g in self.groups] + [m.name for m in self.metrics]
        if len(set(names)) != len(names):
            raise StudyError("an update's groups and metrics need different names")
        for metric in self.metrics:
            if not metric.low <= 0.0 <= metric.high:
                raise StudyError(f"metric {metric.name!r} must have 0 in its range: a site without patients sends 0")
        for group in self.groups:
            value_bits(group.ring_bits, self.max_sites)

    @cached_property
    def digit_bits(self) -> int:
        """Value bits of one digit of the tail."""
        return value_bits(TAIL.bits, self.max_sites)

    @cached_property
    def largest(self) -> tuple[int, ...]:
        """The largest value that one site may send of every integer of the tail, in order."""
        largest = [1]
        for group in self.groups:
            largest.append(1 << WEIGHT_BITS)
            largest.extend(t.size for t in group.tensors)
        for metric in self.metrics:
            largest.extend([metric.largest] * metric.size)
        return tuple(largest)

    @cached_property
    def entries(self) -> tuple[int, ...]:
        """Bits of every integer of the tail, in order."""
        return tuple(n.bit_length() for n in self.largest)

    @cached_property
    def segments(self) -> tuple[tuple[int, Ring], ...]:
        """(bytes, ring) of each group and of the tail; groups are padded so that no chunk cuts an element."""
        parts = [(_padded(g.size * Ring(g.ring_bits).itemsize), Ring(g.ring_bits)) for g in self.groups]
        digits = sum(math.ceil(bits / self.digit_bits) for bits in self.entries)
        return (*parts, (digits * TAIL.itemsize, TAIL))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of an update."""
        return sum(size for size, _ in self.segments)

    def bits_of(self, group: Group) -> int:
        """Value bits of a group's elements."""
        return value_bits(group.ring_bits, self.max_sites)

    @cached_property
    def sha256(self) -> str:
        """Identity of the layout: updates of different layouts do not add."""
        return digest(
            {
                "groups": [[g.name, g.ring_bits, [t.to_json() for t in g.tensors]] for g in self.groups],
                "metrics": [[m.name, m.low, m.high, m.resolution, m.size] for m in self.metrics],
                "max_sites": self.max_sites,
                "max_weight": self.max_weight,
            }
        )

    def to_digits(self, integers: list[int]) -> Array:
        """The tail's elements from its integers."""
        mask = (1 << self.digit_bits) - 1
        digits: list[int] = []
        for value, shifts, largest in zip(integers, self._shifts, self.largest, strict=True):
            if not 0 <= value <= largest:
                raise WireError("an integer of an update's tail is out of its declared range")
            digits.extend([(value >> shift) & mask for shift in shifts])
        return np.array(digits, dtype=TAIL.dtype)

    def from_digits(self, elements: Array) -> list[int]:
        """The tail's (summed) integers from its elements."""
        digits = iter(elements.tolist())
        return [sum([next(digits) << shift for shift in shifts]) for shifts in self._shifts]

    @cached_property
    def _shifts(self) -> tuple[tuple[int, ...], ...]:
        """By how many bits the digits of every integer of the tail are shifted, in order."""
        base = self.digit_bits
        return tuple(tuple(base * i for i in range(math.ceil(bits / base))) for bits in self.entries)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


Scales = Mapping[str, float]


def scale_key(group: str, tensor: str) -> str:
    """The key of a tensor's scale in the global state."""
    return f"{group}/{tensor}"


def encode(
    layout: Layout,
    scales: Scales,
    weights: Mapping[str, float],
    tensors: Mapping[str, Mapping[str, Array]],
    metrics: Mapping[str, Any],
    random: Uniform,
) -> Iterator[bytes | memoryview]:
    """The bytes of an update, a tensor at a time.

    `tensors[group][name]` are the changes delta (not yet weighted); `weights[group]` lies in [0, max_weight];
    `scales` bounds |w / max_weight x delta| of each tensor. Integers are taken as elements, whatever weight and scale.
    Missing metrics count as zero. Raises `Rejected` when a value is not finite, a weight is out of range or a shape is
    not the layout's.
    """
    integers = [1]
    for group in layout.groups:
        ring, bits = Ring(group.ring_bits), layout.bits_of(group)
        weight = quantised_weight(weights[group.name], layout.max_weight)
        share = weight / (1 << WEIGHT_BITS)
        integers.append(weight)
        for info in group.tensors:
            delta = tensors[group.name][info.name]
            if tuple(delta.shape) != info.shape:
                raise Rejected(f"tensor {info.name!r} has shape {tuple(delta.shape)}, the study says {info.shape}")
            if not np.isfinite(delta).all():
                raise Rejected(f"tensor {info.name!r} holds a value that is not finite")
            scale = scales[scale_key(group.name, info.name)]
            # The share goes into the scale, not the values: one pass fewer over the model.
            if np.issubdtype(delta.dtype, np.integer):
                # Steps of a lattice already, with a share of the noise. None is cut, and none counted: either would be
                # done before the other sites' noise is in the sum.
                elements, saturated = whole_elements(delta, ring), 0
            elif share > 0.0:
                elements, saturated = quantise(delta, scale / share, bits, ring, random)
            else:
                elements, saturated = np.zeros(info.size, dtype=ring.dtype), 0
            integers.append(saturated)
            yield ring.pack(elements)
        nbytes = group.size * ring.itemsize
        yield bytes(_padded(nbytes) - nbytes)
    for metric in layout.metrics:
        integers.extend(metric.encode(metrics.get(metric.name, 0.0)))
    yield TAIL.pack(layout.to_digits(integers))


def quantised_weight(weight: float, max_weight: float) -> int:
    """The integer that stands for a weight; raises `Rejected` outside [0, max_weight]."""
    if not 0.0 <= weight <= max_weight:
        raise Rejected(
            f"a weight of {weight:g} is outside [0, {max_weight:g}]; raise protection.max_weight in the study"
        )
    return round(weight / max_weight * (1 << WEIGHT_BITS))


def limits(layout: Layout, scales: Scales, weights: Mapping[str, float]) -> dict[str, float]:
    """The largest change of each tensor that a site of these weights can say; 0 where its weight is none."""
    found = {}
    for group in layout.groups:
        share = quantised_weight(weights[group.name], layout.max_weight) / (1 << WEIGHT_BITS)
        for info in group.tensors:
            key = scale_key(group.name, info.name)
            found[key] = scales[key] / share if share > 0.0 else 0.0
    return found


# Values of a tensor that are doubles at once.
_PIECE = 1 << 20


class Aggregate:
    """What the sum of updates says: counts, weights, metrics, and tensors one at a time."""

    def __init__(self, layout: Layout, total: ExactSum, scales: Scales) -> None:
        self.layout = layout
        self._total = total
        self.scales = scales
        integers = iter(layout.from_digits(total.segment(len(layout.groups))))
        self.contributors = next(integers)
        self._steps: dict[str, int] = {}
        self._shares: dict[str, float] = {}
        self.saturated: dict[str, int] = {}
        for group in layout.groups:
            self._steps[group.name] = next(integers)
            self._shares[group.name] = self._steps[group.name] / (1 << WEIGHT_BITS)
            for info in group.tensors:
                self.saturated[scale_key(group.name, info.name)] = next(integers)
        self.metrics: dict[str, Floats] = {
            m.name: m.decode([next(integers) for _ in range(m.size)], self.contributors) for m in layout.metrics
        }

    def steps(self, group: str) -> int:
        """The sum of the sites' weights, in whole steps of 2^-30 of the largest."""
        return self._steps[group]

    def weight(self, group: str) -> float:
        """The sum of the sites' weights."""
        return self._shares[group] * self.layout.max_weight

    def total(self, group: str, tensor: str) -> Floats:
        """The sum over sites of w / max_weight x delta, exact in the sites' integers."""
        elements, info, found = self._elements(group, tensor)
        ring, bits = Ring(found.ring_bits), self.layout.bits_of(found)
        return dequantise(elements, self.scales[scale_key(group, tensor)], bits, ring).reshape(info.shape)

    def peak(self, group: str, tensor: str) -> float:
        """The largest magnitude in `total`."""
        elements, info, found = self._elements(group, tensor)
        if not info.size:
            return 0.0
        smallest, largest = Ring(found.ring_bits).extremes(elements)
        return max(largest, -smallest) * self.scales[scale_key(group, tensor)] / levels(self.layout.bits_of(found))

    def mean(self, group: str, tensor: str) -> Floats:
        """The weighted mean of the sites' changes; raises `Rejected` when all weights are zero."""
        share = self._share(group)
        mean = self.total(group, tensor)
        mean /= share
        return mean

    def moved(self, group: str, tensor: str, old: Array) -> Array:
        """A tensor that was `old`, by `mean`: added in double precision and rounded once. Raises as `mean`.

        A large one a piece at a time, so that no array of doubles of its size is in memory.
        """
        if type(self).mean is not Aggregate.mean or old.size <= _PIECE:
            return (self.mean(group, tensor) + old).astype(old.dtype)
        share, (elements, _, found) = self._share(group), self._elements(group, tensor)
        scale, bits, ring = self.scales[scale_key(group, tensor)], self.layout.bits_of(found), Ring(found.ring_bits)
        new, before = np.empty_like(old), old.reshape(-1)
        for start in range(0, old.size, _PIECE):
            piece = slice(start, start + _PIECE)
            step = dequantise(elements[piece], scale, bits, ring)
            step /= share
            step += before[piece]
            new.reshape(-1)[piece] = step
        return new

    def _share(self, group: str) -> float:
        share = self._shares[group]
        if share <= 0.0:
            raise Rejected(f"the weights of group {group!r} sum to zero; no site had anything to learn from")
        return share

    def _elements(self, group: str, tensor: str) -> tuple[Array, TensorInfo, Group]:
        index, offset, info, found = self._places[scale_key(group, tensor)]
        return self._total.segment(index)[offset : offset + info.size], info, found

    @cached_property
    def _places(self) -> dict[str, tuple[int, int, TensorInfo, Group]]:
        """Where each tensor's elements lie: segment and offset."""
        places = {}
        for index, group in enumerate(self.layout.groups):
            offset = 0
            for info in group.tensors:
                places[scale_key(group.name, info.name)] = (index, offset, info, group)
                offset += info.size
        return places


def check_range(layout: Layout, body: Body) -> None:
    """Gate of a clear update: one contributor, and no element beyond what one site may say.

    A wrapped or poisoned element could push the sum around the ring; raises `Rejected` naming the group.
    """
    bounds, start = [], 0
    for (size, ring), group in zip(layout.segments, layout.groups, strict=False):
        bounds.append((start, start + size, ring, levels(layout.bits_of(group)), group.name))
        start += size
    tail_at = start
    tail = bytearray()
    offset = 0
    for chunk in body.chunks():
        end = offset + len(chunk)
        for low, high, ring, top, name in bounds:
            begin, stop = max(low, offset), min(high, end)
            if begin < stop:
                smallest, largest = ring.extremes(ring.unpack(chunk[begin - offset : stop - offset]))
                if largest > top or smallest < -top:
                    raise Rejected(f"group {name!r} holds an element that no site can have sent")
        if end > tail_at:
            tail += chunk[max(0, tail_at - offset) :]
        offset = end
    digits = TAIL.unpack(bytes(tail))
    if len(digits) and int(digits.max()) >> layout.digit_bits:
        raise Rejected("the tail of an update holds a digit that no site can have sent")
    integers = layout.from_digits(digits)
    if integers[0] != 1:
        raise Rejected(f"an update counts itself {integers[0]} times")
    if any(n > largest for n, largest in zip(integers, layout.largest, strict=True)):
        raise Rejected("the tail of an update holds a number out of its declared range")
