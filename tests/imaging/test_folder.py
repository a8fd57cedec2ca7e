"""A site's folder: order, faults, memory, fingerprint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wardround.errors import DataError
from wardround.imaging.readers.folder import SiteFolder

MakeSite = Callable[..., Path]


def test_patients_and_contrasts_are_found(make_site: MakeSite) -> None:
    path = make_site(patients=3)
    (path / ".hidden").mkdir()
    (path / "empty").mkdir()
    (path / "notes.txt").write_text("x")
    folder = SiteFolder(path, "CS")
    assert len(folder) == 3
    assert folder.contrasts == ("flair", "t1ce")
    assert folder.volume(0, "flair").shape == (32, 32, 5)


def test_patients_are_numbered_by_folder_name(make_site: MakeSite) -> None:
    path = make_site(patients=3, contrasts=("flair",))
    second = SiteFolder(path, "CS").volume(1, "flair")
    (path / "MUELLER_0001").rename(path / "A_FIRST")
    np.testing.assert_array_equal(SiteFolder(path, "CS").volume(0, "flair"), second)


def test_a_lacking_contrast_is_counted_never_attributed(make_site: MakeSite) -> None:
    path = make_site(patients=4)
    (path / "MUELLER_0002" / "t1ce.nii.gz").unlink()
    folder = SiteFolder(path, "CS")
    folder.require(["flair"])
    for look in (lambda: folder.require(["flair", "t1ce"]), lambda: folder.volume(2, "t1ce")):
        with pytest.raises(DataError, match=r"site CS: 1 of 4 patients lack the contrast t1ce") as caught:
            look()
        assert "MUELLER" not in str(caught.value)
        assert "MUELLER_0002" in caught.value.detail


def test_folders_without_patients_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="site CS: its data folder does not exist") as caught:
        SiteFolder(tmp_path / "mueller", "CS")
    assert "mueller" not in str(caught.value)
    with pytest.raises(DataError, match="site CS: no patient found"):
        SiteFolder(tmp_path, "CS")


def test_a_damaged_image_names_site_and_contrast_only(make_site: MakeSite) -> None:
    path = make_site(patients=2)
    (path / "MUELLER_0001" / "flair.nii.gz").write_bytes(b"\x1f\x8bnonsense")
    with pytest.raises(DataError, match="site CS, contrast flair: an image file is damaged") as caught:
        SiteFolder(path, "CS").volume(1, "flair")
    assert "MUELLER" not in str(caught.value)


def test_whole_numbers_are_kept_as_bytes_within_the_limit(make_site: MakeSite) -> None:
    path = make_site(patients=4, contrasts=("flair",))
    folder = SiteFolder(path, "CS", cache_bytes=2 * 32 * 32 * 5)
    first = folder.volume(0, "flair")
    assert first.dtype == np.uint8
    assert folder.volume(0, "flair") is first
    for patient in (1, 2):
        folder.volume(patient, "flair")
    assert folder.volume(0, "flair") is not first
    np.testing.assert_array_equal(folder.volume(0, "flair"), first)


def test_the_fingerprint_is_of_content_not_of_names(make_site: MakeSite, tmp_path: Path) -> None:
    path = make_site(patients=3)
    before = SiteFolder(path, "CS").fingerprint(["flair", "t1ce"])
    shutil.copytree(path, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "MUELLER_0000").rename(tmp_path / "elsewhere" / "ZZ")
    os.utime(tmp_path / "elsewhere" / "ZZ" / "flair.nii.gz", (1, 1))
    assert SiteFolder(tmp_path / "elsewhere", "DU").fingerprint(["t1ce", "flair"]) == before
    assert SiteFolder(path, "CS").fingerprint(["flair"]) != before


def test_the_fingerprint_sees_changed_added_and_swapped_images(make_site: MakeSite) -> None:
    path = make_site(patients=3)
    folder = SiteFolder(path, "CS")
    seen = [folder.fingerprint(["flair", "t1ce"])]
    one, other = path / "MUELLER_0000" / "flair.nii.gz", path / "MUELLER_0000" / "t1ce.nii.gz"
    one_bytes, other_bytes = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_bytes)
    seen.append(folder.fingerprint(["flair", "t1ce"]))
    other.write_bytes(one_bytes)
    seen.append(folder.fingerprint(["flair", "t1ce"]))
    shutil.copytree(path / "MUELLER_0001", path / "NEW")
    seen.append(SiteFolder(path, "CS").fingerprint(["flair", "t1ce"]))
    assert len(set(seen)) == 4
