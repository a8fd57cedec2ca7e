"""Pictures lie as radiologists look at them, however a file stores its patient; nothing else is turned."""

from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from wardround.imaging.orientation import turn_for, turn_of
from wardround.imaging.readers.volume import Volume, write_nifti

# A patient in RAS: 0 everywhere, but 1 at the right, 2 at the front, 3 at the head of the volume.
RIGHT, FRONT, HEAD = 1, 2, 3


def _patient() -> np.ndarray:
    volume = np.zeros((9, 9, 9), np.float32)
    volume[8, 4, 4], volume[4, 8, 4], volume[4, 4, 8] = RIGHT, FRONT, HEAD
    return volume


def _stored(codes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The patient stored with axes that run to `codes`, and the affine that says so."""
    start = nib.orientations.io_orientation(np.eye(4))  # type: ignore[attr-defined]
    turn = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(codes))  # type: ignore[attr-defined]
    volume = nib.orientations.apply_orientation(_patient(), turn)  # type: ignore[attr-defined]
    return volume, nib.orientations.inv_ornt_aff(turn, (9, 9, 9))  # type: ignore[attr-defined]


ALL = [codes for axes in permutations(("RL", "AP", "SI")) for codes in product(*axes)]


@pytest.mark.parametrize("codes", ALL, ids="".join)
def test_however_a_patient_is_stored_he_is_shown_alike(codes: tuple[str, ...]) -> None:
    volume, affine = _stored(codes)
    assert nib.aff2axcodes(affine) == codes  # type: ignore[attr-defined]
    picture = turn_for(affine)(volume[:, :, 4])
    places = {
        value: tuple(map(int, np.argwhere(picture == value)[0])) for value in (1, 2, 3) if (picture == value).any()
    }
    top, left = (0, 4), (4, 0)
    expected = {
        "S": {FRONT: top, RIGHT: left},
        "I": {FRONT: top, RIGHT: left},
        "A": {HEAD: top, RIGHT: left},
        "P": {HEAD: top, RIGHT: left},
        "R": {HEAD: top, FRONT: left},
        "L": {HEAD: top, FRONT: left},
    }
    assert places == expected[codes[2]]


def test_a_file_that_says_nothing_is_shown_as_it_is(tmp_path: Path) -> None:
    data = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    write_nifti(Volume(data, (1, 1, 1), np.eye(4)), tmp_path / "identity.nii.gz")
    assert turn_of(tmp_path / "identity.nii.gz") is None
    write_nifti(Volume(data, (2, 2, 2), np.diag([2.0, 2, 2, 1])), tmp_path / "ras.nii.gz")
    assert turn_of(tmp_path / "ras.nii.gz") == (True, True, True)
    image = nib.Nifti1Image(data, None)  # type: ignore[no-untyped-call]
    nib.save(image, tmp_path / "bare.nii")  # type: ignore[no-untyped-call]
    assert turn_of(tmp_path / "bare.nii") is None
    (tmp_path / "broken.nii").write_bytes(b"no image")
    assert turn_of(tmp_path / "broken.nii") is None
