"""Where the rays of a CT scanner run: parallel beam, fan beam with a flat or a curved detector.

The isocentre is the middle of the image; x runs along its columns, y from its last row to its first. At view angle
b the detector's axis is e = (cos b, sin b) and rays travel towards d = (-sin b, cos b); a fan's source stands at
-source_distance * d. Rotating the view by +90 degrees is rotating the image by -90 degrees.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wardround.errors import GeometryError
from wardround.study.ct import CTGeometry

FloatArray = NDArray[np.float64]


class Rays(NamedTuple):
    """Lines in the plane: a point on each and its unit direction, each (views, bins, 2), mm."""

    origin: FloatArray
    direction: FloatArray


def distances(geometry: CTGeometry) -> tuple[float, float]:
    """Source to isocentre and source to detector of a fan beam, mm."""
    if geometry.source_distance is None or geometry.detector_distance is None:
        raise GeometryError("parallel beams have no source; use kind fan_flat or fan_arc")
    return geometry.source_distance, geometry.source_distance + geometry.detector_distance


def view_angles(geometry: CTGeometry) -> FloatArray:
    """Angles of all views in radians, (views,)."""
    return np.asarray(np.deg2rad(geometry.start + geometry.sweep_degrees * np.arange(geometry.views) / geometry.views))


def bin_positions(geometry: CTGeometry) -> FloatArray:
    """Middles of the bins along the detector, mm from the central ray, (bins,)."""
    return pixel_axis(geometry.bins, geometry.bin) - geometry.offset * geometry.bin


def rays(geometry: CTGeometry, views: slice = slice(None), shift: float = 0.0) -> Rays:
    """The rays to points `shift` bins beyond the middle of each bin, for some of the views."""
    angles = view_angles(geometry)[views, None]
    u = (bin_positions(geometry) + shift * geometry.bin)[None]
    along, towards = _axes(angles)
    if geometry.kind == "parallel":
        origin = u[..., None] * along
        return Rays(origin, np.broadcast_to(towards, origin.shape))
    source, detector = distances(geometry)
    fan = np.arctan(u / detector) if geometry.kind == "fan_flat" else u / detector
    direction = np.cos(fan)[..., None] * towards + np.sin(fan)[..., None] * along
    return Rays(np.broadcast_to(-source * towards, direction.shape), direction)


def _axes(angles: FloatArray) -> tuple[FloatArray, FloatArray]:
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([cos, sin], -1), np.stack([-sin, cos], -1)


def pixel_axis(count: int, pixel: float) -> FloatArray:
    """Middles of `count` pixels around the isocentre, mm."""
    return np.asarray((np.arange(count) - (count - 1) / 2) * pixel, np.float64)


def field_of_view_radius(geometry: CTGeometry) -> float:
    """Radius in mm of the circle that the detector sees in every view."""
    reach = (geometry.bins / 2 - abs(geometry.offset)) * geometry.bin
    if geometry.kind == "parallel":
        return max(reach, 0.0)
    source, detector = distances(geometry)
    fan = math.atan(reach / detector) if geometry.kind == "fan_flat" else min(reach / detector, math.pi / 2)
    return max(source * math.sin(fan), 0.0)


def check_geometry(geometry: CTGeometry) -> None:
    """Raise GeometryError where the detector misses the patient or the image reaches the source."""
    half_diagonal = math.hypot(*geometry.size) * geometry.pixel / 2
    if geometry.kind != "parallel":
        source, detector = distances(geometry)
        if source <= half_diagonal:
            raise GeometryError(
                f"the source is {source:.1f} mm from the isocentre but the image's corners are {half_diagonal:.1f} mm "
                "away; enlarge source_distance or make the image smaller"
            )
        half_fan = (geometry.bins / 2 + abs(geometry.offset)) * geometry.bin / detector
        if geometry.kind == "fan_arc" and half_fan >= math.pi / 2:
            raise GeometryError(
                f"the curved detector spans {2 * math.degrees(half_fan):.0f} degrees around the source; "
                "a fan must stay below 180, so lower bins or bin"
            )
    body = geometry.body_radius or min(geometry.size) * geometry.pixel / 2
    seen = field_of_view_radius(geometry)
    if seen < body * (1 - 1e-6):
        raise GeometryError(
            f"the field of view misses the patient: the detector sees a circle of {seen:.1f} mm around the isocentre, "
            f"the patient reaches {body:.1f} mm; add bins, enlarge bin, centre the detector (offset), "
            "or state a smaller body_radius"
        )


def symmetry(geometry: CTGeometry) -> int:
    """Number of quarter turns that map the views onto themselves: the weights of views / symmetry serve all.

    4 for a square image and a full circle of 4n views, 2 for a half circle of 2n views (parallel beams), else 1.
    """
    turns = round(geometry.sweep_degrees / 90)
    exact = math.isclose(geometry.sweep_degrees, 90 * turns)
    square = geometry.size[0] == geometry.size[1]
    if not (exact and square and turns > 0 and geometry.views % turns == 0):
        return 1
    return turns
