"""Scanners as data: presets, and the numbers that tell a network which scanner it serves."""

from __future__ import annotations

import math
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from wardround.study.ct import CTAcquisition
from wardround.study.scanners import PRESETS

# The presets as acquisitions; a study names one as `acquisition: {kind: ct, preset: NAME}`.
SCANNERS = MappingProxyType({name: CTAcquisition.model_validate({"preset": name}) for name in PRESETS})

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
