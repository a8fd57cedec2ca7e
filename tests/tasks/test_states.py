"""What patients add to a metric, how it merges, and what has no value or is no number."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wardround.errors import StudyError
from wardround.tasks.histograms import auroc, calibration_error
from wardround.tasks.resampling import RESAMPLES, resampled_error
from wardround.tasks.states import (
    Histogram,
    MetricState,
    RatioOfSums,
    check_metrics,
    patient_rows,
    state_of,
    value_of,
)
from wardround.tasks.task import MetricSpec

NAN = math.nan
MEAN = MetricSpec("mean", 0.0, 8.0, 0.25, True)
DICE = replace(MEAN, name="dice", may_be_absent=True)
RATIO = MetricSpec("ratio", 0.0, 1.0, 1e-6, True, kind=RatioOfSums(most=100.0))
AUROC = MetricSpec("auroc", 0.0, 1.0, 1e-6, True, kind=Histogram(auroc, classes=2, bins=10))
KINDS = (MEAN, DICE, RATIO, AUROC)


def rows_of(spec: MetricSpec, *patients: Any, diverged: bool = False) -> np.ndarray:
    """The rows of patients, each given by the values of its examples, two batches of them."""

    def batches() -> Iterator[tuple[int, Tensor]]:
        for number, values in enumerate(patients):
            tensor = torch.tensor(values, dtype=torch.float64)
            yield from ((number, part) for part in (tensor[:1], tensor[1:]) if len(part))

    found = patient_rows((spec,), batches(), lambda values: {spec.key: values}, lambda: diverged)
    return found[spec.name]


# Examples of a patient ----------------------------------------------------------------------------------------------


def test_a_mean_is_over_the_examples_of_a_patient_and_then_over_patients() -> None:
    rows = rows_of(MEAN, [1.0, 3.0, 5.0], [7.0], [99.0])
    assert rows.tolist() == [3.0, 7.0, 8.0]
    assert value_of(MEAN, rows) == 6.0


@given(st.lists(st.lists(st.floats(0, 8, width=32), min_size=1, max_size=40), min_size=1, max_size=40))
def test_a_mean_has_the_bits_of_one_by_one_averaging(patients: list[list[float]]) -> None:
    rows = rows_of(MEAN, *patients)
    expected = np.array([MEAN.clip(float(np.mean([float(v) for v in patient]))) for patient in patients])
    assert np.array_equal(rows, expected)
    assert float(state_of(MEAN, rows).total) == float(np.sum(expected))
    assert value_of(MEAN, rows) == float(np.mean(expected))


def test_patients_come_in_their_order_though_their_batches_do_not_follow_each_other() -> None:
    batches = [(4, torch.tensor([1.0])), (2, torch.tensor([5.0])), (4, torch.tensor([2.0, 6.0]))]
    assert patient_rows((MEAN,), batches, lambda v: {"mean": v})["mean"].tolist() == [3.0, 5.0]


def test_a_ratio_adds_the_examples_of_a_patient() -> None:
    rows = rows_of(RATIO, [[1.0, 4.0], [2.0, 2.0]], [[3.0, 94.0]])
    assert rows.tolist() == [[3.0, 6.0], [3.0, 94.0]]
    assert value_of(RATIO, rows) == pytest.approx(6.0 / 100.0)


def test_a_histogram_counts_examples_or_the_mean_score_of_a_patient() -> None:
    patient = [[[0.1, 0.0], [0.55, 1.0]], [[0.2, 0.0], [0.95, 0.0]]]
    each = rows_of(AUROC, patient)[0]
    assert np.argwhere(each).tolist() == [[0, 0, 1], [0, 0, 2], [1, 0, 9], [1, 1, 5]]
    once = rows_of(replace(AUROC, kind=replace(AUROC.kind, examples="mean")), patient)[0]
    assert np.argwhere(once).tolist() == [[0, 0, 1], [1, 1, 7]]
    assert each.sum() == 4
    assert once.sum() == 2


def test_scores_of_1_and_beyond_lie_in_the_last_bins() -> None:
    rows = rows_of(AUROC, [[[1.0, 1.0], [-0.5, 0.0]], [[7.0, 1.0], [math.inf, 0.0]]])[0]
    assert (rows[0, 1, 9], rows[1, 0, 0], rows[1, 0, 9]) == (2, 1, 1)


def test_a_class_whose_label_is_not_known_counts_nothing() -> None:
    rows = rows_of(AUROC, [[[0.3, NAN], [0.4, 1.0]]], [[[0.3, NAN], [0.4, NAN]]])
    assert [row.sum() for row in rows] == [1, 0]
    first, second = (replace(AUROC, kind=replace(AUROC.kind, only=only)) for only in (0, 1))
    assert AUROC.kind.counted(rows).tolist() == [True, False]
    assert first.kind.counted(rows).tolist() == [False, False]
    assert second.kind.counted(rows).tolist() == [True, False]
    with pytest.raises(StudyError, match="labels that the task's score gives are 0, 1 or NaN"):
        rows_of(AUROC, [[[0.3, 2.0], [0.4, 1.0]]])


def test_the_mean_over_classes_is_over_those_that_have_a_value() -> None:
    rows = rows_of(AUROC, [[[0.9, 1.0], [0.2, 1.0]]], [[[0.1, 0.0], [0.8, 1.0]]])
    # The second class has no negative example.
    assert value_of(AUROC, rows) == 1.0
    assert math.isnan(value_of(replace(AUROC, kind=replace(AUROC.kind, only=1)), rows))


# Patients without a value, and networks without a number -------------------------------------------------------------


def test_a_patient_without_a_value_is_counted_apart_where_the_metric_says_so() -> None:
    rows = rows_of(DICE, [NAN, 2.0], [NAN, NAN], [4.0])
    assert DICE.kind.counted(rows).tolist() == [True, False, True]
    assert value_of(DICE, rows) == 3.0
    assert value_of(MEAN, rows_of(MEAN, [2.0], [NAN], [4.0])) == 2.0
    assert math.isnan(value_of(DICE, rows_of(DICE, [NAN])))


def test_a_patient_who_adds_nothing_to_a_ratio_has_no_value_and_one_with_a_numerator_alone_has() -> None:
    rows = rows_of(RATIO, [[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 8.0]])
    assert RATIO.kind.counted(rows).tolist() == [False, True, True]
    assert value_of(RATIO, rows) == 0.25
    assert math.isnan(value_of(RATIO, rows[:1]))


@pytest.mark.parametrize("larger_is_better", [True, False])
def test_a_diverged_network_has_the_worst_value(larger_is_better: bool) -> None:
    worst = 0.0 if larger_is_better else 8.0
    for spec in KINDS:
        spec = replace(spec, low=0.0, high=8.0, larger_is_better=larger_is_better)
        example: Any = {(): NAN, (2,): [NAN, 5.0], (2, 2): [[NAN, 1.0], [NAN, 0.0]]}[spec.kind.given]
        rows = rows_of(spec, [example], [example], diverged=True)
        assert value_of(spec, rows) == worst
        assert spec.kind.counted(rows).all()
        if not spec.may_be_absent:
            assert value_of(spec, rows_of(spec, [example])) == worst


def test_one_patient_of_a_diverged_network_spoils_what_is_summed() -> None:
    good, bad = [[0.0, 5.0]], [[NAN, 5.0]]
    error = replace(RATIO, larger_is_better=False)
    rows = rows_of(error, good, bad, good)
    assert value_of(error, rows) == 1.0
    assert value_of(error, rows[[0, 2]]) == 0.0
    state = state_of(error, rows)
    assert (state.count, state.broken) == (3, 1)


def test_a_metric_that_may_be_absent_takes_nan_for_absence_of_any_kind() -> None:
    ratio, area = (replace(spec, may_be_absent=True) for spec in (RATIO, AUROC))
    assert rows_of(ratio, [[NAN, NAN], [1.0, 2.0]]).tolist() == [[1.0, 2.0]]
    assert not area.kind.counted(rows_of(area, [[[NAN, 1.0], [NAN, 0.0]]])).any()


# States merge by addition -------------------------------------------------------------------------------------------

VALUES = st.integers(0, 32).map(lambda n: n / 4.0)


def patients_of(spec: MetricSpec) -> st.SearchStrategy[np.ndarray]:
    """Rows of up to 8 patients, some without a value, some broken."""
    example: st.SearchStrategy[Any] = {
        (): VALUES | (st.just(NAN) if spec.may_be_absent else st.nothing()),
        (2,): st.tuples(VALUES, VALUES.map(lambda v: v + 8.0)) | st.just((0.0, 0.0)) | st.just((NAN, 1.0)),
        (2, 2): st.tuples(*[st.tuples(st.floats(0, 1), st.sampled_from([0.0, 1.0, NAN]))] * 2),
    }[spec.kind.given]
    # Two examples at most: their mean is a multiple of an eighth, and sums of those are exact.
    patient = st.lists(example, min_size=1, max_size=2)
    return st.lists(patient, min_size=1, max_size=8).map(lambda patients: rows_of(spec, *patients))


@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.name)
@given(data=st.data())
def test_any_order_and_grouping_of_patients_gives_the_same_state_and_value(spec: MetricSpec, data: Any) -> None:
    rows = data.draw(patients_of(spec))
    whole = state_of(spec, rows)
    order = data.draw(st.permutations(range(len(rows))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=3)))
    groups = [state_of(spec, part) for part in np.split(rows[order], cuts)]
    merged = groups[0]
    for group in groups[1:]:
        merged = merged + group
    assert np.array_equal(whole.total, merged.total)
    assert (whole.count, whole.broken) == (merged.count, merged.broken)
    assert np.array_equal(spec.kind.value(spec, whole), spec.kind.value(spec, merged), equal_nan=True)
    assert not math.isnan(value_of(spec, rows)) or spec.counts_apart


@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.name)
@given(data=st.data())
def test_weighted_patients_are_the_same_patients_several_times(spec: MetricSpec, data: Any) -> None:
    rows = data.draw(patients_of(spec))
    weights = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows))), float)
    several: MetricState = state_of(spec, np.repeat(rows, weights.astype(int), axis=0))
    found = state_of(spec, rows, weights[None])
    assert np.array_equal(found.total[0], several.total)
    assert (found.count[0], found.broken[0]) == (several.count, several.broken)


# Declarations -------------------------------------------------------------------------------------------------------


def test_metrics_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(StudyError, match="two metrics of the task are called 'mean'"):
        check_metrics((MEAN, RATIO, replace(RATIO, name="mean")))
    shared = replace(AUROC, source="finding")
    error = replace(shared, name="ece", kind=replace(AUROC.kind, read=calibration_error, only=1))
    check_metrics((*KINDS, shared := replace(shared, name="area"), error))
    with pytest.raises(StudyError, match="'ece': another metric of the source 'finding' adds up in another way"):
        check_metrics((shared, replace(error, kind=replace(AUROC.kind, bins=20))))
    with pytest.raises(StudyError, match="'ece': another metric"):
        check_metrics((shared, replace(error, may_be_absent=True)))


def test_the_metrics_of_the_docs_are_metrics() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"### Metrics of your own.*?```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(text, found)
    check_metrics(found["metrics"])
    assert [spec.name for spec in found["metrics"]] == ["auroc", "ece", "dice", "dice_voxels"]


def test_numbers_that_make_no_metric_are_refused() -> None:
    for wrong in ({"step": 0.0}, {"most": 0.5}, {"most": 2.0**40}):
        with pytest.raises(ValueError, match="ratio of sums needs"):
            RatioOfSums(**wrong)
    for histogram in ({"classes": 0}, {"bins": 1}, {"most": 0}, {"only": 1}, {"only": -1}):
        with pytest.raises(ValueError, match="histogram"):
            Histogram(auroc, **histogram)


@pytest.mark.parametrize(("spec", "needed"), [(MEAN, r"\(B\)"), (RATIO, r"\(B, 2\)"), (AUROC, r"\(B, 2, 2\)")])
def test_scores_of_another_shape_are_refused(spec: MetricSpec, needed: str) -> None:
    for shape in ((), (3, 7), (3, 2, 7)):
        with pytest.raises(StudyError, match=f"{spec.name}.*{needed}"):
            patient_rows((spec,), [(0, torch.zeros(shape))], lambda values: {spec.key: values})


# Drawing patients anew ----------------------------------------------------------------------------------------------


def test_the_resampled_error_of_a_mean_is_that_of_the_sample() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.1, (30, 1))
    # The spread of R normal replicates is known to about 1 / sqrt(2 R); four of those.
    near = 4.0 / math.sqrt(2 * RESAMPLES)
    exact = RatioOfSums(step=2.0**-30, most=4.0)
    ratio = MetricSpec("ratio", 0.0, 1.0, 1e-6, True, kind=exact)
    rows = np.concatenate([values, np.ones_like(values)], axis=1)
    expected = values.std(ddof=1) / math.sqrt(30)
    assert resampled_error(ratio, rows, np.random.default_rng(1)) == pytest.approx(expected, rel=near)
    other = rows + np.random.default_rng(2).normal(0.0, 0.01, (30, 1)) * [1.0, 0.0]
    paired = (other - rows)[:, 0].std(ddof=1) / math.sqrt(30)
    assert resampled_error(ratio, rows, np.random.default_rng(1), other) == pytest.approx(paired, rel=near)


def test_the_resampled_error_of_an_auroc_is_about_the_known_one() -> None:
    """DeLong's variance (Biometrics 44, 1988) from the same scores."""
    random = np.random.default_rng(5)
    positive, negative = random.normal(0.6, 0.15, 60).clip(0, 1), random.normal(0.4, 0.15, 60).clip(0, 1)
    kind = Histogram(auroc, bins=1000)
    spec = MetricSpec("auroc", 0.0, 1.0, 1e-6, True, kind=kind)
    patients = [[[[s, 1.0]]] for s in positive] + [[[[s, 0.0]]] for s in negative]
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    delong = math.sqrt(wins.mean(1).var(ddof=1) / 60 + wins.mean(0).var(ddof=1) / 60)
    assert resampled_error(spec, rows_of(spec, *patients), random) == pytest.approx(delong, rel=0.2)


def test_no_standard_error_where_resampling_says_nothing() -> None:
    random = np.random.default_rng(0)
    assert resampled_error(RATIO, np.array([[1.0, 2.0]]), random) is None
    assert resampled_error(RATIO, np.array([[1.0, 2.0], [0.0, 0.0]]), random) is None
    # An AUROC of 1 in every draw is no certainty.
    area = replace(AUROC, kind=Histogram(auroc, bins=10))
    rows = rows_of(area, *[[[[0.9, 1.0]]]] * 5, *[[[[0.1, 0.0]]]] * 5)
    assert value_of(area, rows) == 1.0
    assert resampled_error(area, rows, random) is None
    # One patient of 3 with the class: no value in more draws than half.
    rows = rows_of(area, [[[0.5, 1.0]]], [[[0.4, 0.0]]])
    assert resampled_error(area, rows, random) is None
