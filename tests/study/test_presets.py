"""A study names a scanner; what is hashed and saved are its numbers."""

from __future__ import annotations

from typing import Any

import pytest
from tests.ct_hospitals import ct_study

from wardround.errors import GeometryError, StudyError
from wardround.imaging.acquisition.ct.geometry import check_geometry, field_of_view_radius
from wardround.imaging.acquisition.ct.scanners import SCANNERS
from wardround.study.ct import CTAcquisition
from wardround.study.load import load_study, plan_sha256
from wardround.study.schema import Study


def _study(acquisition: Any, **more: Any) -> Study:
    return load_study(ct_study(sites={"A": {"acquisition": acquisition}, "B": {}}, **more))


def _of(acquisition: Any) -> CTAcquisition:
    size = list(acquisition.get("geometry", {}).get("size", SCANNERS[acquisition["preset"]].geometry.size))
    task = ct_study()["task"] | {"size": size}
    sites = {"A": {"acquisition": acquisition}}
    found = load_study(ct_study(sites=sites, task=task)).acquisition_of("A")
    assert isinstance(found, CTAcquisition)
    return found


@pytest.mark.parametrize("name", SCANNERS)
def test_a_name_stands_for_all_numbers(name: str) -> None:
    assert _of({"kind": "ct", "preset": name}) == _of({"preset": name}) == SCANNERS[name]
    task = ct_study()["task"] | {"size": list(SCANNERS[name].geometry.size)}
    named, typed = (
        load_study(ct_study(sites={"A": {"acquisition": acquisition}}, task=task))
        for acquisition in ({"preset": name}, SCANNERS[name].model_dump(mode="json"))
    )
    assert plan_sha256(named) == plan_sha256(typed)
    assert "preset" not in named.acquisition_of("A").model_dump_json()


def test_the_published_numbers_of_hyperfed() -> None:
    """Views, bins, pixel, bin, source and detector distance, photons: five rows of the authors' code, lengths in mm."""
    rows = (
        (512, 368, 1.33, 2.5716, 595.0, 490.6, 5e4),
        (512, 315, 1.4, 3.0, 450.0, 350.0, 6.875e4),
        (384, 330, 1.39, 2.6, 400.0, 300.0, 8.75e4),
        (400, 350, 1.2, 2.2, 400.0, 350.0, 1.0625e5),
        (384, 350, 1.4, 2.5, 500.0, 300.0, 1.25e5),
    )
    for number, row in enumerate(rows, start=1):
        a = SCANNERS[f"hyperfed_{number}"]
        g = a.geometry
        assert (g.views, g.bins, g.pixel, g.bin, g.source_distance, g.detector_distance, a.photons) == row
        assert (g.kind, g.size, g.sweep_degrees) == ("fan_flat", (256, 256), 360.0)


@pytest.mark.parametrize("name", SCANNERS)
def test_a_smaller_image_keeps_the_field_of_view(name: str) -> None:
    preset = SCANNERS[name].geometry
    small = _of({"preset": name, "geometry": {"size": [64, 64], "views": 48}, "photons": 2e4})
    assert (small.geometry.size, small.geometry.views, small.photons) == ((64, 64), 48, 2e4)
    assert small.geometry.pixel * 64 == pytest.approx(preset.pixel * preset.size[0])
    assert field_of_view_radius(small.geometry) == field_of_view_radius(preset)
    check_geometry(small.geometry)
    own = _of({"preset": name, "geometry": {"size": [64, 64], "pixel": 2.0}})
    assert own.geometry.pixel == 2.0
    with pytest.raises(GeometryError, match="misses the patient"):
        check_geometry(_of({"preset": name, "geometry": {"bins": 60}}).geometry)


@pytest.mark.parametrize(
    ("acquisition", "message"),
    [
        ({"preset": "hyperfed_9"}, r"sites\.A\.acquisition: there is no preset 'hyperfed_9'; choose from hyperfed_1"),
        ({"preset": ["hyperfed_1"]}, "there is no preset"),
        ({"preset": "hyperfed_1", "geometry": 3}, r"sites\.A\.acquisition\.geometry"),
        ({"preset": "hyperfed_1", "geometry": {"view": 3}}, r"geometry\.view: unknown key; did you mean `views`"),
        ({"preset": "hyperfed_1", "geometry": {"size": ["a", 2]}}, r"geometry\.size"),
        ({"kind": "mri", "preset": "hyperfed_1"}, r"acquisition\.preset: unknown key"),
    ],
)
def test_what_is_no_preset_is_refused(acquisition: Any, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        _study(acquisition)


def test_an_override_names_one_too() -> None:
    task = ct_study()["task"] | {"size": [64, 64]}
    data = ct_study(sites={"A": {}}, task=task, acquisition={"kind": "ct"})
    study = load_study(data, ["acquisition={preset: hyperfed_3, geometry: {size: [64, 64]}}"])
    assert study.acquisition == _of({"preset": "hyperfed_3", "geometry": {"size": [64, 64]}})
