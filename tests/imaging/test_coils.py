"""Coil maps: normalised, physical, and recovered from calibration data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.coils import birdcage_maps, calibration_region, low_resolution_maps
from wardround.imaging.acquisition.mri.masks import centred
from wardround.imaging.acquisition.mri.operator import fft2c


@pytest.mark.parametrize(("coils", "shape"), [(1, (8, 8)), (4, (17, 32)), (8, (64, 63))])
def test_birdcage_maps_have_unit_sum_of_squares(coils: int, shape: tuple[int, int]) -> None:
    maps = birdcage_maps(coils, shape)
    assert maps.shape == (coils, *shape)
    assert maps.dtype == np.complex64
    np.testing.assert_allclose((np.abs(maps) ** 2).sum(0), 1, rtol=1e-5)


def test_a_coil_sees_its_own_side_and_is_smooth() -> None:
    maps = birdcage_maps(8, (64, 64))
    rows, columns = np.mgrid[:64, :64] - 32
    for number, magnitude in enumerate(np.abs(maps)):
        angle = 2 * np.pi * number / 8
        side = (columns * np.cos(angle) + rows * np.sin(angle)) > 0
        assert magnitude[side].mean() > 1.5 * magnitude[~side].mean()
    inside = np.hypot(rows, columns)[:-1, :-1] < 30  # the corners are next to a coil
    for axis in (1, 2):
        steps = np.abs(np.diff(maps, axis=axis))[:, :63, :63]
        assert steps[:, inside].max() < 0.06


def test_receiver_phases_only_turn_the_maps() -> None:
    phases = np.linspace(0, 3, 4)
    turned = birdcage_maps(4, (16, 16), phases=phases)
    expected = birdcage_maps(4, (16, 16)) * np.exp(1j * phases)[:, None, None]
    np.testing.assert_allclose(turned, expected, atol=1e-6)


def test_calibration_region_of_lines_blocks_and_neither() -> None:
    lines = np.zeros((20, 33), np.float32)
    lines[:, centred(7, 33)] = 1
    lines[:, 2] = 1
    assert calibration_region(lines) == (20, 7)
    block = np.zeros((32, 48), np.float32)
    block[centred(10, 32), centred(12, 48)] = 1
    block[16, ::2] = 1
    assert calibration_region(block) == (10, 12)
    with pytest.raises(GeometryError, match="centre"):
        calibration_region(1 - np.maximum(lines, block[:20, :33]))


@pytest.mark.parametrize("family", ["lines", "block"])
@pytest.mark.parametrize("shape", [(64, 64), (63, 65)])
def test_low_resolution_maps_recover_true_maps_in_the_object(family: str, shape: tuple[int, int]) -> None:
    height, width = shape
    maps = torch.from_numpy(birdcage_maps(6, shape))
    rows, columns = np.mgrid[:height, :width]
    radius = np.hypot(rows / height - 0.5, columns / width - 0.5)
    disc = torch.from_numpy((radius < 0.38).astype(np.float32))
    mask = torch.zeros(shape)
    mask[slice(None) if family == "lines" else centred(20, height), centred(20, width)] = 1
    batch = torch.stack([maps * disc, 3 * maps * disc])
    estimated = low_resolution_maps(fft2c(batch) * mask, mask)
    assert estimated.isfinite().all()
    agreement = (estimated * maps.conj()).sum(1).abs()[:, radius < 0.3]
    assert agreement.min() > 0.99
    torch.testing.assert_close(estimated[0], estimated[1], atol=1e-5, rtol=1e-4)
    assert torch.linalg.vector_norm(estimated, dim=1).max() <= 1 + 1e-5


def test_low_resolution_maps_of_nothing_are_zero() -> None:
    estimated = low_resolution_maps(torch.zeros(1, 2, 8, 8, dtype=torch.complex64), torch.ones(8, 8))
    assert (estimated == 0).all()
