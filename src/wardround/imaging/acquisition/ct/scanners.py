"""Scanners as data: presets, and the numbers that tell a network which scanner it serves."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from wardround.study.ct import PROTOCOL_BOUNDS as PROTOCOL_BOUNDS
from wardround.study.ct import CTAcquisition
from wardround.study.scanners import PRESETS

# The presets as acquisitions; a study names one as `acquisition: {kind: ct, preset: NAME}`.
SCANNERS = MappingProxyType({name: CTAcquisition.model_validate({"preset": name}) for name in PRESETS})


def protocol_features(acquisition: CTAcquisition) -> NDArray[np.float32]:
    """Describe a scanner by seven numbers in [0, 1], see `CTAcquisition.features`."""
    return np.array(acquisition.features(), dtype=np.float32)
