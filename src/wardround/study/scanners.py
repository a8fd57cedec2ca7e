"""CT scanners that a study can name instead of typing their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_HYPERFED = ("views", "bins", "pixel", "bin", "source_distance", "detector_distance")


def _hyperfed(photons: int, *numbers: float) -> dict[str, Any]:
    geometry = dict(zip(_HYPERFED, numbers, strict=True)) | {"kind": "fan_flat", "size": (256, 256)}
    return {"geometry": geometry, "photons": photons}


# The simulated sites of HyperFed (Yang et al., IEEE TNNLS 2023; values of the authors' code, full circles, electronic
# noise ours), and two real scanners with nominal geometry: where projection data come with a header, the header counts.
# Their image grid and I0 are ours.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "hyperfed_1": _hyperfed(50_000, 512, 368, 1.33, 2.5716, 595.0, 490.6),
        "hyperfed_2": _hyperfed(68_750, 512, 315, 1.40, 3.0, 450.0, 350.0),
        "hyperfed_3": _hyperfed(87_500, 384, 330, 1.39, 2.6, 400.0, 300.0),
        "hyperfed_4": _hyperfed(106_250, 400, 350, 1.20, 2.2, 400.0, 350.0),
        "hyperfed_5": _hyperfed(125_000, 384, 350, 1.40, 2.5, 500.0, 300.0),
        "siemens_definition_as_plus": {
            "geometry": {
                "kind": "fan_arc",
                "size": (512, 512),
                "pixel": 0.9766,
                "views": 1152,
                "bins": 736,
                "bin": 1.2858,
                "offset": 1.125,
                "source_distance": 595.0,
                "detector_distance": 490.6,
            },
            "photons": 1e6,
        },
        "ge_lightspeed_vct": {
            "geometry": {
                "kind": "fan_arc",
                "size": (512, 512),
                "pixel": 0.97,
                "views": 984,
                "bins": 888,
                "bin": 1.0239,
                "offset": 1.25,
                "source_distance": 541.0,
                "detector_distance": 408.075,
            },
            "photons": 1e6,
        },
    }
)


def resolved(given: Mapping[str, Any]) -> dict[str, Any]:
    """An acquisition that names a `preset`, with the preset's numbers in its place; what else is given, wins.

    With a `geometry.size` of its own and no `pixel`, the preset's field of view stays. Raises ValueError for a name
    that is none.
    """
    rest = {key: value for key, value in given.items() if key != "preset"}
    name = given["preset"]
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; choose from {', '.join(PRESETS)}")
    preset = PRESETS[name]
    geometry, changes = dict(preset["geometry"]), rest.get("geometry", {})
    if not isinstance(changes, Mapping):
        return {**preset, **rest}  # for the schema to judge
    size = changes.get("size")
    if "pixel" not in changes and isinstance(size, list | tuple) and size and all(isinstance(n, int) for n in size):
        geometry["pixel"] *= min(geometry["size"]) / max(1, *size)
    return {**preset, **rest, "geometry": {**geometry, **changes}}
