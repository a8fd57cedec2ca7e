"""The weights of CT projectors as sparse matrices, built view by view without a loop over rays.

A row is a ray, numbered view by view; a column is a pixel, numbered row by row. With the symmetry of
`ct_geometry.symmetry`, only the first views / symmetry views have rows.

joseph  Line integrals with linear interpolation between the two nearest pixels of each row or column that the ray
        crosses (Joseph, IEEE Trans. Med. Imaging 1 (1982), 192). Ray-driven, no streaks; for reconstruction.
strip   Averages over the width of a bin: each pixel casts the shadow that a square has in the direction of its ray
        (separable footprints in two dimensions: Long, Fessler and Balter, IEEE Trans. Med. Imaging 29 (2010),
        1839). For parallel beams these are exact areas. For simulation.
fbp     What the transpose of this matrix does is the weighted back projection of `ct.fbp`: each pixel interpolates
        between the two bins that its ray falls between. No projector, but built and applied like one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from wardround.imaging.acquisition.ct.geometry import FloatArray, distances, pixel_axis, rays, symmetry, view_angles
from wardround.study.ct import CTGeometry

Model = Literal["joseph", "strip", "fbp"]
_ENTRIES = 2**22  # candidate weights held at a time while building
BYTES_PER_WEIGHT = 8  # float32 value and int32 column
_SAMPLED_VIEWS = 8


def independent_views(geometry: CTGeometry) -> int:
    """Number of views that have rows of their own; the others follow by symmetry."""
    return geometry.views // symmetry(geometry)


def weight_blocks(geometry: CTGeometry, model: Model) -> Iterator[tuple[slice, sparse.csr_matrix]]:
    """Yield (views, weights) from the first independent view to the last.

    Weights are float32 CSR of shape (views in the block * bins, rows * columns), in mm.
    """
    views = independent_views(geometry)
    step = max(1, _ENTRIES // _candidates_per_view(geometry, model))
    for first in range(0, views, step):
        block = slice(first, min(first + step, views))
        yield block, _WEIGHTS[model](geometry, block)


def weight_matrix(geometry: CTGeometry, model: Model) -> sparse.csr_matrix:
    """All weights, (independent views * bins, rows * columns), float32 CSR, in mm."""
    return sparse.vstack([block for _, block in weight_blocks(geometry, model)], format="csr")


def estimate_bytes(geometry: CTGeometry, model: Model, *, adjoint: bool = True) -> int:
    """Memory of the stored weights, and of their transpose with `adjoint`, from a sample of the views; within 5 %."""
    views = independent_views(geometry)
    sampled = np.unique(((np.arange(_SAMPLED_VIEWS) + 0.5) * views / _SAMPLED_VIEWS).astype(int))
    weights: int = sum(_WEIGHTS[model](geometry, slice(view, view + 1)).nnz for view in sampled.tolist())
    total = weights / len(sampled) * views * BYTES_PER_WEIGHT
    return round(total) * (2 if adjoint else 1)


def _candidates_per_view(geometry: CTGeometry, model: Model) -> int:
    if model == "joseph":
        return geometry.bins * max(geometry.size) * 2
    return math.prod(geometry.size) * (2 if model == "fbp" else _shadow_bins(geometry))


def _joseph(geometry: CTGeometry, views: slice) -> sparse.csr_matrix:
    rows, columns = geometry.size
    origin, direction = (part.reshape(-1, 2) for part in rays(geometry, views))
    # Pixel indices as coordinates: columns grow with x, rows against y.
    column = origin[:, 0] / geometry.pixel + (columns - 1) / 2
    row = (rows - 1) / 2 - origin[:, 1] / geometry.pixel
    across = np.abs(direction[:, 0]) >= np.abs(direction[:, 1])  # meets every column, interpolates between rows
    step = np.where(across, direction[:, 0], -direction[:, 1])
    slope = np.where(across, -direction[:, 1], direction[:, 0]) / step
    start = np.where(across, row - column * slope, column - row * slope)
    steps, span = np.where(across, [[columns], [rows]], [[rows], [columns]]).astype(np.int32)
    step_stride, stride = np.where(across, [[1], [columns]], [[columns], [1]]).astype(np.int32)
    index = np.arange(max(rows, columns), dtype=np.int32)
    position = start[:, None] + slope[:, None] * index
    low = np.floor(position)
    fraction = (position - low).astype(np.float32)
    # Far outside is as good as just outside, and fits the integers.
    below = np.clip(low, -2, max(rows, columns)).astype(np.int32)
    length = (geometry.pixel / np.abs(step)).astype(np.float32)[:, None]
    pixels = np.empty((*below.shape, 2), np.int32)
    weights = np.empty(pixels.shape, np.float32)
    kept = np.empty(pixels.shape, np.bool_)
    pixels[..., 0] = index * step_stride[:, None] + below * stride[:, None]
    pixels[..., 1] = pixels[..., 0] + stride[:, None]
    np.multiply(1 - fraction, length, out=weights[..., 0])
    np.multiply(fraction, length, out=weights[..., 1])
    kept[..., 0] = (below >= 0) & (below < span[:, None])
    kept[..., 1] = (below >= -1) & (below < span[:, None] - 1)
    if rows != columns:
        kept &= (index < steps[:, None])[..., None]
    pointers = np.concatenate([[0], kept.sum((1, 2)).cumsum()])
    return sparse.csr_matrix((weights[kept], pixels[kept], pointers), (len(step), rows * columns))


def _strip(geometry: CTGeometry, views: slice) -> sparse.csr_matrix:
    sight = _sight(geometry, view_angles(geometry)[views])
    scale = geometry.pixel / 2 * sight.magnification
    outer, inner = scale * (sight.cos + sight.sin), scale * np.abs(sight.cos - sight.sin)
    first = np.floor(sight.position - outer + 0.5).astype(np.int32)[..., None]
    count = _shadow_bins(geometry)
    edges = first - 0.5 + np.arange(count + 1) - sight.position[..., None]
    area = _trapezoid_integral(edges, outer[..., None], inner[..., None])
    chord = geometry.pixel / np.maximum(sight.cos, sight.sin)
    bins = (first + np.arange(count)).astype(np.int32)
    return _by_ray(geometry, bins, chord[..., None] * np.diff(area, axis=-1))


def _fbp(geometry: CTGeometry, views: slice) -> sparse.csr_matrix:
    sight = _sight(geometry, view_angles(geometry)[views])
    first = np.floor(sight.position).astype(np.int32)
    fraction = sight.position - first
    weights = np.stack([1 - fraction, fraction], -1)
    if geometry.kind != "parallel":
        length = sight.depth / distances(geometry)[0] if geometry.kind == "fan_flat" else sight.distance
        weights /= length[..., None] ** 2
    return _by_ray(geometry, np.stack([first, first + 1], -1), weights)


def _by_ray(geometry: CTGeometry, bins: NDArray[np.int32], weights: FloatArray) -> sparse.csr_matrix:
    """Turn weights (pixels, views, candidates) for the given bins into a matrix (views * bins, pixels)."""
    pixels, views, _ = weights.shape
    kept = (weights > 0) & (bins >= 0) & (bins < geometry.bins)
    numbers = bins + (np.arange(views, dtype=np.int32) * geometry.bins)[:, None]
    pointers = np.concatenate([[0], kept.sum((1, 2)).cumsum()])
    values = weights[kept].astype(np.float32)
    return sparse.csr_matrix((values, numbers[kept], pointers), (pixels, views * geometry.bins)).T.tocsr()


class _Sight(NamedTuple):
    """How views see pixels, each (pixels, views): the rays through the pixels' middles."""

    position: FloatArray  # on the detector, in bins
    magnification: FloatArray  # bins per mm across the ray
    cos: FloatArray  # absolute direction cosines of the ray
    sin: FloatArray
    depth: FloatArray  # mm from the source along the central ray; from the isocentre for parallel beams
    distance: FloatArray  # mm from the source


def _sight(geometry: CTGeometry, angles: FloatArray) -> _Sight:
    rows, columns = geometry.size
    x = np.tile(pixel_axis(columns, geometry.pixel), rows)[:, None]
    y = -np.repeat(pixel_axis(rows, geometry.pixel), columns)[:, None]
    cos, sin = np.cos(angles), np.sin(angles)
    lateral, depth = x * cos + y * sin, y * cos - x * sin
    distance = depth
    if geometry.kind == "parallel":
        position, magnification = lateral, np.ones_like(lateral)
        cos, sin = np.broadcast_to(cos, lateral.shape), np.broadcast_to(sin, lateral.shape)
    else:
        source, detector = distances(geometry)
        depth = depth + source
        distance = np.hypot(depth, lateral)
        # The direction of a ray is that of its view, turned by the ray's angle in the fan.
        cos, sin = (cos * depth + sin * lateral) / distance, (sin * depth - cos * lateral) / distance
        if geometry.kind == "fan_flat":
            position, magnification = detector * lateral / depth, detector * distance / depth**2
        else:
            position, magnification = detector * np.arctan2(lateral, depth), detector / distance
    middle = (geometry.bins - 1) / 2 + geometry.offset
    return _Sight(
        position / geometry.bin + middle, magnification / geometry.bin, np.abs(cos), np.abs(sin), depth, distance
    )


def _shadow_bins(geometry: CTGeometry) -> int:
    """Most bins that the shadow of a pixel touches."""
    width = math.sqrt(2) * geometry.pixel / geometry.bin
    if geometry.kind != "parallel":
        source, detector = distances(geometry)
        around = np.exp(1j * np.linspace(0, np.pi, 361)) * math.hypot(*geometry.size) * geometry.pixel / 2
        depth, distance = source + around.real, np.abs(source + around)
        width *= float((detector * (distance / depth**2 if geometry.kind == "fan_flat" else 1 / distance)).max())
    return math.ceil(width) + 1


def _trapezoid_integral(edges: FloatArray, outer: FloatArray, inner: FloatArray) -> FloatArray:
    """Integral from -infinity to `edges` of a trapezoid of height 1, flat within `inner`, zero beyond `outer`."""
    distance = np.minimum(np.abs(edges), outer)
    slope = np.maximum(distance - inner, 0) ** 2 / (2 * np.maximum(outer - inner, 1e-12))
    half: FloatArray = np.sign(edges) * (distance - slope)
    return half


_WEIGHTS = {"joseph": _joseph, "strip": _strip, "fbp": _fbp}
