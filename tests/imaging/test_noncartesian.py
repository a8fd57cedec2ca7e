"""Non-Cartesian MRI beyond the laws: its normal operator, its first image, padding, coil maps and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.coils import birdcage_maps
from wardround.imaging.acquisition.mri.noncartesian import NonCartesianMRI, gridded_maps
from wardround.imaging.acquisition.mri.noncartesian_scanner import NonCartesianScanner, path_of, simulated
from wardround.imaging.acquisition.mri.nufft import EVALUATION, TRAINING
from wardround.imaging.acquisition.mri.trajectories import (
    even_weights,
    radial,
    radial_areas,
    spoke_angles,
    spoke_radii,
)
from wardround.imaging.acquisition.solvers import cg_sense, tv
from wardround.study.noncartesian import NonCartesianAcquisition

SIZE = 24


def _complex(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _spokes(count: int, size: int = SIZE) -> tuple[Tensor, Tensor, Tensor]:
    """Trajectory (1, S, 2), even weights and areas (1, S)."""
    angles = spoke_angles(count, True)
    points = radial(angles, 2 * size)
    parts = points, even_weights(points, (size, size)), radial_areas(angles, spoke_radii(2 * size), (size, size))
    trajectory, weights, areas = (torch.from_numpy(part).float()[None] for part in parts)
    return trajectory, weights, areas


def _disc(size: int = SIZE) -> np.ndarray:
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    return (0.7 * (x**2 + (y / 1.2) ** 2 < 0.4) + 0.3 * ((x - 0.2) ** 2 + y**2 < 0.05)).astype(np.float32)


def _maps(coils: int, size: int = SIZE) -> Tensor:
    return torch.from_numpy(birdcage_maps(coils, (size, size)))[None]


@pytest.mark.parametrize("tolerance", [TRAINING, EVALUATION])
def test_the_normal_operator_is_the_pair_within_the_tolerance(tolerance: float) -> None:
    trajectory, weights, _ = _spokes(11)
    operator = NonCartesianMRI(_maps(3), trajectory, weights, tolerance=tolerance)
    x = _complex(2, SIZE, SIZE)
    error = operator.normal(x) - operator.A_adjoint(operator.A(x))
    assert error.norm() <= 2 * tolerance * operator.normal(x).norm()


def test_weights_make_the_largest_singular_value_about_one() -> None:
    trajectory, weights, _ = _spokes(11)
    plain, even = (NonCartesianMRI(_maps(3), trajectory, w).norm(_complex(1, SIZE, SIZE)) for w in (None, weights))
    assert 1.0 < even < 1.25
    assert plain > 2.5 * even


@pytest.mark.slow
def test_a_first_image_of_a_dense_scan_is_the_image() -> None:
    """Of a Gaussian whose spectrum ends within the disc; with plain data and with weighed ones alike."""
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    image = torch.from_numpy(np.exp(-(x**2 + y**2) / 18.0)).to(torch.complex64)[None]
    trajectory, weights, areas = _spokes(60)
    for given in (None, weights):
        operator = NonCartesianMRI(_maps(2), trajectory, given, areas=areas)
        torch.testing.assert_close(operator.initial(operator.A(image)), image, rtol=0, atol=0.02)
    even = NonCartesianMRI(_maps(2), trajectory, weights)
    torch.testing.assert_close(even.initial(even.A(image)), even.A_adjoint(even.A(image)))
    measured = NonCartesianMRI(_maps(2), trajectory).A(image)
    torch.testing.assert_close(even.weighed(measured), even.A(image))


def test_several_coils_recover_what_few_spokes_leave_out() -> None:
    trajectory, weights, _ = _spokes(14)
    image = torch.from_numpy(_disc()).to(torch.complex64)[None]
    operator = NonCartesianMRI(_maps(6), trajectory, weights)
    data = operator.A(image)
    errors = [
        float((x - image).norm() / image.norm())
        for x in (operator.initial(data), cg_sense(operator, data, 1e-3), tv(operator, data, 5e-4))
    ]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < errors[1]


def test_padded_samples_and_coils_change_nothing() -> None:
    trajectory, weights, areas = _spokes(9)
    maps, x = _maps(3), _complex(1, SIZE, SIZE)
    own = NonCartesianMRI(maps, trajectory, weights)
    more = torch.zeros(1, 50)
    padded = NonCartesianMRI(
        torch.cat([maps, torch.zeros_like(maps[:, :2])], 1),
        torch.cat([trajectory, torch.zeros(1, 50, 2)], 1),
        torch.cat([weights, more], 1),
        areas=torch.cat([areas, more], 1),
    )
    y = padded.A(x)
    assert y[:, 3:].abs().max() == 0
    assert y[..., -50:].abs().max() == 0
    torch.testing.assert_close(y[:, :3, :-50], own.A(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded.normal(x), own.normal(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded.norm(x), own.norm(x), rtol=1e-5, atol=0)


def test_each_item_has_its_own_trajectory() -> None:
    pairs = [_spokes(9), _spokes(9)]
    trajectory = torch.cat([pairs[0][0], pairs[1][0].flip(-1)])
    weights = pairs[0][1].expand(2, -1)
    maps, x = _maps(3).expand(2, -1, -1, -1), _complex(2, SIZE, SIZE)
    both = NonCartesianMRI(maps, trajectory, weights)
    for i in range(2):
        alone = NonCartesianMRI(maps[i : i + 1], trajectory[i : i + 1], weights[i : i + 1])
        assert torch.equal(both.A(x)[i], alone.A(x[i : i + 1])[0])
        torch.testing.assert_close(both.normal(x)[i], alone.normal(x[i : i + 1])[0])


def test_a_large_batch_is_the_same_as_its_slices_alone() -> None:
    """Large enough that `normal` works through it in parts."""
    trajectory, weights, _ = _spokes(8, 64)
    maps, x = _complex(3, 8, 64, 64), _complex(3, 64, 64, seed=1)
    together = NonCartesianMRI(maps, trajectory, weights).normal(x)
    for i in range(3):
        alone = NonCartesianMRI(maps[i : i + 1], trajectory, weights).normal(x[i : i + 1])
        torch.testing.assert_close(together[i], alone[0])


def test_maps_and_weights_can_be_learned() -> None:
    trajectory = torch.from_numpy(radial(spoke_angles(2, True), 4))[None]
    maps = _complex(1, 2, 4, 3, dtype=torch.complex128).requires_grad_()
    weights = torch.linspace(0.2, 1.0, 8).double()[None].requires_grad_()
    x = _complex(1, 4, 3, seed=4, dtype=torch.complex128)
    assert torch.autograd.gradcheck(lambda s, w: NonCartesianMRI(s, trajectory, w).normal(x), (maps, weights))


def test_maps_estimated_from_the_dense_centre_are_those_of_the_coils() -> None:
    """Up to the image's phase: the angle between true and estimated sensitivities in the object."""
    acquisition = NonCartesianAcquisition(coils=5, noise=0.0, trajectory={"kind": "radial", "spokes": 24})
    image = _disc(48)
    scan = simulated(image, acquisition, path_of(acquisition, (48, 48)), np.random.default_rng(1))
    exact = simulated(
        image, acquisition.model_copy(update={"maps": "true"}), path_of(acquisition, (48, 48)), np.random.default_rng(1)
    )
    found, true = scan.known_maps(), exact.known_maps()
    inside = torch.from_numpy(image > 0.5)
    alike = (found.conj() * true).sum(0).abs()[inside]
    assert alike.mean() > 0.99
    torch.testing.assert_close(found.abs().square().sum(0)[inside], torch.ones(int(inside.sum())))


def test_a_thin_centre_has_no_maps() -> None:
    trajectory, _, areas = _spokes(3)
    with pytest.raises(GeometryError, match="densely enough"):
        gridded_maps(_complex(1, 2, trajectory.shape[1]), trajectory, areas, (SIZE, SIZE))


def test_a_patient_has_a_turn_of_its_own_unless_it_is_fixed() -> None:
    image = _disc()
    acquisition = NonCartesianAcquisition(coils=2, trajectory={"kind": "radial", "spokes": 10})
    scanner = NonCartesianScanner("A", acquisition, 7)
    scans = [scanner.scan(image, patient, scanner.random(patient, 0)) for patient in (0, 1, 0)]
    assert not torch.equal(scans[0].path.trajectory, scans[1].path.trajectory)
    assert torch.equal(scans[0].samples, scans[2].samples)
    fixed = NonCartesianScanner("A", acquisition.model_copy(update={"fixed": True}), 7)
    paths = [fixed.scan(image, patient, fixed.random(patient, 0)).path.trajectory for patient in (0, 1)]
    assert torch.equal(*paths)


def test_noise_is_that_of_a_sample() -> None:
    quiet = NonCartesianAcquisition(coils=4, noise=0.0, trajectory={"kind": "spiral"})
    loud = quiet.model_copy(update={"noise": 0.02})
    path = path_of(quiet, (SIZE, SIZE))
    scans = [simulated(_disc(), each, path, np.random.default_rng(3)).samples for each in (quiet, loud)]
    noise = torch.view_as_real(scans[1] - scans[0])
    # The standard error of a standard deviation of n numbers is 1 / sqrt(2 n).
    assert abs(float(noise.std()) / 0.02 - 1) < 4 / (2 * noise.numel()) ** 0.5


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"maps": torch.ones(2, 4, 4, dtype=torch.complex64)}, "maps\\[None\\]"),
        ({"trajectory": torch.zeros(5, 2)}, "B or 1, samples, 2"),
        ({"trajectory": torch.zeros(1, 5, 2, requires_grad=True)}, "detach"),
        ({"weights": torch.ones(1, 4)}, "5 samples"),
        ({"areas": torch.ones(5)}, "5 samples"),
        ({"trajectory": torch.zeros(3, 5, 2)}, "batches of \\[2, 3\\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_fix(change: dict[str, Tensor], fix: str) -> None:
    given = {"maps": torch.ones(2, 2, 4, 4, dtype=torch.complex64), "trajectory": torch.zeros(1, 5, 2), **change}
    with pytest.raises(GeometryError, match=fix):
        NonCartesianMRI(given.pop("maps"), given.pop("trajectory"), given.pop("weights", None), **given)
