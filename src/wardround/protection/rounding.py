"""How the values of an update are rounded: at random, from a root that only their site holds.

Whoever knows the draws and chooses the scales reads values out of a sum. Across hospitals the root therefore comes from
the operating system and stays in the site's store. On one machine, where one person holds everything, it is derived
from the study's seed, so that a run gives the same bits again.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.protection.secret import Keeper, SecretRoot, SecretStream
from wardround.wire.canonical import canonical_json
from wardround.wire.update import Scales

_ROOT = "rounding/root"
_ONE = np.uint32(0x3F800000)


def study_root(seed: int) -> bytes:
    """The root of every site of a run on one machine: as public as the study's seed, 32 bytes."""
    return hashlib.sha256(canonical_json(["rounding", seed])).digest()


def kept_root(keeper: Keeper) -> bytes:
    """The root in a site's store, drawn from the operating system when it is first asked for, 32 bytes."""
    return bytes.fromhex(keeper.write_once(_ROOT, 0, secrets.token_hex(32)))


class Draws:
    """Uniform draws for `wire.update.encode`, from the key stream of ChaCha20."""

    def __init__(self, key: bytes) -> None:
        self._stream = SecretStream(key)

    def random(self, size: int, dtype: Any = np.float32) -> npt.NDArray[Any]:
        """Multiples of 2^-23 in [0, 1): (size,)."""
        words = self._stream.words(-(-size // 2)).view("<u4")[:size]
        # The bits of a float in [1, 2): no conversion, which would cost as much as the key stream.
        words >>= np.uint32(9)
        words |= _ONE
        drawn = words.view(np.float32)
        drawn -= np.float32(1.0)
        return drawn.astype(dtype, copy=False)


def rounding(root: bytes, site: str, number: int, scales: Scales, model_sha256: str) -> Draws:
    """The draws of a site for a round.

    Bound to the scales and to the model that the round starts with: the same changes, asked for again under other
    scales, are rounded with other draws, so that no series of scales tells where a value lies.
    """
    return Draws(SecretRoot(root).key("rounding", site, number, dict(scales), model_sha256))
