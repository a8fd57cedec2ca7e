"""Shamir's secret sharing over the prime 2^521 - 1 (Shamir, CACM 1979).

A secret s < p is the value at 0 of a polynomial of degree t - 1; any t of its points give it back, fewer say nothing.
The prime is a Mersenne prime with room for a 256-bit key, so that one field serves both kinds of secret.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

PRIME = (1 << 521) - 1
SHARE_BYTES = 66


@dataclass(frozen=True)
class Basis:
    """Lagrange's basis on distinct points, computed once for all polynomials that are known there."""

    points: tuple[int, ...]

    def __post_init__(self) -> None:
        if len({x % PRIME for x in self.points}) != len(self.points):
            raise ValueError("interpolation needs distinct points")

    @cached_property
    def _scales(self) -> tuple[int, ...]:
        """1 / prod_(j != i) (x_i - x_j)."""
        scales = []
        for i, x in enumerate(self.points):
            product = 1
            for j, other in enumerate(self.points):
                if j != i:
                    product = product * (x - other) % PRIME
            scales.append(pow(product, -1, PRIME))
        return tuple(scales)

    def weights(self, at: int) -> tuple[int, ...]:
        """The w_i with f(at) = sum_i w_i f(x_i) mod p for every polynomial of degree < len(points)."""
        before = [1]
        for x in self.points:
            before.append(before[-1] * (at - x) % PRIME)
        weights = [0] * len(self.points)
        after = 1
        for i in reversed(range(len(self.points))):
            weights[i] = before[i] * after % PRIME * self._scales[i] % PRIME
            after = after * (at - self.points[i]) % PRIME
        return tuple(weights)


def combine(weights: Sequence[int], values: Sequence[int]) -> int:
    """sum_i w_i y_i mod p."""
    return sum(w * y for w, y in zip(weights, values, strict=True)) % PRIME


def share_bytes(value: int) -> bytes:
    """A field element as 66 bytes, big-endian."""
    return value.to_bytes(SHARE_BYTES, "big")


def share_value(data: bytes) -> int | None:
    """The field element of 66 bytes; `None` when they are not one."""
    value = int.from_bytes(data, "big")
    return value if len(data) == SHARE_BYTES and value < PRIME else None
