"""Made-up patients: physics by the textbook, anatomy by the seed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from wardround.errors import MissingExtra
from wardround.imaging import phantoms
from wardround.imaging.datasets.mri import SliceIndex
from wardround.imaging.phantoms import (
    CONTRAST_SITES,
    DEMO_SITES,
    TISSUES,
    PhantomSite,
    Protocol,
    Tissue,
    make_patient,
    make_site,
    signal,
)
from wardround.imaging.readers.folder import SiteFolder
from wardround.imaging.readers.volume import Volume, read_volume
from wardround.study.tasks import Slices, Split

SMALL = {"size": 64, "slices": 4}


@pytest.fixture(scope="module")
def patients() -> dict[str, tuple[Volume, Volume]]:
    pytest.importorskip("nilearn")
    return {site.name: make_patient(site, np.random.default_rng(3), **SMALL) for site in CONTRAST_SITES}


def test_signals_have_their_textbook_limits() -> None:
    tissue = Tissue(t1=800, t2=80, t2_star=50, density=0.8)
    assert signal(Protocol("spin_echo", tr=1e6, te=0), tissue) == pytest.approx(0.8)
    assert signal(Protocol("spin_echo", tr=800 * np.log(2), te=80), tissue) == pytest.approx(0.4 / np.e)
    null = Protocol("inversion_recovery", tr=1e6, te=0, ti=800 * np.log(2))
    assert signal(null, tissue) == pytest.approx(0, abs=1e-9)
    assert signal(replace(null, ti=0), tissue) == pytest.approx(-0.8)
    ernst = np.rad2deg(np.arccos(np.exp(-20 / 800)))
    angles = np.linspace(1, 90, 400)
    best = angles[np.argmax([signal(Protocol("gradient_echo", 20, 0, flip=a), tissue) for a in angles])]
    assert best == pytest.approx(ernst, abs=0.3)
    assert signal(Protocol("gradient_echo", 1e6, 50, flip=90), tissue) == pytest.approx(0.8 / np.e)


@pytest.mark.parametrize(
    ("site", "order"),
    [
        ("Northfield", ["csf", "grey", "white", "fat"]),
        ("Harbour", ["csf", "white", "grey", "oedema"]),
        ("Valley", ["white", "grey", "tumour", "csf"]),
        ("Island", ["csf", "grey", "white", "fat"]),
    ],
)
def test_protocols_order_the_tissues_as_radiologists_expect(site: str, order: list[str]) -> None:
    protocol = next(s.protocol for s in CONTRAST_SITES if s.name == site)
    signals = [abs(signal(protocol, TISSUES[protocol.field][name])) for name in order]
    assert signals == sorted(signals)


@pytest.mark.parametrize(("sites", "training"), [(DEMO_SITES, 4), (CONTRAST_SITES, 3)])
def test_one_hospital_is_unseen_and_no_two_scan_alike(sites: tuple[PhantomSite, ...], training: int) -> None:
    assert [site.role for site in sites].count("train") == training
    assert [site.role for site in sites].count("unseen") == 1
    assert len({site.protocol for site in sites}) == len({site.name for site in sites}) == training + 1


@pytest.mark.parametrize("site", DEMO_SITES, ids=lambda site: site.name)
def test_the_demo_makes_the_same_kind_of_scan_everywhere(site: PhantomSite) -> None:
    tissues = TISSUES[site.protocol.field]
    order = ("csf", "white", "grey", "tumour")
    signals = [abs(signal(site.protocol, tissues[name])) for name in order]
    assert signals == sorted(signals)
    # What fluid-attenuated means, and why tumours are outlined on it.
    assert signals[0] < 0.15 * signals[1]
    assert signals[3] > 1.2 * signals[2]


@pytest.mark.parametrize("length", [9.0, 28.0])
def test_a_texture_is_filtered_noise(length: float) -> None:
    grid = phantoms._Grid(32, 6, 3.0, 8.0)
    noise = np.random.default_rng(5).standard_normal(grid.shape, dtype=np.float32)
    sigma = (length / 3.0, length / 3.0, length / 8.0)
    expected = ndimage.gaussian_filter(noise.astype(np.float64), sigma, mode="wrap", truncate=8)
    expected = (expected - expected.mean()) / expected.std()
    found = grid.texture(np.random.default_rng(5), length)
    assert (found.mean(), found.std()) == pytest.approx((0, 1), abs=1e-4)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999


def test_patients_have_heads_and_tumours(patients: dict[str, tuple[Volume, Volume]]) -> None:
    for image, seg in patients.values():
        assert image.data.shape == seg.data.shape == (64, 64, 4)
        assert set(np.unique(seg.data)) == {0, 1}
        assert 10 < seg.data.sum() < 0.2 * seg.data.size
        head = image.data > 0.1 * np.percentile(image.data, 99)
        assert 0.25 < head[:, :, 0].mean() < 0.7
        corners = np.stack([image.data[:4, :4], image.data[-4:, -4:]])
        assert corners.max() < 0.05 * image.data.max()
        assert head[seg.data > 0].mean() > 0.95


def test_hospitals_differ_in_contrast(patients: dict[str, tuple[Volume, Volume]]) -> None:
    def relative(name: str) -> float:
        image, seg = patients[name]
        brain = np.zeros((64, 64, 4), dtype=bool)
        brain[20:44, 24:40] = True
        return float(image.data[seg.data > 0].mean() / np.median(image.data[brain & (seg.data == 0)]))

    assert relative("Harbour") > 1.2
    assert relative("Valley") > 1.2
    assert relative("Northfield") < 1.0


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    site = DEMO_SITES[0]
    folders = [make_site(tmp_path / name, site, 2, seed, **SMALL) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    files = [{path.relative_to(f): path.read_bytes() for path in f.rglob("*.nii.gz")} for f in folders]
    assert len(files[0]) == 4
    assert files[0] == files[1]
    assert files[0].keys() == files[2].keys()
    assert all(files[0][name] != files[2][name] for name in files[0])
    one, two = (read_volume(folders[0] / f"P00{n}" / "image.nii.gz").data for n in (1, 2))
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] < 0.99


def test_a_made_site_is_a_site(tmp_path: Path) -> None:
    pytest.importorskip("nilearn")
    folder = SiteFolder(make_site(tmp_path, DEMO_SITES[1], 3, 0, **SMALL), "Harbour")
    index = SliceIndex(folder, contrasts=("image",), size=(64, 64), slices=Slices(), split=Split(), seed=0)
    assert len(index.examples("train")) == 4


def test_without_nilearn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nilearn", None)
    phantoms._atlas.cache_clear()
    with pytest.raises(MissingExtra, match=r"wardround\[demo\]"):
        make_patient(DEMO_SITES[0], np.random.default_rng(0), **SMALL)
