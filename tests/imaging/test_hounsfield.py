"""Which values are Hounsfield units, in slices and in volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from tests.ct_files import body
from tests.ct_hospitals import thorax

from wardround.errors import DataError
from wardround.imaging.readers.hounsfield import check_hounsfield

HERE = Path("ct.nii.gz")


def _volume(noise: float = 12.0) -> NDArray[np.float32]:
    """A thorax of four slices, cut off where scanners do."""
    random = np.random.default_rng(1)
    slices = np.stack([thorax(number) for number in range(4)], -1) + random.normal(0, noise, (80, 80, 4))
    return np.maximum(np.rint(slices), -1024).astype(np.float32)


def _outside(shape: tuple[int, ...]) -> NDArray[np.bool_]:
    y, x = np.indices(shape[:2])
    return np.broadcast_to((np.hypot(y - 39.5, x - 39.5) > 40)[..., None], shape)


@pytest.mark.parametrize("value", [-1024, -2000, -2048, -3024, -32768])
@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0)])
def test_padding_is_no_wrong_rescale(value: float, axes: tuple[int, ...]) -> None:
    """Outside the circle that a scanner reconstructs, or wherever the body is not."""
    data = _volume()
    check_hounsfield(data, HERE)
    check_hounsfield(np.where(_outside(data.shape), value, data).transpose(axes), HERE)
    masked = np.where(data < -950, value, data)
    check_hounsfield(masked.transpose(axes), HERE)
    empty = np.where(np.arange(4) > 1, value, data)  # slices where nothing was scanned
    check_hounsfield(empty.transpose(axes), HERE)


def test_the_blurred_edge_of_padding_is_no_wrong_rescale() -> None:
    data = ndimage.zoom(_volume(), (3, 3, 1), order=1)
    padded = np.where(np.hypot(*(np.indices((240, 240)) - 119.5))[..., None] > 119, -3024.0, data)
    turned = ndimage.rotate(padded, 7, order=1, reshape=False, cval=-3024.0)
    assert (turned < -1100).mean() > ((turned == -3024).mean())
    check_hounsfield(turned, HERE)


def test_air_alone_is_in_hounsfield_units() -> None:
    check_hounsfield(np.random.default_rng(0).normal(-1000, 12, (20, 20, 3)).astype(np.float32), HERE)


@pytest.mark.parametrize(
    ("volume", "told"),
    [
        (_volume() - 1024, "of its voxels lie below -1100"),
        (_volume(noise=0) - 1024, "of its voxels lie below -1100"),  # what lies in the corners is constant
        (np.stack([body()] * 3, -1).astype(np.float32) - 1024, "of its voxels lie below -1100"),
        (np.where(_outside((80, 80, 4)), -2048, _volume() - 1024), "of its voxels lie below -1100"),
        (np.where(thorax(1) > -500, -984.0, -2024.0)[..., None], "no tissue in it"),
        (np.maximum(_volume() - 1024, -1024), "no tissue in it"),
        (_volume() + 1024, "its values reach from"),
        (np.where(_outside((80, 80, 4)), -2000, np.rint(_volume()) + 1024), "its values reach from"),
        (_volume() / 1000, "its values reach from"),
    ],
)
def test_a_volume_in_other_units_is_refused(volume: NDArray[np.float32], told: str) -> None:
    with pytest.raises(DataError, match=f"^wrong rescale: a CT volume is not in HU, .*{told}"):
        check_hounsfield(volume, HERE)
