"""Examples: which slices, at what scale and size, with which head mask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.real_images import root_folder

from wardround.errors import DataError
from wardround.imaging.datasets.mri import SPLITS, SliceExample, SliceIndex, fit_to_size, head_mask
from wardround.imaging.readers.folder import SiteFolder
from wardround.imaging.readers.volume import Volume, write_nifti
from wardround.study.tasks import Slices, Split

MakeSite = Callable[..., Path]


def index(path: Path, **changes: object) -> SliceIndex:
    options = {"contrasts": ("flair", "t1ce"), "size": (32, 32), "slices": Slices(), "split": Split(), "seed": 0}
    return SliceIndex(SiteFolder(path, "CS"), **{**options, **changes})


def test_examples_are_the_slices_with_a_head_of_the_patients_of_a_split(make_site: MakeSite) -> None:
    site = index(make_site(patients=8))
    patients = [set(site.patients(split)) for split in SPLITS]
    assert set.union(*patients) == set(range(8))
    assert sum(len(part) for part in patients) == 8
    for split, numbers in zip(SPLITS, patients, strict=True):
        expected = [
            SliceExample(p, contrast, z) for p in sorted(numbers) for contrast in ("flair", "t1ce") for z in range(1, 5)
        ]
        assert list(site.examples(split)) == expected


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Slices(every=2), [2, 4]),
        (Slices(minimum_foreground=0.0), [0, 1, 2, 3, 4]),
        (Slices(per_patient=2), [2, 4]),
        (Slices(per_patient=1), [3]),
        (Slices(per_patient=9), [1, 2, 3, 4]),
    ],
)
def test_slices_are_chosen_by_rule(make_site: MakeSite, rule: Slices, expected: list[int]) -> None:
    site = index(make_site(patients=3), contrasts=("flair",))
    patient = site.patients("test")[0]
    assert [e.slice for e in site.examples("test", rule) if e.patient == patient] == expected


def test_images_are_scaled_by_the_maximum_of_their_volume(make_site: MakeSite) -> None:
    path = make_site(patients=3)
    site, folder = index(path), SiteFolder(path, "CS")
    examples = site.examples("train")
    patient = examples[0].patient
    volume = folder.volume(patient, "flair").astype(np.float32)
    images = [site.image(e) for e in examples if e.patient == patient and e.contrast == "flair"]
    assert all(image.dtype == np.float32 and image.shape == (32, 32) for image in images)
    assert max(image.max() for image in images) == 1.0
    np.testing.assert_allclose(images[0], volume[:, :, 1] / volume.max(), rtol=1e-6)


def test_the_head_mask_is_the_filled_disc(make_site: MakeSite) -> None:
    site = index(make_site(patients=3))
    mask = site.mask(site.examples("train")[0])
    y, x = np.indices((32, 32)) - 16
    np.testing.assert_array_equal(mask, np.hypot(y, x) / 32 < 0.35)


def test_head_mask_drops_specks_keeps_large_pieces_and_fills_holes() -> None:
    image = np.zeros((40, 40), dtype=np.float32)
    image[5:25, 5:25] = 1
    image[10:14, 10:14] = 0
    image[30:38, 5:25] = 1
    image[38, 38] = 1
    expected = np.zeros((40, 40), dtype=bool)
    expected[5:25, 5:25] = expected[30:38, 5:25] = True
    np.testing.assert_array_equal(head_mask(image, 0.5), expected)
    assert not head_mask(np.zeros((4, 4), dtype=np.float32), 0.5).any()


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_fit_to_size_keeps_the_centre(h: int, w: int, height: int, width: int) -> None:
    image = np.zeros((h, w), dtype=np.float32)
    image[h // 2, w // 2] = 1
    fitted = fit_to_size(image, (height, width))
    assert fitted.shape == (height, width)
    assert fitted[height // 2, width // 2] == 1
    assert fitted.sum() == 1


def test_images_are_cropped_and_padded_but_never_beyond_a_factor_of_two(make_site: MakeSite) -> None:
    path = make_site(patients=3)
    assert index(path, size=(24, 48)).image(SliceExample(0, "flair", 2)).shape == (24, 48)
    with pytest.raises(DataError, match=r"site CS, contrast flair: images of 32 x 32 pixels are too far") as caught:
        index(path, size=(32, 128)).examples("train")
    assert "MUELLER" not in str(caught.value)


def test_negative_images_are_refused_but_undershoots_are_clipped(tmp_path: Path) -> None:
    for name, low in (("a", -0.01), ("b", -0.5)):
        data = np.ones((32, 32, 3), dtype=np.float32)
        data[:4] = low
        for number in range(3):
            write_nifti(Volume(data, (1, 1, 1), np.eye(4)), tmp_path / name / f"P{number}" / "flair.nii.gz")
    mild = index(tmp_path / "a", contrasts=("flair",))
    assert mild.image(mild.examples("train")[0]).min() == 0
    with pytest.raises(DataError, match="negative values"):
        index(tmp_path / "b", contrasts=("flair",)).examples("train")


def test_a_site_without_foreground_says_so(make_site: MakeSite) -> None:
    site = index(make_site(patients=3), slices=Slices(minimum_foreground=0.9))
    with pytest.raises(DataError, match="no train slice has 90% foreground"):
        site.examples("train")


def test_a_lacking_contrast_is_refused_at_once(make_site: MakeSite) -> None:
    with pytest.raises(DataError, match="site CS: 3 of 3 patients lack the contrast t2"):
        index(make_site(patients=3), contrasts=("flair", "t2"))


def test_unseen_sites_only_test(make_site: MakeSite) -> None:
    site = index(make_site(patients=2), role="unseen")
    assert site.examples("train") == site.examples("validation") == ()
    assert len(site.examples("test")) == 2 * 2 * 4


def test_the_fingerprint_sees_content_split_and_size_but_no_names(make_site: MakeSite) -> None:
    path = make_site(patients=8)
    before = index(path).fingerprint()
    assert index(path).fingerprint() == before
    assert index(path, contrasts=("t1ce", "flair")).fingerprint() == before
    assert index(path, size=(24, 24)).fingerprint() != before
    assert index(path, seed=1).fingerprint() != before
    for folder in sorted(path.iterdir()):
        folder.rename(path / f"anonymous-{folder.name}")
    assert index(path).fingerprint() == before
    first = index(path).patients("train")[0]
    sorted(path.iterdir())[first].rename(path / "zzz")
    assert index(path).fingerprint() != before


@pytest.mark.data("lgg")
def test_real_heads_are_found() -> None:
    folder = SiteFolder(root_folder() / "lgg" / "CS", "CS")
    site = SliceIndex(folder, contrasts=("flair", "t1ce"), size=(128, 128), slices=Slices(), split=Split(), seed=0)
    assert sum(len(site.patients(split)) for split in SPLITS) == len(folder)
    for example in site.examples("test", Slices(per_patient=4)):
        image, mask = site.image(example), site.mask(example)
        assert 0.05 <= mask.mean() <= 0.9
        assert 0 <= image.min() <= image.max() <= 1
        assert image[mask].mean() > 4 * image[~mask].mean()
