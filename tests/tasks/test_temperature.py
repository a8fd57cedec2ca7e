"""A site's temperature: found where it is known, refused where patients are too few, kept beside the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from wardround.tasks.temperature import (
    LEAST,
    Calibration,
    fitted,
    keep_calibration,
    kept_calibration,
    probabilities,
)


def logits_of(patients: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [4.0 * random.standard_normal((1 + patient % 3, 4)) for patient in range(patients)]


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("offsets", [(), (-3.0, 0.5, 0.0, -1.0)])
@pytest.mark.parametrize("true", [0.6, 2.5])
def test_the_temperature_under_which_probabilities_come_true_is_found(
    true: float, offsets: tuple[float, ...], multi_label: bool
) -> None:
    """Labels that are what calibrated probabilities say: by Gibbs' inequality no other temperature is likelier."""
    logits = logits_of(40)
    labels = np.array([probabilities(each, true, offsets, multi_label=multi_label).mean(axis=0) for each in logits])
    # The search ends within 1e-5 of the logarithm.
    found = fitted(logits, labels, offsets, multi_label=multi_label)
    assert found is not None
    assert found.temperature == pytest.approx(true, rel=1e-3)
    assert found.offsets == offsets


def test_few_patients_or_a_diverged_network_have_none() -> None:
    logits = logits_of(LEAST)
    labels = np.eye(4)[np.arange(LEAST) % 4]
    assert fitted(logits, labels, multi_label=False) is not None
    assert fitted(logits[1:], labels[1:], multi_label=False) is None
    logits[3][0, 0] = np.nan
    assert fitted(logits, labels, multi_label=False) is None


def test_it_lies_beside_the_site_s_part_of_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "A" / "federated"
    assert kept_calibration(folder) is None
    keep_calibration(folder, Calibration(1.7, (-2.0, 0.5)))
    assert kept_calibration(folder) == Calibration(1.7, (-2.0, 0.5))
    keep_calibration(folder, None)
    assert kept_calibration(folder) is None
    (folder / "temperature.json").write_text('{"temperature": 0}')
    assert kept_calibration(folder) is None


def test_a_temperature_of_an_earlier_version_is_still_one(tmp_path: Path) -> None:
    (tmp_path / "temperature.json").write_text('{"temperature": 1.7}\n')
    assert kept_calibration(tmp_path) == Calibration(1.7)
