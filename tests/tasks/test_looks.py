"""What is measured of a site's images before training: each number against its formula, on images that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wardround.study.normalise import PERCENTILES
from wardround.tasks.looks import (
    BINS,
    HIGH,
    LOW,
    RADII,
    Look,
    Subject,
    histogram,
    landmarks,
    noise,
    planes_of,
    rows_of,
    spectrum,
    whole,
)

WIDTH = (HIGH - LOW) / BINS
STRUCTURE = ("share of tumour", "slices with tumour", "volume of tumour")


def test_a_histogram_counts_each_value_once_and_the_rest_at_its_ends() -> None:
    found = histogram(np.array([LOW - 3.0, LOW, 0.01, 0.01, 0.05, WIDTH + 0.01, HIGH, HIGH + 9.0]))
    middle = BINS // 2
    assert found[0] == 2 / 8
    assert found[-1] == 2 / 8
    assert found[middle] == 3 / 8
    assert found[middle + 1] == 1 / 8
    assert found.sum() == 1.0
    assert np.isnan(histogram(np.zeros(0))).all()


def test_landmarks_are_percentiles_between_minus_2_and_2_whatever_the_units() -> None:
    values = np.arange(101.0) ** 2
    ends = 1.0, 99.0**2
    wanted = -2.0 + 4.0 * (np.array(PERCENTILES) ** 2 - ends[0]) / (ends[1] - ends[0])
    assert np.allclose(landmarks(values), wanted)
    assert np.allclose(landmarks(-4.0 + 0.3 * values), wanted)
    assert np.isnan(landmarks(np.full(9, 2.0))).all()
    assert np.isnan(landmarks(np.zeros(1))).all()


def test_white_noise_has_a_flat_spectrum_at_its_own_height() -> None:
    """|F|^2 of white noise is exponential with mean s^2, so log |F| has mean log s - gamma / 2 and deviation 0.641."""
    plane = 0.3 * torch.randn(96, 96, generator=torch.Generator().manual_seed(1))
    found = spectrum(plane)
    # Half of 9216 x pi / 4 frequencies are independent, in 32 rings of area 2 k - 1: the outer 28 have over 50 each,
    # neighbours twice so correlated by the window (its main lobe is 4 wide).
    assert np.allclose(found[4:], np.log(0.3) - np.euler_gamma / 2, atol=5 * 0.641 / np.sqrt(50 / 4))


def test_waves_of_one_frequency_in_all_directions_are_in_its_ring() -> None:
    y, x = (torch.arange(64.0) - 31.5).reshape(-1, 1), torch.arange(64.0) - 31.5
    waves = torch.special.bessel_j0(2 * torch.pi * (23.5 / 64) * torch.hypot(x, y))
    found = spectrum(waves)
    # Rings are 1 / 64 of a cycle a pixel wide: the wave is in the middle of the 24th.
    assert found.argmax() == 23
    assert found[23] > np.delete(found, range(20, 27)).max() + 1.0


def test_a_small_plane_has_a_value_in_every_ring() -> None:
    found = spectrum(torch.randn(8, 6, generator=torch.Generator().manual_seed(2)))
    assert found.shape == (RADII,)
    assert np.isfinite(found).all()


def test_noise_is_found_under_smooth_structure_and_only_where_something_is_shown() -> None:
    random = np.random.default_rng(3)
    y, x = np.mgrid[:64, :64]
    planes = (np.sin(x / 9.0) + np.cos(y / 7.0))[None] + 0.2 * random.standard_normal((3, 64, 64))
    shown = np.zeros(planes.shape, bool)
    shown[:, 8:56, 8:56] = True
    planes[~shown] = 50.0 * random.standard_normal((~shown).sum())
    # 1728 details; the median of absolute values has deviation 1.17 s / sqrt(n).
    assert noise(planes, shown) == pytest.approx(0.2, abs=5 * 1.17 * 0.2 / np.sqrt(1728))
    assert np.isnan(noise(planes, np.zeros_like(shown)))


def test_slices_of_a_volume_are_planes() -> None:
    images = torch.arange(2 * 3 * 4 * 5 * 6.0).reshape(2, 3, 4, 5, 6)
    found = planes_of(images)
    assert found.shape == (12, 3, 4, 5)
    assert torch.equal(found[7], images[1, :, :, :, 1])
    assert planes_of(found) is found


def look(seed: int, drawn: int | None = None, spacing: tuple[float, ...] | None = (1.0, 2.0, 3.0)) -> Look:
    """A volume 8 x 8 x 2 of one channel, in whose first slice so many voxels are drawn; `None` where nobody drew."""
    values = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    mask = None
    if drawn is not None:
        mask = np.zeros((8, 8, 2), bool)
        mask[..., 0].flat[:drawn] = True
    return Look([values.numpy().ravel()], values, torch.ones(2, 1, 8, 8, dtype=torch.bool), (8, 8, 2), spacing, (mask,))


def test_a_patient_adds_the_mean_over_all_of_their_images() -> None:
    subject = Subject(1, ("tumour",), ("benign", "malign"), several=True)
    first, second, other = look(1, 4), look(2, 0), look(3, None, None)
    rows = rows_of(
        subject,
        [
            (7, Look(**{**vars(first), "classes": np.array([True, False])})),
            (7, Look(**{**vars(second), "classes": np.array([False, False])})),
            (9, other),
        ],
    )
    assert {name: values.shape for name, values in rows.values.items()} == {
        name: (2, quantity.size) for name, quantity in subject.quantities.items()
    }
    both = [histogram(first.values[0]), histogram(second.values[0])]
    assert np.allclose(rows.values["intensity"][0], np.mean(both, axis=0))
    spectra = [spectrum(plane[0]) for plane in (*first.planes, *second.planes)]
    assert np.allclose(rows.values["spectrum"][0], np.mean(spectra, axis=0))
    # Of 128 voxels of 6 mm^3, 4 and none; in one slice of two, and in none.
    found = [rows.values[name][:, 0] for name in STRUCTURE]
    assert np.allclose([each[0] for each in found], [4 / 128 / 2, 0.25, 4 * 6 / 1000 / 2])
    assert all(np.isnan(each[1]) for each in found)
    assert rows.values["matrix"].tolist() == [[8.0, 8.0, 2.0]] * 2
    assert rows.values["spacing"][0].tolist() == [1.0, 2.0, 3.0]
    assert np.isnan(rows.values["spacing"][1]).all()
    assert rows.classes is not None
    assert rows.classes[0].tolist() == [1.0, 0.0]
    assert np.isnan(rows.classes[1]).all()


def test_sums_are_of_whole_steps() -> None:
    quantity = Subject(1).quantities["noise"]
    assert whole(np.array([[0.123456]]), quantity).tolist() == [[12346]]
