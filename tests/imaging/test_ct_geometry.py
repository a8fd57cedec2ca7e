"""Where rays run, what is refused, and the numbers that describe a scanner."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from wardround.errors import GeometryError
from wardround.imaging.acquisition.ct.geometry import check_geometry, field_of_view_radius, rays, symmetry
from wardround.imaging.acquisition.ct.operator import CTProjector
from wardround.imaging.acquisition.ct.scanners import PROTOCOL_BOUNDS, SCANNERS, protocol_features
from wardround.study.ct import CTAcquisition, CTGeometry

FAN: dict[str, Any] = {"source_distance": 595.0, "detector_distance": 490.6}


def test_the_field_of_view_is_what_the_outermost_rays_touch() -> None:
    for kind in ("parallel", "fan_flat", "fan_arc"):
        geometry = CTGeometry(kind=kind, pixel=0.5, offset=1.5, **({} if kind == "parallel" else FAN))
        origin, direction = rays(geometry, shift=0.5)
        distance = np.abs(origin[..., 0] * direction[..., 1] - origin[..., 1] * direction[..., 0])
        # The middle of the detector lies 1.5 bins to one side, so the other side sees less.
        assert field_of_view_radius(geometry) == pytest.approx(distance[:, -1].min())
        assert np.linalg.norm(direction, axis=-1) == pytest.approx(1)


def test_published_fields_of_view() -> None:
    """Radii of the HyperFed sites, computed by hand from their tables."""
    radii = [field_of_view_radius(SCANNERS[f"hyperfed_{site}"].geometry) for site in range(1, 6)]
    assert [round(radius) for radius in radii] == [238, 229, 209, 183, 240]


def test_a_field_of_view_that_misses_the_patient_is_refused() -> None:
    geometry = CTGeometry(kind="fan_flat", bins=200, **FAN)
    with pytest.raises(GeometryError, match=r"misses the patient: the detector sees a circle of 137\.1 mm"):
        CTProjector(geometry.model_copy(update={"pixel": 1.1}))
    CTProjector(geometry.model_copy(update={"pixel": 1.1, "body_radius": 137.0, "views": 4, "size": (8, 8)}))
    check_geometry(geometry)
    with pytest.raises(GeometryError, match="centre the detector"):
        check_geometry(geometry.model_copy(update={"offset": 30.0}))


def test_impossible_scanners_are_refused() -> None:
    with pytest.raises(GeometryError, match="source is 150"):
        check_geometry(CTGeometry(kind="fan_flat", source_distance=150, detector_distance=400))
    with pytest.raises(GeometryError, match="below 180"):
        check_geometry(CTGeometry(kind="fan_arc", bins=3000, **FAN))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "fan_arc"}, "needs `source_distance`"),
        ({"kind": "parallel", **FAN}, "have no source"),
        ({"size": (0, 4), **FAN}, "has no pixels"),
        ({"sweep": 400.0, **FAN}, "360"),
        ({"pixel": 0.0, **FAN}, "greater than 0"),
        ({"bin": math.inf, **FAN}, "finite"),
        ({"detectors": 3, **FAN}, "not permitted"),
    ],
)
def test_the_study_names_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CTGeometry(**values)


@pytest.mark.parametrize(
    ("values", "turns"),
    [
        ({"kind": "parallel"}, 2),
        ({"kind": "parallel", "sweep": 360.0}, 4),
        ({"kind": "parallel", "views": 181}, 1),
        ({**FAN}, 4),
        ({**FAN, "start": 13.0, "offset": 0.25}, 4),
        ({**FAN, "views": 182}, 1),
        ({**FAN, "sweep": 270.0}, 3),
        ({**FAN, "sweep": 200.0}, 1),
        ({**FAN, "size": (256, 255)}, 1),
    ],
)
def test_symmetry_is_used_where_there_is_one(values: dict[str, Any], turns: int) -> None:
    assert symmetry(CTGeometry(**values)) == turns


@pytest.mark.parametrize("name", SCANNERS)
def test_presets_are_possible_and_within_our_own_bounds(name: str) -> None:
    acquisition = SCANNERS[name]
    check_geometry(acquisition.geometry)
    features = protocol_features(acquisition)
    assert features.shape == (len(PROTOCOL_BOUNDS),)
    assert ((features > 0) & (features < 1)).all()
    assert CTAcquisition.model_validate_json(acquisition.model_dump_json()) == acquisition


def test_protocol_features_are_cut_off_at_the_bounds() -> None:
    features = protocol_features(CTAcquisition(geometry=CTGeometry(kind="parallel", views=2), photons=1e9))
    assert features[0] == 0
    assert features[4:].tolist() == [1, 1, 1]
