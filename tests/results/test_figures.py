"""Scales, labels, units and pictures hold their promises for any numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from wardround.results.card import escape
from wardround.results.figures import Curve, curves, scale_for
from wardround.results.metrics import MetricInfo
from wardround.results.pictures import psnr
from wardround.results.units import human_bytes, human_seconds, ranges
from wardround.tasks.metrics import RECONSTRUCTION_METRICS

values = st.floats(-1e6, 1e6).map(lambda value: round(value, 4))


@given(st.lists(values, min_size=1, max_size=20), st.booleans())
def test_a_scale_holds_its_values_in_order(numbers: list[float], include_zero: bool) -> None:
    scale = scale_for(numbers, include_zero=include_zero)
    places = [scale.percent(value) for value in sorted(numbers)]
    assert places == sorted(places)
    assert 0 <= places[0] <= places[-1] <= 100
    assert all(scale.low <= tick <= scale.high for tick in scale.ticks)
    labels = [scale.label(tick) for tick in scale.ticks]
    assert len(set(labels)) == len(labels)
    if include_zero:
        assert scale.low <= 0 <= scale.high


def test_a_tick_says_the_value_it_stands_for() -> None:
    scale = scale_for([-0.1, 0.31])
    for tick in scale.ticks:
        assert math.isclose(float(scale.label(tick).replace("−", "-")), tick, abs_tol=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_names_of_curves_do_not_overlap(ends: list[float]) -> None:
    lines = [Curve(f"site {index}", "site-0", ((1.0, 0.0), (2.0, end))) for index, end in enumerate(ends)]
    chart = curves("loss", lines)
    assert chart is not None
    heights = sorted(float(piece.split('"')[0]) for piece in str(chart.names).split(' y="')[1:])
    assert len(heights) == len(ends)
    assert all(later - earlier > 14.9 for earlier, later in itertools.pairwise(heights))


def test_no_points_no_chart() -> None:
    assert curves("loss", [Curve("a", "site-0", ())]) is None
    single = curves("loss", [Curve("a", "site-0", ((3.0, 0.5),))])
    assert single is not None
    assert "circle" in single.plot


def test_psnr_of_a_known_error() -> None:
    reference = np.full((4, 4), 0.5, np.float32)
    assert math.isclose(psnr(reference + np.float32(0.25), reference), -20 * math.log10(0.25), rel_tol=1e-6)
    assert psnr(reference, reference) == math.inf


def test_metrics_print_with_a_real_minus_and_no_signed_zero() -> None:
    of = {spec.name: MetricInfo(**spec.to_json()) for spec in RECONSTRUCTION_METRICS}
    metric = of["psnr"]
    assert metric.difference(-0.304) == "−0.30"
    assert metric.difference(0.304) == "+0.30"
    assert metric.difference(-0.001) == "0.00"
    assert metric.show(-1.234) == "−1.23"
    assert metric.gain(2.0, 1.0) == 1.0
    assert of["nmse_head"].gain(2.0, 1.0) == -1.0


def test_units() -> None:
    assert [human_bytes(n) for n in (0, 999, 1500, 452_000, 34_352_000, 2e9)] == [
        "0 B", "999 B", "1.5 kB", "452 kB", "34.4 MB", "2.0 GB"
    ]  # fmt: skip
    assert [human_seconds(s) for s in (0.04, 59.96, 200, 3600, 3900)] == [
        "0.0 s", "1 min", "3 min 20 s", "1 h", "1 h 5 min"
    ]  # fmt: skip
    assert ranges([1, 2, 3, 7, 9, 10]) == "1–3, 7, 9–10"


@given(st.text())
def test_card_text_is_one_line_without_markup(text: str) -> None:
    line = escape(text)
    assert "\n" not in line
    assert "<" not in line
    assert all(line[index - 1] == "\\" for index, mark in enumerate(line) if mark in "|`[")
