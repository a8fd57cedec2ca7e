"""What a site keeps of its examples in memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from wardround.imaging.datasets.memory import ScanCache


def test_what_fits_is_kept_and_what_does_not_is_made_again() -> None:
    made = []

    def making(name: str, size: int) -> Callable[[], NDArray[np.uint8]]:
        return lambda: made.append(name) or np.full(size, ord(name), np.uint8)

    cache = ScanCache[NDArray[np.uint8]](10)
    for _ in range(2):
        for name, size in (("a", 6), ("b", 5), ("c", 4), ("d", 1)):
            assert cache.get(name, making(name, size)).tolist() == [ord(name)] * size
    assert made == list("abcd") + list("bd")
