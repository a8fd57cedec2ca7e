"""A simulated scan: the truth it comes with, its noise, its doses, and what reconstruction makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.real_images import root_folder
from torch import Tensor

from wardround.errors import GeometryError
from wardround.imaging.acquisition.ct.fbp import FBP, fbp
from wardround.imaging.acquisition.ct.noise import hu_to_mu, mu_to_hu
from wardround.imaging.acquisition.ct.operator import CTProjector
from wardround.imaging.acquisition.ct.phantom import HEAD, THORAX, ellipse_image, ellipse_sinogram
from wardround.imaging.acquisition.ct.simulate import CTMeasurement, CTSimulator, simulate_ct
from wardround.imaging.acquisition.ct.system import CTSystem
from wardround.imaging.acquisition.solvers import tv, tv_objective
from wardround.imaging.readers.dicom import read_slice
from wardround.study.ct import CTAcquisition, CTGeometry

GEOMETRY = CTGeometry(
    kind="fan_arc",
    size=(64, 64),
    pixel=4.0,
    views=60,
    bins=140,
    bin=4.0,
    offset=0.25,
    source_distance=595,
    detector_distance=490.6,
)
FINE = GEOMETRY.model_copy(update={"size": (128, 128), "pixel": 2.0})
IMAGE = mu_to_hu(ellipse_image(THORAX, FINE)).astype(np.float32)
SCAN = CTAcquisition(geometry=GEOMETRY, photons=1e5, electronic_noise=5.0)


def _random() -> np.random.Generator:
    return np.random.default_rng(3)


def _psnr(image: Tensor, reference: Tensor) -> float:
    """For a range of 2000 HU."""
    return float(10 * torch.log10((2 * 0.0192) ** 2 / (image - reference).square().mean()))


def test_without_noise_it_is_the_phantoms_sinogram() -> None:
    quiet = SCAN.model_copy(update={"photons": 1e9, "electronic_noise": 0.0})
    scan = simulate_ct(IMAGE, quiet, _random())
    expected = ellipse_sinogram(THORAX, GEOMETRY, rays_per_bin=4)
    assert np.linalg.norm(scan.sinogram.numpy() - expected) < 0.01 * np.linalg.norm(expected)
    np.testing.assert_allclose(scan.reference.numpy(), ellipse_image(THORAX, GEOMETRY, points=16), atol=1e-6)
    assert {part.dtype for part in (scan.sinogram, scan.reference)} == {torch.float32}


def test_the_same_seed_gives_the_same_scan() -> None:
    simulator = CTSimulator(SCAN)
    assert torch.equal(simulator(IMAGE, _random()).sinogram, simulator(IMAGE, _random()).sinogram)


@pytest.mark.parametrize(("hardening", "kvp"), [(False, 120.0), (True, 120.0), (True, 60.0)])
def test_many_scans_vary_as_the_operator_says(hardening: bool, kvp: float) -> None:
    """Mean over rays of the variance over scans, in units of the stated one; thin and thick rays apart."""
    scanner = SCAN.model_copy(update={"beam_hardening": hardening, "kvp": kvp})
    system, simulator, random = CTSystem(scanner), CTSimulator(scanner), _random()
    scans = torch.stack([simulator(IMAGE, random).sinogram for _ in range(60)])
    truth = CTSimulator(scanner.model_copy(update={"photons": 1e9, "electronic_noise": 0.0}))(IMAGE, random).sinogram
    ratio = scans.var(0) / system.uncertainty(system.scaled(truth))
    for low, high in ((-0.1, 0.1), (1.0, 2.0), (2.0, 3.0), (3.0, 4.0)):
        rays = ratio[(truth >= low) & (truth < high)]
        assert len(rays) > 300
        assert float(rays.mean()) == pytest.approx(1, abs=0.03), (low, high)


def test_a_coarse_image_is_refined_and_other_sizes_are_refused() -> None:
    coarse = IMAGE.reshape(64, 2, 64, 2).mean((1, 3))
    scan = simulate_ct(coarse, SCAN, _random())
    assert _psnr(scan.reference, torch.from_numpy(hu_to_mu(coarse))) > 25
    assert scan.reference.mean() == pytest.approx(hu_to_mu(coarse).mean(), rel=1e-3)
    finer = np.repeat(np.repeat(IMAGE, 2, 0), 2, 1)
    torch.testing.assert_close(
        simulate_ct(finer, SCAN, _random()).reference, simulate_ct(IMAGE, SCAN, _random()).reference
    )
    for shape in ((96, 96), (128, 64), (32, 32), (128,)):
        with pytest.raises(GeometryError, match="resample the image"):
            simulate_ct(np.zeros(shape, np.float32), SCAN, _random())
    with pytest.raises(GeometryError, match="twice as fine"):
        CTSimulator(SCAN, refinement=1)


def test_a_scanner_that_misses_the_patient_is_refused() -> None:
    small = SCAN.model_copy(update={"geometry": GEOMETRY.model_copy(update={"bins": 60})})
    with pytest.raises(GeometryError, match="misses the patient"):
        CTSimulator(small)


def test_beam_hardening_leaves_water_and_shadows_bone() -> None:
    clean = {"photons": 1e9, "electronic_noise": 0.0}
    plain = CTSimulator(SCAN.model_copy(update=clean))
    hard = CTSimulator(SCAN.model_copy(update={**clean, "beam_hardening": True}))
    water = mu_to_hu(ellipse_image(HEAD[:1], FINE)).astype(np.float32)
    torch.testing.assert_close(hard(water, _random()).sinogram, plain(water, _random()).sinogram, rtol=2e-3, atol=2e-3)
    bone = water.copy()
    bone[40:50, 40:88] = bone[78:88, 40:88] = 1500
    images = [fbp(simulate(bone, _random()).sinogram[None], GEOMETRY)[0] for simulate in (hard, plain)]
    shadow = (images[0] - images[1])[28:36, 28:36].mean() / 0.0192 * 1000
    assert -120 < shadow < -5


@pytest.mark.slow
def test_total_variation_beats_filtered_back_projection() -> None:
    scan = simulate_ct(IMAGE, SCAN, _random())
    operator, y = CTProjector(GEOMETRY), scan.sinogram[None]
    weight = 0.001 * 0.0192 * float(operator.norm(y)[0]) ** 2
    image = tv(operator, y, weight)
    best = max(_psnr(FBP(GEOMETRY, window)(y)[0], scan.reference) for window in ("ramp", "hann"))
    assert _psnr(image[0], scan.reference) > best + 5
    least = tv_objective(operator, y, weight, tv(operator, y, weight, iterations=300))
    assert tv_objective(operator, y, weight, image) < 1.004 * least


@pytest.mark.data("luad-ct")
def test_a_real_chest_comes_back() -> None:
    path = sorted((root_folder() / "luad-ct").glob("*/*/*.dcm"))[0]
    hu = read_slice(path).hu.reshape(256, 2, 256, 2).mean((1, 3))
    geometry = GEOMETRY.model_copy(update={"size": (128, 128), "pixel": 1.95, "views": 180, "bins": 300, "bin": 2.0})
    scan: CTMeasurement = simulate_ct(hu, SCAN.model_copy(update={"geometry": geometry}), _random())
    assert _psnr(FBP(geometry, "hann")(scan.sinogram[None])[0], scan.reference) > 25
