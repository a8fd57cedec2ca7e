"""The two sources of randomness.

*Public* randomness is derived from names that everybody knows, so that a round can be repeated bit for bit:
initialisation, shuffling, simulated acquisitions. *Secret* randomness comes from the operating system and never from
here: keys, privacy noise, private sampling, and the rounding of an update (`protection.rounding`).
"""

from __future__ import annotations

import hashlib

import numpy as np

from wardround.wire.canonical import canonical_json


def public_seed(seed: int, *names: str | int) -> int:
    """A 128-bit integer that depends on the study's seed and every name, and on nothing else."""
    return int.from_bytes(hashlib.sha256(canonical_json([seed, *names])).digest()[:16], "little")


def public_generator(seed: int, *names: str | int) -> np.random.Generator:
    """A numpy generator for one purpose, e.g. `public_generator(7, "CS", 3, "augmentation")`."""
    return np.random.Generator(np.random.SFC64(public_seed(seed, *names)))
