"""Trajectories through k-space, and the area of k-space that each of their samples stands for.

Points are (samples, 2) in cycles per pixel, along H and along W, from -0.5 to 0.5; the samples of a readout follow each
other. Areas are in units of a Cartesian sample's, 1 / HW, so that their sum over a full disc is pi HW / 4.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import ConvexHull, QhullError, Voronoi, cKDTree

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.nufft import TRAINING, Kept, Transform, content

FloatArray = NDArray[np.float64]
#: Half a turn times the golden section: 111.25 degrees (Winkelmann et al., IEEE TMI 26 (2007), 68).
GOLDEN = np.pi * (np.sqrt(5) - 1) / 2
_FINE = 64  # points a turn at which the length of a spiral is summed
_COILS = 16.0  # cycles over the field of view that coil maps are estimated from at most
_TOGETHER = 1e-4  # of a Cartesian step: samples that lie no farther apart lie in one place
_STEP = 0.25  # between the places that `dense_radius` looks at, of a Cartesian step
_FARTHEST = 0.5**0.5 + 1e-3  # half the diagonal of a Cartesian cell


def spoke_angles(spokes: int, golden: bool, start: float = 0.0) -> FloatArray:
    """Angles (spokes,) of lines through the centre in radians, each turned by the golden angle or evenly over pi."""
    return start + np.arange(spokes) * (GOLDEN if golden else np.pi / spokes)


def radial(angles: FloatArray, samples: int) -> FloatArray:
    """Lines through the centre at `angles`, line after line: (spokes * samples, 2); see `spoke_radii`."""
    return _points(np.exp(1j * angles)[:, None] * spoke_radii(samples))


def spoke_radii(samples: int) -> FloatArray:
    """Where the samples of a line of `radial` lie on it: from -0.5 to below 0.5 in even steps."""
    return np.asarray((np.arange(samples) - samples // 2) / samples)


def radial_areas(angles: FloatArray, radii: FloatArray, shape: tuple[int, int]) -> FloatArray:
    """Areas (spokes * samples,) of lines at `angles` whose samples lie at the rising `radii`, negative ones behind 0.

    A sample stands for the ring from halfway to one neighbour to halfway to the other, and of it for the mean angle to
    the lines on either side: at radius r in even steps dr for r dr times that angle.
    """
    order = np.argsort(angles % np.pi)
    turned = (angles % np.pi)[order]
    gaps = np.empty(len(angles))
    gaps[order] = (np.roll(turned, -1) - np.roll(turned, 1)) % np.pi / 2 if len(angles) > 2 else np.pi / len(angles)
    middle = (radii[1:] + radii[:-1]) / 2
    edges = np.concatenate([[2 * radii[0] - middle[0]], middle, [2 * radii[-1] - middle[-1]]])
    along = np.diff(edges * np.abs(edges)) / 2
    return np.asarray((gaps[:, None] * along).ravel() * shape[0] * shape[1])


def spiral(
    interleaves: int, turns: float, size: int, *, exponent: float = 1.0, oversampling: float = 1.25, start: float = 0.0
) -> FloatArray:
    """Interleaved spirals k = t^exponent / 2 e^{2 pi i turns t}, t from 0 to 1: (interleaves * samples, 2).

    exponent 1 is Archimedes's; above 1 the centre is denser (Kim et al., Magn. Reson. Med. 50 (2003), 214). Samples
    are even along the curve, 1 / (oversampling * size) apart: constant gradients, whose rise at the centre is not
    modelled. Interleaves are turned evenly over a full turn.
    """
    t = np.linspace(0.0, 1.0, max(int(np.ceil(_FINE * turns)), _FINE) + 1)
    curve = 0.5 * t**exponent * np.exp(2j * np.pi * turns * t)
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(curve)))])
    samples = max(2, int(np.ceil(length[-1] * oversampling * size)))
    even = np.interp(np.linspace(0.0, length[-1], samples), length, t)
    arm = 0.5 * even**exponent * np.exp(2j * np.pi * turns * even)
    turned = np.exp(1j * (start + 2 * np.pi * np.arange(interleaves) / interleaves))
    return np.clip(_points(turned[:, None] * arm), -0.5, 0.5)


def spiral_areas(points: FloatArray, interleaves: int, shape: tuple[int, int]) -> FloatArray:
    """Areas (interleaves * samples,) of `spiral`: the ring between the radii halfway to both neighbours on the arm.

    All interleaves share it evenly, and the first sample's is a disc (Hoge et al., Magn. Reson. Med. 38 (1997), 117,
    for arms whose radius grows).
    """
    radius = np.hypot(*points[: len(points) // interleaves].T)
    middle = (radius[1:] + radius[:-1]) / 2
    edges = np.concatenate([[0.0], middle, [2 * radius[-1] - middle[-1]]])
    ring = np.pi * np.diff(edges**2) / interleaves
    return np.tile(ring, interleaves) * shape[0] * shape[1]


_CELLS = Kept[FloatArray]()


def cell_areas(points: FloatArray, shape: tuple[int, int]) -> FloatArray:
    """Areas (S,) of any samples: each stands for its Voronoi cell, all that is nearer to it than to another sample.

    For lines and spirals about what `radial_areas` and `spiral_areas` say in closed form. Samples in one place share
    its cell. A cell that reaches beyond the samples has no end, so it counts as the largest that has one. Rasche et
    al., IEEE TMI 18 (1999), 385. Raises GeometryError where no cell has an end.
    """
    return _CELLS.get((content(points), shape), lambda: _cell_areas(points, shape))


def _cell_areas(points: FloatArray, shape: tuple[int, int]) -> FloatArray:
    steps = points * np.asarray(shape)
    _, first, which, count = np.unique(
        np.round(steps / _TOGETHER), axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    places = steps[first]
    try:
        cells, hull = Voronoi(places), ConvexHull(places)
    except (QhullError, ValueError) as error:
        raise GeometryError("samples of a trajectory lie on one line or in one place, which shows no image") from error
    faces, pairs, ends = hull.equations, cells.ridge_points, np.asarray(cells.ridge_vertices)
    outside = (cells.vertices @ faces[:, :-1].T + faces[:, -1]).max(axis=1) > _TOGETHER
    # The last is that of an edge without an end, numbered -1.
    without_end = np.append(outside, True)[ends].any(axis=1)
    # An edge and its two samples make two triangles of one height.
    length = np.linalg.norm(cells.vertices[ends[:, 0]] - cells.vertices[ends[:, 1]], axis=1)
    height = np.linalg.norm(places[pairs[:, 0]] - places[pairs[:, 1]], axis=1) / 2
    areas = np.bincount(pairs.ravel(), np.repeat(length * height / 2, 2), len(places))
    areas[pairs[without_end].ravel()] = np.nan
    if np.isnan(areas).all():
        raise GeometryError("too few samples of a trajectory lie apart to say which area of k-space each stands for")
    whole = np.where(np.isnan(areas), np.nanmax(areas), areas)
    return np.asarray((whole / count)[which.ravel()])


_WEIGHTS = Kept[FloatArray]()


def even_weights(points: FloatArray, shape: tuple[int, int], iterations: int = 20) -> FloatArray:
    """Weights (S,) of any samples under which their density is even, by w <- w / (C w).

    C is the convolution of k-space with Fejer's kernel, about sinc^2(H k_y) sinc^2(W k_x), the transform of a
    triangle twice as wide as the image: never negative, 1 at no distance and 0 between samples of a Cartesian grid,
    whose weights are 1. A sample farther than a cell from all others has weight 1 as well, so that A* W A is 1 to 2 at
    most: where samples are too few, nothing makes up for those that are not there, as in a Cartesian scan.
    Pipe and Menon, Magn. Reson. Med. 41 (1999), 179, equation 8.
    """
    return _WEIGHTS.get((content(points), shape, iterations), lambda: _even_weights(points, shape, iterations))


def _even_weights(points: FloatArray, shape: tuple[int, int], iterations: int) -> FloatArray:
    double = (2 * shape[0], 2 * shape[1])
    transform = Transform(points, double, TRAINING)
    triangle = [1 - np.abs(np.arange(size) - size // 2) / (size // 2) for size in double]
    # The two transforms divide by 4 HW together, and the triangle's sum is HW.
    window = torch.from_numpy(np.outer(*triangle) * 4).to(torch.complex64)
    weights = torch.ones(len(points))
    for _ in range(iterations):
        around = transform.forward(window * transform.adjoint(weights.to(torch.complex64))).real
        weights = weights / around.clamp_min(1e-6)
    return weights.double().numpy()


_RADII = Kept[float](1024)


def dense_radius(points: FloatArray, shape: tuple[int, int]) -> float:
    """The radius in cycles per pixel within which samples lie as densely as those of a Cartesian grid.

    No place within it is farther from a sample than the middle of a Cartesian cell is. At most 16 cycles over the field
    of view: coils show nothing finer. Raises GeometryError where it is less than two, which shows no coils.
    """
    found = _RADII.get((content(points), shape), lambda: _first_gap(points, shape))
    if found * min(shape) < 2.0:
        raise GeometryError(
            "the centre of k-space was not sampled densely enough to estimate coil maps from; measure more spokes, or "
            "more interleaves or turns"
        )
    return found


def _first_gap(points: FloatArray, shape: tuple[int, int]) -> float:
    """Looks at places on rings, a quarter of a Cartesian step apart."""
    steps = np.asarray(shape)
    tree = cKDTree(points * steps)
    smaller = min(shape)
    most = min(smaller / 2, _COILS)
    for ring in np.arange(_STEP, most, _STEP):
        places = max(8, int(np.ceil(2 * np.pi * ring / _STEP)))
        turned = np.exp(2j * np.pi * np.arange(places) / places)
        if tree.query(_points(ring / smaller * turned) * steps)[0].max() > _FARTHEST:
            return float((ring - _STEP) / smaller)
    return float(most / smaller)


def _points(z: NDArray[np.complex128]) -> FloatArray:
    return np.stack([z.imag.ravel(), z.real.ravel()], axis=1)
