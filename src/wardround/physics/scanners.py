"""Scanners as data: presets, and the numbers that tell a network which scanner it serves."""

from __future__ import annotations

import math
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from wardround.study.ct import CTAcquisition, CTGeometry


def _hyperfed(
    views: int, bins: int, pixel: float, bin: float, source: float, detector: float, photons: float
) -> CTAcquisition:
    geometry = CTGeometry(
        kind="fan_flat",
        size=(256, 256),
        pixel=pixel,
        views=views,
        bins=bins,
        bin=bin,
        source_distance=source,
        detector_distance=detector,
    )
    return CTAcquisition(geometry=geometry, photons=photons)


# The simulated sites of HyperFed (Yang et al., IEEE Trans. Radiat. Plasma Med. Sci. 2023; values of the authors'
# code, full circles, electronic noise ours), and two real scanners with nominal geometry: where projection data
# come with a header, the header counts. Their image grid and I0 are ours.
SCANNERS = MappingProxyType(
    {
        "hyperfed_1": _hyperfed(512, 368, 1.33, 2.5716, 595.0, 490.6, 50_000),
        "hyperfed_2": _hyperfed(512, 315, 1.40, 3.0, 450.0, 350.0, 68_750),
        "hyperfed_3": _hyperfed(384, 330, 1.39, 2.6, 400.0, 300.0, 87_500),
        "hyperfed_4": _hyperfed(400, 350, 1.20, 2.2, 400.0, 350.0, 106_250),
        "hyperfed_5": _hyperfed(384, 350, 1.40, 2.5, 500.0, 300.0, 125_000),
        "siemens_definition_as_plus": CTAcquisition(
            geometry=CTGeometry(
                kind="fan_arc",
                size=(512, 512),
                pixel=0.9766,
                views=1152,
                bins=736,
                bin=1.2858,
                offset=1.125,
                source_distance=595.0,
                detector_distance=490.6,
            ),
            photons=1e6,
        ),
        "ge_lightspeed_vct": CTAcquisition(
            geometry=CTGeometry(
                kind="fan_arc",
                size=(512, 512),
                pixel=0.97,
                views=984,
                bins=888,
                bin=1.0239,
                offset=1.25,
                source_distance=541.0,
                detector_distance=408.075,
            ),
            photons=1e6,
        ),
    }
)

# Feature, smallest and largest value: wide enough for every preset, and for most scanners ever built.
PROTOCOL_BOUNDS = MappingProxyType(
    {
        "log2_views": (5.0, 12.0),
        "log2_bins": (5.0, 11.0),
        "pixel_mm": (0.2, 6.0),
        "bin_mm": (0.2, 6.0),
        "source_distance_mm": (300.0, 900.0),
        "detector_distance_mm": (200.0, 800.0),
        "log10_photons": (3.0, 7.0),
    }
)


def protocol_features(acquisition: CTAcquisition) -> NDArray[np.float32]:
    """Describe a scanner by seven numbers, in the order of `PROTOCOL_BOUNDS` and scaled by them to [0, 1].

    After HyperFed, with bounds that hold its own sites. Parallel beams have their source infinitely far away: 1.
    Values beyond the bounds are cut off, so that a network never sees more than it was made for.
    """
    geometry = acquisition.geometry
    values = (
        math.log2(geometry.views),
        math.log2(geometry.bins),
        geometry.pixel,
        geometry.bin,
        math.inf if geometry.source_distance is None else geometry.source_distance,
        math.inf if geometry.detector_distance is None else geometry.detector_distance,
        math.log10(acquisition.photons),
    )
    low, high = np.array(list(PROTOCOL_BOUNDS.values())).T
    scaled: NDArray[np.float32] = np.clip((np.array(values) - low) / (high - low), 0.0, 1.0).astype(np.float32)
    return scaled
