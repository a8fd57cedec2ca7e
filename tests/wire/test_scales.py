"""Scales follow what sums say: they jump where values saturate, keep room, and never leave their bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wardround.errors import Rejected
from wardround.wire.ring import ExactSum
from wardround.wire.scales import ScaleRules, headroom, jump, next_scales, remembered
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Aggregate, Group, Layout, encode

WIDE, SCALAR = TensorInfo("w", "float32", (100,)), TensorInfo("s", "float32", ())
LAYOUT = Layout((Group("model", (WIDE, SCALAR)),), max_sites=4)
BITS = LAYOUT.bits_of(LAYOUT.groups[0])


def after(changes: list[dict[str, Any]], scale: float, *, first: bool = False) -> tuple[dict[str, float], Any]:
    """The scales that follow the sum of some sites' changes, and what saturated."""
    scales = {"model/w": scale, "model/s": scale}
    total = ExactSum(LAYOUT.segments)
    for number, change in enumerate(changes):
        tensors = {"model": {"w": np.zeros(100, np.float32), "s": np.zeros((), np.float32), **change}}
        chunks = encode(LAYOUT, scales, {"model": 1.0}, tensors, {}, np.random.default_rng(number))
        total.add(b"".join(map(bytes, chunks)), 0)
    return next_scales(Aggregate(LAYOUT, total, scales), first=first)


@pytest.mark.parametrize(("count", "factor"), [(1, 4.0), (5, 8.0), (11, 16.0), (100, 16.0)])
def test_a_scale_jumps_by_the_share_that_saturated(count: int, factor: float) -> None:
    """Also where the sites cancel each other and the sum has no peak to go by."""
    change = np.full(100, 1e-4, np.float32)
    change[:count] = 1.0
    following, saturated = after([{"w": change}, {"w": -change}], 0.01)
    assert saturated == {"model/w": count / 100}
    assert following["model/w"] == pytest.approx(factor * 0.01)


def test_a_jump_grows_with_the_share_and_ends_at_sixteen() -> None:
    assert [jump(share) for share in (0.0, 1e-4, 1.1e-4, 2e-3, 0.05, 0.2, 1.0)] == [1.0, 1.0, 2.0, 4.0, 8.0, 16.0, 16.0]


@given(st.floats(0.0, 1e6), st.floats(1e-6, 1e3), st.integers(1, 4), st.booleans())
def test_no_scale_grows_more_than_sixteen_fold(value: float, scale: float, sites: int, first: bool) -> None:
    change = {"w": np.full(100, value, np.float32), "s": np.asarray(-value, np.float32)}
    following, _ = after([change] * sites, scale, first=first)
    assert all(0.0 < new <= 16.0 * scale for new in following.values())


def test_a_scale_follows_the_peak_and_falls_slowly() -> None:
    for value, expected in ((0.5, 2.0), (0.2, 0.8), (0.001, 0.5), (0.0, 0.5)):
        following, saturated = after([{"w": np.full(100, -value, np.float32)}], 1.0)
        assert saturated == {}
        assert following["model/w"] == pytest.approx(expected, rel=1e-3)


def test_few_values_keep_room_for_what_moves_by_fits_and_starts() -> None:
    following, _ = after([{"s": np.asarray(0.01, np.float32)}], 0.1)
    assert following["model/s"] == pytest.approx(0.64, rel=1e-3)
    assert headroom(63, BITS) == 64.0
    assert headroom(64, BITS) == 4.0
    # A value at the peak keeps ten bits, and no tensor gets less room than any other.
    assert headroom(1, 14) == 7.0
    assert headroom(1, 10) == 4.0


def test_the_guess_of_the_first_round_falls_at_once_but_not_to_nothing() -> None:
    for value, expected in ((0.5, 2.0), (0.001, 0.064), (0.0, 1.0)):
        following, _ = after([{"w": np.full(100, value, np.float32)}], 1.0, first=True)
        assert following["model/w"] == pytest.approx(expected, rel=1e-3)


def test_steps_of_few_values_that_cancel_in_the_first_round_cut_nothing_off_in_the_next() -> None:
    """By 64 times their peak the scale would fall to 6.4e-5, and steps of 0.01 would saturate for two rounds."""
    following, _ = after([{"s": np.asarray(1e-6, np.float32)}], 0.05, first=True)
    assert following["model/s"] == pytest.approx(0.025)
    _, saturated = after([{"s": np.asarray(0.01, np.float32)}], following["model/s"])
    assert saturated == {}


# What a site accepts -------------------------------------------------------------------------------------------------

STATES = {"model/w": np.full(100, 3.0, np.float32), "buffers/var": np.full(8, 5.0, np.float32)}
RULES = ScaleRules(
    Layout((Group("model", (WIDE,)), Group("buffers", (TensorInfo("var", "float32", (8,)),))), max_sites=2),
    0.2,
    STATES,
    frozenset({"model"}),
)


def test_averages_start_with_room_for_what_they_hold() -> None:
    assert RULES.start == {"model/w": 0.2, "buffers/var": 20.0}
    assert ScaleRules(RULES.layout, 50.0, STATES, frozenset({"model"})).start == dict.fromkeys(RULES.start, 50.0)


def test_a_scale_grows_sixteen_fold_a_round_and_to_its_ceiling() -> None:
    start = RULES.start
    RULES.check(1, start, STATES, {})
    for number, seen in ((1, {}), (5, remembered(5, start))):
        RULES.check(number + 1, {**start, "model/w": 3.2}, STATES, seen)
        with pytest.raises(Rejected, match=r"scale of 3.3 for the tensor w, and the study's rounds come to 3.2"):
            RULES.check(number + 1, {**start, "model/w": 3.3}, STATES, seen)
    ceiling = 16.0 * 4.0 * 2 * 3.0
    assert RULES.ceiling("model/w", STATES) == ceiling
    RULES.check(100, {**start, "model/w": ceiling}, STATES, {})
    for far in (1.01 * ceiling, 3e8, 1e300):
        with pytest.raises(Rejected, match="tensor w"):
            RULES.check(100, {**start, "model/w": far}, STATES, {})
    with pytest.raises(Rejected, match="without the scale of the tensor var"):
        RULES.check(1, {"model/w": 0.2}, STATES, {})


@given(st.floats(1e-9, 1e30), st.floats(0.0, 1e6))
def test_what_a_coordinator_announces_is_what_sites_accept(scale: float, value: float) -> None:
    public = {**STATES, "model/w": np.full(100, -value, np.float32)}
    scales = RULES.capped(dict.fromkeys(RULES.start, scale), public)
    RULES.check(300, scales, public, {})
    assert all(new <= scale for new in scales.values())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_excuse_nothing(value: float) -> None:
    public = {**STATES, "model/w": np.full(100, value, np.float32)}
    assert RULES.ceiling("model/w", public) == 16.0 * 4.0 * 2 * 0.2
