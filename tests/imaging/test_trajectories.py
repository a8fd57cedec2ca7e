"""Trajectories, the area that each sample stands for, and weights under which their density is even."""

from __future__ import annotations

import numpy as np
import pytest

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.trajectories import (
    cell_areas,
    dense_radius,
    even_weights,
    radial,
    radial_areas,
    spiral,
    spiral_areas,
    spoke_angles,
    spoke_radii,
)

SHAPE = (16, 16)


def _cartesian(shape: tuple[int, int]) -> np.ndarray:
    ky, kx = np.meshgrid(*((np.arange(n) - n // 2) / n for n in shape), indexing="ij")
    return np.stack([ky.ravel(), kx.ravel()], 1)


def test_spokes_go_through_the_centre_along_their_angles() -> None:
    points = radial(np.array([0.0, np.pi / 2]), 4)
    expected = [(0, -0.5), (0, -0.25), (0, 0), (0, 0.25), (-0.5, 0), (-0.25, 0), (0, 0), (0.25, 0)]
    np.testing.assert_allclose(points, expected, atol=1e-15)
    np.testing.assert_allclose(np.degrees(spoke_angles(3, True)), [0, 111.246, 222.492], atol=1e-3)
    np.testing.assert_allclose(spoke_angles(4, False, 0.1), 0.1 + np.pi / 4 * np.arange(4))


def test_areas_of_two_spokes_by_hand() -> None:
    """Two spokes of 4 samples, dr = 1/4: each has half of pi. 16 x 16 cells fill a square of one cycle per pixel."""
    areas = radial_areas(np.array([0.0, np.pi / 2]), spoke_radii(4), SHAPE).reshape(2, 4)
    ring = np.pi / 2 * 0.25 * 0.25 * 256
    np.testing.assert_allclose(areas[0], [2 * ring, ring, np.pi / 2 * (0.25**2 / 4) * 256, ring])
    np.testing.assert_allclose(areas[1], areas[0])


@pytest.mark.parametrize("golden", [True, False])
@pytest.mark.parametrize("spokes", [1, 2, 13])
def test_areas_of_spokes_fill_a_disc(golden: bool, spokes: int) -> None:
    angles = spoke_angles(spokes, golden, 0.3)
    areas = radial_areas(angles, spoke_radii(64), SHAPE)
    assert areas.min() > 0
    # From -0.5 to below 0.5: half of the outermost ring, whose radius is not reached on one side, and half a step more.
    np.testing.assert_allclose(areas.sum(), np.pi / 4 * 256, rtol=2 / 64)


@pytest.mark.parametrize("golden", [True, False])
def test_cells_of_spokes_are_their_areas_in_closed_form(golden: bool) -> None:
    """Even ones to the curvature of a ring, (angle / 2)^2 / 3; golden ones end otherwise where gaps are unequal."""
    angles, radii = spoke_angles(21, golden), spoke_radii(64)
    found, expected = cell_areas(radial(angles, 64), SHAPE), radial_areas(angles, radii, SHAPE)
    inside = np.tile(np.abs(radii) < 0.48, 21)
    off = np.abs(found / expected - 1)[inside]
    bound = (np.pi / 42) ** 2 / 3
    assert np.median(off) < 1.5 * bound
    if not golden:
        assert off.max() < 1.5 * bound
    np.testing.assert_allclose(found.sum(), expected.sum(), rtol=0.04)


def test_cells_of_spirals_are_rings_and_those_of_a_grid_are_one() -> None:
    points = spiral(8, 4.0, 64)
    found, expected = cell_areas(points, (64, 64)), spiral_areas(points, 8, (64, 64))
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)
    grid = _cartesian((16, 12))
    np.testing.assert_allclose(cell_areas(grid, (16, 12)), 1.0)
    # Measured twice, each sample stands for half of its cell.
    np.testing.assert_allclose(cell_areas(np.concatenate([grid, grid]), (16, 12)), 0.5)


def test_samples_on_one_line_stand_for_no_area() -> None:
    with pytest.raises(GeometryError, match="lie on one line"):
        cell_areas(radial(np.array([0.3]), 16), SHAPE)
    with pytest.raises(GeometryError, match="too few samples"):
        cell_areas(np.array([[0.0, 0.0], [0.1, 0.0], [0.0, 0.1]]), SHAPE)


def test_a_spoke_between_neighbours_that_are_near_stands_for_less() -> None:
    areas = radial_areas(np.radians([0.0, 10.0, 20.0, 90.0]), spoke_radii(8), SHAPE).reshape(4, 8).sum(1)
    np.testing.assert_allclose(areas / areas.sum(), np.array([50.0, 10.0, 40.0, 80.0]) / 180)


def test_spirals_end_at_the_edge_and_are_even_along_the_curve() -> None:
    points = spiral(3, 4.0, 32, oversampling=1.5, exponent=1.5, start=0.2).reshape(3, -1, 2)
    np.testing.assert_allclose(np.linalg.norm(points[:, [0, -1]], axis=2), [[0, 0.5]] * 3, atol=1e-12)
    steps = np.linalg.norm(np.diff(points, axis=1), axis=2)
    # The chord of the first step is shorter than its arc.
    np.testing.assert_allclose(steps[:, 1:], 1 / (1.5 * 32), rtol=0.1)
    ends = points[:, -1, 1] + 1j * points[:, -1, 0]
    np.testing.assert_allclose(ends, 0.5 * np.exp(1j * (0.2 + 2 * np.pi * np.arange(3) / 3)), atol=1e-9)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_areas_of_spirals_fill_a_disc(exponent: float) -> None:
    points = spiral(2, 8.0, 16, exponent=exponent)
    np.testing.assert_allclose(spiral_areas(points, 2, SHAPE).sum(), np.pi / 4 * 256, rtol=0.05)


def test_weights_of_a_grid_are_one_and_of_each_point_twice_a_half() -> None:
    grid = _cartesian((8, 6))
    np.testing.assert_allclose(even_weights(grid, (8, 6)), 1, atol=1e-3)
    np.testing.assert_allclose(even_weights(np.concatenate([grid, grid]), (8, 6)), 0.5, atol=1e-3)


def test_weights_make_the_density_even_by_its_definition() -> None:
    """After them sum_j w_j K(k_i - k_j) is 1 at every sample, K the transform of a triangle, in plain sums."""
    points = radial(spoke_angles(9, True), 16)
    weights = even_weights(points, (8, 8), 200)
    pixels = np.arange(-7, 8)
    waves = np.exp(-2j * np.pi * (points[:, None] - points)[..., None] * pixels)
    kernel = np.prod(waves @ (1 - np.abs(pixels) / 8) / 8, axis=2).real
    np.testing.assert_allclose(kernel @ weights, 1, atol=0.02)


def test_areas_and_weights_agree_where_samples_are_dense() -> None:
    angles = spoke_angles(40, False)
    points = radial(angles, 32)
    areas, weights = radial_areas(angles, spoke_radii(32), SHAPE), even_weights(points, SHAPE)
    ring = (np.hypot(*points.T) > 0.1) & (np.hypot(*points.T) < 0.35)
    # Twice as many samples along a spoke as its band needs: what a pair of them has is decided, and not each.
    np.testing.assert_allclose(weights[ring].sum(), areas[ring].sum(), rtol=0.03)


def test_the_dense_centre_of_spokes() -> None:
    """Uniform spokes are r pi / n apart at radius r; samples of a spoke half a step. A cell's middle is 0.707 away."""
    points = radial(spoke_angles(20, False), 64)
    radius = dense_radius(points, (32, 32)) * 32
    apart = 2 * np.sqrt(0.5 - 0.25**2)
    # Places that are looked at are a quarter of a step apart.
    assert abs(radius - apart * 20 / np.pi) < 0.75
    assert dense_radius(_cartesian(SHAPE), SHAPE) * 16 >= 7.0
    with pytest.raises(GeometryError, match="more spokes"):
        dense_radius(radial(spoke_angles(3, False), 64), (32, 32))
