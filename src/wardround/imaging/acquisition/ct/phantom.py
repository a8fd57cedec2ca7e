"""Ellipses, whose sinograms are known in closed form: the ground truth of the CT projectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wardround.imaging.acquisition.ct.geometry import FloatArray, pixel_axis, rays
from wardround.study.ct import CTGeometry


@dataclass(frozen=True)
class Ellipse:
    """An ellipse of constant attenuation: middle and half axes in mm, rotation in radians, value in 1/mm."""

    x: float
    y: float
    a: float
    b: float
    rotation: float
    value: float


# A head without bone: scalp, brain, two ventricles and a lesion. Values add up where ellipses overlap.
HEAD = (
    Ellipse(0, 0, 92, 108, 0.0, 0.0192),
    Ellipse(0, 0, 84, 100, 0.0, 0.0004),
    Ellipse(-25, 20, 12, 28, 0.3, -0.0040),
    Ellipse(25, 20, 12, 28, -0.3, -0.0040),
    Ellipse(10, -50, 20, 12, 0.5, 0.0020),
)
# A thorax of water: chest wall, lungs, heart and a vertebra.
THORAX = (
    Ellipse(0, 0, 110, 80, 0.0, 0.0192),
    Ellipse(-48, 12, 32, 50, 0.15, -0.0140),
    Ellipse(48, 12, 32, 50, -0.15, -0.0140),
    Ellipse(-8, 8, 18, 24, 0.5, 0.0010),
    Ellipse(0, -55, 14, 12, 0.0, 0.0120),
)


def ellipse_sinogram(ellipses: Sequence[Ellipse], geometry: CTGeometry, *, rays_per_bin: int = 1) -> FloatArray:
    """Line integrals through ellipses, (views, bins); the mean of several rays per bin where asked for."""
    shifts = (np.arange(rays_per_bin) - (rays_per_bin - 1) / 2) / rays_per_bin
    total = np.zeros((geometry.views, geometry.bins))
    for shift in shifts.tolist():
        origin, direction = rays(geometry, shift=shift)
        for ellipse in ellipses:
            total += ellipse.value * _chords(ellipse, origin, direction)
    return total / rays_per_bin


def ellipse_image(ellipses: Sequence[Ellipse], geometry: CTGeometry, *, points: int = 8) -> FloatArray:
    """Area averages of ellipses over the pixels, (rows, columns), from points x points samples a pixel."""
    rows, columns = geometry.size
    x = pixel_axis(columns * points, geometry.pixel / points)
    y = -pixel_axis(rows * points, geometry.pixel / points)[:, None]
    image = np.zeros((rows * points, columns * points))
    for e in ellipses:
        cos, sin = math.cos(e.rotation), math.sin(e.rotation)
        u, v = (x - e.x) * cos + (y - e.y) * sin, (y - e.y) * cos - (x - e.x) * sin
        image += e.value * ((u / e.a) ** 2 + (v / e.b) ** 2 <= 1)
    average: FloatArray = image.reshape(rows, points, columns, points).mean((1, 3))
    return average


def _chords(ellipse: Ellipse, origin: FloatArray, direction: FloatArray) -> FloatArray:
    """Lengths in mm: the ellipse becomes the unit circle, where a chord is twice the root of 1 - distance^2."""
    cos, sin = math.cos(ellipse.rotation), math.sin(ellipse.rotation)
    turn = np.array([[cos, sin], [-sin, cos]]) / np.array([[ellipse.a], [ellipse.b]])
    start = (origin - [ellipse.x, ellipse.y]) @ turn.T
    towards = direction @ turn.T
    square = (towards**2).sum(-1)
    distance = (start[..., 0] * towards[..., 1] - start[..., 1] * towards[..., 0]) ** 2 / square
    chord: FloatArray = 2 * np.sqrt(np.maximum(1 - distance, 0) / square)
    return chord
