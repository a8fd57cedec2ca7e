"""AUROC, average precision and calibration from counts, against direct computation over examples."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wardround.tasks.histograms import auroc, average_precision, calibration_error, reliability

BINS = 20
# Few distinct bins, so that most draws have ties.
EXAMPLES = st.lists(st.tuples(st.integers(0, BINS - 1), st.booleans()), min_size=1, max_size=30)


def counts_of(examples: list[tuple[int, bool]]) -> np.ndarray:
    counts = np.zeros((1, 2, BINS))
    for at, positive in examples:
        counts[0, int(positive), at] += 1
    return counts


def pairs(examples: list[tuple[int, bool]]) -> float:
    """The definition: over all pairs of a positive and a negative example, a tie counts half."""
    positive, negative = ([at for at, is_one in examples if is_one == which] for which in (True, False))
    won = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in product(positive, negative)]
    return sum(won) / len(won) if won else float("nan")


def step_integral(examples: list[tuple[int, bool]]) -> float:
    """sum (R_k - R_(k-1)) P_k, threshold by threshold."""
    found, last, area = sum(is_one for _, is_one in examples), 0.0, 0.0
    for threshold in sorted({at for at, _ in examples}, reverse=True):
        called = [is_one for at, is_one in examples if at >= threshold]
        recall = sum(called) / found if found else float("nan")
        area += (recall - last) * sum(called) / len(called)
        last = recall
    return area


@given(EXAMPLES)
def test_auroc_is_the_share_of_pairs_in_the_right_order(examples: list[tuple[int, bool]]) -> None:
    assert auroc(counts_of(examples))[0] == pytest.approx(pairs(examples), abs=1e-12, nan_ok=True)


@given(EXAMPLES)
def test_average_precision_is_the_sum_over_thresholds(examples: list[tuple[int, bool]]) -> None:
    expected = step_integral(examples)
    assert average_precision(counts_of(examples))[0] == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(EXAMPLES, st.sampled_from([1, 4, 10, 20]))
def test_calibration_is_the_gap_of_each_group(examples: list[tuple[int, bool]], groups: int) -> None:
    gap, centres = 0.0, [(at + 0.5) / BINS for at, _ in examples]
    diagram = reliability(counts_of(examples), groups)
    for group in range(groups):
        members = [i for i, centre in enumerate(centres) if int(centre * groups) == group]
        assert diagram.examples[0, group] == len(members)
        if members:
            confidence = np.mean([centres[i] for i in members])
            frequency = np.mean([examples[i][1] for i in members])
            assert diagram.confidence[0, group] == pytest.approx(confidence)
            assert diagram.frequency[0, group] == pytest.approx(frequency)
            gap += len(members) / len(examples) * abs(frequency - confidence)
        else:
            assert np.isnan(diagram.confidence[0, group])
    assert calibration_error(counts_of(examples), groups)[0] == pytest.approx(gap, abs=1e-12)


def test_many_histograms_at_once_are_those_of_each() -> None:
    counts = np.random.default_rng(0).integers(0, 4, (5, 3, 2, BINS)).astype(float)
    for read in (auroc, average_precision, calibration_error):
        found = read(counts)
        assert found.shape == (5, 3)
        assert found[4, 2] == pytest.approx(read(counts[4, 2:3])[0])


def test_what_no_example_says_is_no_number() -> None:
    empty, sick = np.zeros((1, 2, BINS)), counts_of([(3, True), (9, True)])
    assert np.isnan(auroc(empty))
    assert np.isnan(auroc(sick))
    assert np.isnan(average_precision(empty))
    assert average_precision(sick) == 1.0
    assert np.isnan(calibration_error(empty))
    with pytest.raises(ValueError, match="20 bins do not divide into 3 groups"):
        calibration_error(empty, 3)
