"""Damage to the cache's archives that Python's zipfile takes for features it lacks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from wardround.imaging.acquisition.ct.cache import MatrixCache
from wardround.study.ct import CTGeometry

GEOMETRY = CTGeometry(size=(8, 8), views=4, bins=12, bin=2.0, source_distance=60.0, detector_distance=40.0)


@pytest.mark.parametrize(("field", "value"), [(8, 1), (10, 99), (6, 255)])  # encrypted, unknown method, later version
def test_an_archive_that_zipfile_does_not_support_is_built_anew(tmp_path: Path, field: int, value: int) -> None:
    cache = MatrixCache(tmp_path)
    expected = cache.weights(GEOMETRY, "joseph")
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    spoiled = bytearray(whole)
    for entry in re.finditer(rb"PK\x01\x02", whole):
        spoiled[entry.start() + field] = value
    path.write_bytes(spoiled)
    found = cache.weights(GEOMETRY, "joseph")
    assert (found != expected).nnz == 0
    assert path.read_bytes() == whole
