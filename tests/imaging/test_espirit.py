"""ESPIRiT: its own equation in plain loops, maps that are known, and the programs of others."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.devices import DEVICES, device_named
from tests.real_images import root_folder
from torch import Tensor

from wardround.errors import GeometryError, StudyError
from wardround.imaging.acquisition.mri import espirit
from wardround.imaging.acquisition.mri.coils import (
    birdcage_maps,
    calibration_region,
    estimate_maps,
    low_resolution_maps,
)
from wardround.imaging.acquisition.mri.compression import compression_matrix
from wardround.imaging.acquisition.mri.espirit import Espirit, espirit_maps
from wardround.imaging.acquisition.mri.masks import centred
from wardround.imaging.acquisition.mri.operator import CartesianMRI, fft2c
from wardround.imaging.acquisition.mri.scanner import MRIScanner
from wardround.imaging.readers.raw import RawSlices
from wardround.runs.measured import measured_scans
from wardround.study import MRIAcquisition, Study
from wardround.tasks.mri import MRIReconstruction

BART = pytest.mark.skipif(shutil.which("bart") is None, reason="BART is not installed")
SIGPY = pytest.mark.skipif(importlib.util.find_spec("sigpy") is None, reason="sigpy is not installed")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex64)


def _head(coils: int, size: int, noise: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """K-space (C, H, W) of a simulated head with phase, its true maps and where it is."""
    maps = torch.from_numpy(birdcage_maps(coils, (size, size)))
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    inside = (x / 0.7) ** 2 + (y / 0.85) ** 2 < 1
    image = inside * (1 + 0.5 * torch.cos(9 * x) * torch.cos(7 * y)) * torch.polar(torch.ones_like(x), 2 * x * y + y)
    return fft2c(maps * image) + noise * _random(coils, size, size), maps, inside


def _lines(shape: tuple[int, int], count: int) -> Tensor:
    mask = torch.zeros(shape)
    mask[:, centred(count, shape[1])] = 1
    return mask


def _agreement(found: Tensor, expected: Tensor) -> Tensor:
    """|<s, s'>| at each voxel where both are, of maps (C, H, W) of length 1 or 0."""
    product = (found.conj() * expected).sum(0).abs()
    return product[(found.abs().sum(0) > 0) & (expected.abs().sum(0) > 0)]


def test_it_is_the_eigenvector_that_the_paper_defines() -> None:
    """Uecker et al., equations 9 to 13: patches, singular vectors, their transforms, one matrix for each voxel."""
    kernel, (height, width), (rows, columns) = 3, (9, 8), (7, 6)
    kspace = _random(1, 3, height, width)
    settings = Espirit(kernel=kernel, singular=0.3, crop=0.0, doublings=14)
    found = espirit_maps(kspace, (rows, columns), settings)[0].numpy()
    top, left = height // 2 - rows // 2, width // 2 - columns // 2
    centre = kspace[0].numpy().astype(np.complex128)[:, top : top + rows, left : left + columns]
    patches = [
        centre[:, y : y + kernel, x : x + kernel].ravel()
        for y in range(rows - kernel + 1)
        for x in range(columns - kernel + 1)
    ]
    _, values, vectors = np.linalg.svd(np.conj(patches), full_matrices=False)
    basis = vectors[values > 0.3 * values[0]].conj()
    assert 1 < len(basis) < 20
    samples = centre.reshape(3, -1)
    strongest = np.linalg.svd(samples)[0][:, 0].conj()
    for y in range(height):
        for x in range(width):
            total = np.zeros((3, 3), complex)
            for vector in basis.reshape(-1, 3, kernel, kernel):
                g = np.zeros(3, complex)
                for i in range(kernel):
                    for j in range(kernel):
                        wave = np.exp(2j * np.pi * ((y - height // 2) * i / height + (x - width // 2) * j / width))
                        g += vector[:, i, j] * wave
                total += np.outer(g, g.conj()) / kernel**2
            expected = np.linalg.eigh(total)[1][:, -1]
            assert abs(np.vdot(expected, found[:, y, x])) == pytest.approx(1, abs=1e-4)
            # Relative to the combination of coils with most signal.
            virtual = (strongest * found[:, y, x]).sum()
            expected_size = abs((strongest * expected).sum())
            turned = virtual * abs(strongest[np.abs(strongest).argmax()]) / strongest[np.abs(strongest).argmax()]
            assert turned == pytest.approx(expected_size, abs=1e-3)


@pytest.mark.parametrize(("mask", "count"), [("block", 12), ("lines", 8), ("lines", 6)])
def test_known_maps_come_back_from_few_lines(mask: str, count: int) -> None:
    kspace, maps, inside = _head(8, 64, noise=0.002)
    measured = _lines((64, 64), count)
    if mask == "block":
        measured = measured * measured.T
    found = estimate_maps(kspace[None] * measured, measured, "espirit")[0]
    norms = torch.linalg.vector_norm(found, dim=0)
    assert ((norms - 1).abs() < 1e-5).logical_or(norms == 0).all()
    assert (norms[inside] > 0).float().mean() > 0.99
    assert norms.mean() < 0.85  # and nothing at the edges of the field of view
    agreement = _agreement(found, maps * inside)
    assert agreement.mean() > 0.999
    # More than the tapered low-resolution images know.
    assert (
        agreement.mean() > _agreement(low_resolution_maps(kspace[None] * measured, measured)[0], maps * inside).mean()
    )


def test_the_image_keeps_its_phase_and_the_combined_image_is_the_root_sum_of_squares() -> None:
    kspace, maps, inside = _head(6, 48)
    found = espirit_maps(kspace[None], (24, 24))
    image = CartesianMRI(found, torch.ones(48, 48)).A_adjoint(kspace[None])[0]
    truth = CartesianMRI(maps[None], torch.ones(48, 48)).A_adjoint(kspace[None])[0]
    inner = torch.nn.functional.avg_pool2d(inside[None].float(), 5, 1, 2)[0] == 1  # the edge itself rings
    assert (found[0].abs().sum(0) > 0)[inner].all()
    torch.testing.assert_close(image.abs()[inner], truth.abs()[inner], rtol=0.01, atol=0.01)
    # What phase the maps have beside the coils' own is that of one combination of the coils, so smooth.
    turn = (found[0].conj() * maps).sum(0)
    virtual = compression_matrix(kspace[:, centred(24, 48), centred(24, 48)].flatten(1), 1)[0]
    expected = torch.einsum("c,chw->hw", virtual, maps)
    assert ((turn / turn.abs()) - expected / expected.abs()).abs()[inner].max() < 0.05
    assert image[inner].angle().abs().max() > 1
    # The fast estimate takes the image's phase into the maps: what it combines is nearly real.
    full = torch.ones(48, 48)
    real = CartesianMRI(low_resolution_maps(kspace[None], full), full).A_adjoint(kspace[None])[0]
    assert real[inner].angle().abs().max() < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_on_any_device(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where = device_named(device, monkeypatch).device
    kspace = _random(2, 3, 12, 14)
    found = espirit_maps(kspace.to(where), (8, 9), Espirit(kernel=4))
    assert found.shape == kspace.shape
    assert found.dtype == torch.complex64
    assert found.device.type == where.type
    if where.type != "meta":
        torch.testing.assert_close(found.cpu(), espirit_maps(kspace, (8, 9), Espirit(kernel=4)), rtol=1e-3, atol=1e-3)


def test_each_scan_on_its_own_whatever_its_scale_its_neighbours_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kspace = torch.stack([_head(4, 32)[0], 1e-5 * _random(4, 32, 32), torch.zeros(4, 32, 32)])
    masks = torch.stack([_lines((32, 32), count) for count in (8, 12, 32)])
    found = estimate_maps(kspace * masks[:, None], masks, "espirit")
    for number in range(3):
        assert torch.equal(
            found[number], estimate_maps((kspace * masks[:, None])[[number]], masks[[number]], "espirit")[0]
        )
    assert torch.equal(found[0], espirit_maps(kspace[:1], (32, 8))[0])
    assert (found[2] == 0).all()
    torch.testing.assert_close(espirit_maps(1000 * kspace[:1], (32, 8)), found[:1], rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(espirit, "_CHUNK", 1000)
    torch.testing.assert_close(espirit_maps(kspace[:1], (32, 8)), found[:1], rtol=1e-3, atol=1e-4)


def test_one_coil_and_too_few_lines_are_refused() -> None:
    with pytest.raises(GeometryError, match=r"has one; estimate its map with `maps: estimated`"):
        estimate_maps(_random(1, 1, 16, 16), torch.ones(16, 16), "espirit")
    with pytest.raises(GeometryError, match=r"needs 6 fully sampled lines.*16 rows, 5 columns; measure more"):
        estimate_maps(_random(1, 2, 16, 16), _lines((16, 16), 5), "espirit")
    few = {"maps": "espirit", "mask": {"calibration": 0.05}}
    with pytest.raises(ValueError, match=r"needs 6 calibration lines.*site A measures 3 of images of 64 x 64"):
        _study(few)
    with pytest.raises(ValueError, match=r"the scanner of site A has one; give it more"):
        _study({"maps": "espirit", "coils": 1, "mask": {"calibration": 0.12}})


def test_a_model_of_real_images_is_refused() -> None:
    espirit_study = {"maps": "espirit", "phase": 0.0, "mask": {"calibration": 0.12}}
    real = _study(espirit_study, {"kind": "modl", "preset": "tiny", "image": "real"})
    with pytest.raises(StudyError, match=r"model.image: real needs coil maps that carry the phase.*maps: espirit"):
        MRIReconstruction(real)
    MRIReconstruction(_study(espirit_study, {"kind": "modl", "preset": "tiny", "image": "complex"}))


def _study(acquisition: dict[str, object], model: dict[str, object] | None = None) -> Study:
    return Study.model_validate(
        {
            "name": "maps",
            "sites": {"A": {}, "B": {}},
            "acquisition": acquisition,
            "task": {"kind": "reconstruction", "size": [64, 64]},
            "model": model or {"kind": "modl", "preset": "tiny"},
            "method": {"kind": "fedavg"},
        }
    )


def test_a_simulated_scanner_and_a_measured_scan_have_the_same_maps() -> None:
    acquisition = MRIAcquisition.model_validate({"maps": "espirit", "coils": 4, "mask": {"calibration": 0.2}})
    scanner = MRIScanner("A", acquisition, 3)
    image = _head(4, 32)[2].numpy().astype(np.float32)
    scan = scanner.scan(image, 0, scanner.random(0, 0))
    kspace, mask, maps = scan.unpacked()
    assert scan.maps is maps  # kept: estimating again is slower than a training step
    assert torch.equal(maps, estimate_maps(kspace[None], mask, "espirit")[0])
    raw = RawSlices("test", (1, *kspace.shape), lambda number: kspace.numpy())
    measured = measured_scans(raw, "espirit").scans[0]()[0]
    assert torch.equal(measured.maps[0], maps)  # type: ignore[attr-defined]
    fast = measured_scans(raw).scans[0]()[0]
    assert torch.equal(fast.maps, low_resolution_maps(kspace[None], mask))  # type: ignore[attr-defined]


def _scan(which: str) -> Tensor:
    if which == "simulated":
        return _head(8, 128, noise=0.002)[0]
    return torch.from_numpy(np.load(root_folder() / "kspace" / "sigpy_brain8ch_poisson.npy"))


SCANS = ["simulated", pytest.param("real", marks=pytest.mark.data("kspace"))]


@pytest.mark.slow
@SIGPY
@pytest.mark.parametrize("which", SCANS)
def test_sigpy_finds_the_same(which: str) -> None:
    from sigpy.mri.app import EspiritCalib

    kspace = _scan(which)
    theirs = EspiritCalib(kspace.numpy(), calib_width=24, thresh=0.02, kernel_width=6, crop=0.9, show_pbar=False).run()
    ours = espirit_maps(kspace[None], (24, 24))[0]
    agreement = _agreement(ours, torch.from_numpy(theirs))
    assert agreement.mean() > 0.9999
    assert agreement.quantile(0.01) > 0.999
    assert ((ours.abs().sum(0) > 0) == torch.from_numpy(np.abs(theirs).sum(0) > 0)).float().mean() > 0.99


@pytest.mark.slow
@BART
@pytest.mark.parametrize("which", SCANS)
def test_bart_finds_the_same(which: str, tmp_path: Path) -> None:
    kspace = _scan(which)
    columns = np.moveaxis(kspace.numpy(), 0, -1)[:, :, None]
    (tmp_path / "k.hdr").write_text("# Dimensions\n" + " ".join(map(str, columns.shape)) + "\n")
    columns.ravel(order="F").tofile(tmp_path / "k.cfl")
    # Its threshold is one of squared singular values.
    options = ["-m1", "-t0.0004", "-c0.9", "-k6", "-r24"]
    subprocess.run(["bart", "ecalib", *options, "k", "s"], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    theirs = np.fromfile(tmp_path / "s.cfl", np.complex64).reshape(columns.shape, order="F")
    region = calibration_region((kspace.abs().sum(0) > 0).float().numpy())
    assert min(region) >= 24
    found = torch.from_numpy(np.moveaxis(theirs[:, :, 0], -1, 0).copy())
    agreement = _agreement(espirit_maps(kspace[None], region)[0], found)
    # On the real scan a few voxels at its edge have two eigenvalues alike; sigpy and BART differ there as much.
    assert agreement.mean() > (0.9999 if which == "simulated" else 0.999)
    assert agreement.quantile(0.01) > 0.999
