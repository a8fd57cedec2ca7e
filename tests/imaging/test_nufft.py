"""The transform at any points of k-space: its definition, its adjoint and derivatives, its bits, what it refuses."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from wardround.errors import GeometryError, MissingExtra, StudyError
from wardround.imaging.acquisition.mri import nufft
from wardround.imaging.acquisition.mri.nufft import EVALUATION, TRAINING, Transform, transform_of
from wardround.imaging.acquisition.mri.operator import fft2c, ifft2c


def _points(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (count, 2))


def _complex(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _by_definition(points: np.ndarray, image: np.ndarray) -> np.ndarray:
    """sum over pixels of x(n) exp(-2 pi i k.n) / sqrt(HW), one sample at a time."""
    height, width = image.shape
    rows, columns = np.arange(height) - height // 2, np.arange(width) - width // 2
    return np.array(
        [
            np.exp(-2j * np.pi * ky * rows) @ image @ np.exp(-2j * np.pi * kx * columns) / np.sqrt(height * width)
            for ky, kx in points
        ]
    )


@pytest.mark.parametrize("shape", [(9, 8), (8, 11)])
@pytest.mark.parametrize("tolerance", [TRAINING, EVALUATION, 1e-11])
def test_it_is_the_sum_over_pixels(shape: tuple[int, int], tolerance: float) -> None:
    points = _points(40)
    image = _complex(*shape)
    expected = _by_definition(points, image.numpy())
    error = Transform(points, shape, tolerance).forward(image).numpy() - expected
    assert np.linalg.norm(error) <= 2 * tolerance * np.linalg.norm(expected)


def test_images_in_32_bits_keep_the_tolerance() -> None:
    """2 pi k in 32 bits would be off by 1e-5 for a wave of 128 periods: what is asked to be finer is done in 64."""
    points = _points(30)
    image = _complex(256, 4, dtype=torch.complex64)
    expected = _by_definition(points, image.numpy().astype(np.complex128))
    for tolerance in (TRAINING, EVALUATION):
        found = Transform(points, (256, 4), tolerance).forward(image)
        assert found.dtype == torch.complex64
        assert np.linalg.norm(found.numpy() - expected) <= 2 * tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", [(9, 8), (6, 7)])
def test_a_cartesian_trajectory_gives_the_numbers_of_the_centred_transform(shape: tuple[int, int]) -> None:
    ky, kx = np.meshgrid(*((np.arange(n) - n // 2) / n for n in shape), indexing="ij")
    transform = Transform(np.stack([ky.ravel(), kx.ravel()], 1), shape, 1e-11)
    x = _complex(2, *shape)
    torch.testing.assert_close(transform.forward(x), fft2c(x).reshape(2, -1), rtol=0, atol=1e-10)
    torch.testing.assert_close(transform.adjoint(x.reshape(2, -1)), ifft2c(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("tolerance", [TRAINING, EVALUATION])
def test_the_adjoint_is_exact_whatever_the_tolerance(tolerance: float) -> None:
    transform = Transform(_points(300), (32, 27), tolerance)
    x, y = _complex(32, 27, dtype=torch.complex64), _complex(300, seed=1, dtype=torch.complex64)
    there, back = transform.forward(x), transform.adjoint(y)
    difference = torch.vdot(y, there) - torch.vdot(back.ravel(), x.ravel())
    assert difference.abs() <= 1e-6 * there.norm() * y.norm()


def test_derivatives_of_any_order_are_the_other_of_the_pair() -> None:
    transform = Transform(_points(7), (4, 5), TRAINING)
    x, y = _complex(2, 4, 5).requires_grad_(), _complex(2, 7).requires_grad_()
    for function, argument in ((transform.forward, x), (transform.adjoint, y)):
        assert torch.autograd.gradcheck(function, argument, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, argument, fast_mode=True)


def test_the_bits_depend_neither_on_threads_nor_on_what_else_is_in_the_batch() -> None:
    transform = Transform(_points(500), (24, 20), TRAINING)
    x, y = _complex(2, 3, 24, 20, dtype=torch.complex64), _complex(2, 3, 500, dtype=torch.complex64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            results.append((transform.forward(x), transform.adjoint(y)))
    finally:
        torch.set_num_threads(before)
    for there, back in results[1:]:
        assert torch.equal(there, results[0][0])
        assert torch.equal(back, results[0][1])
    anew = Transform(_points(500), (24, 20), TRAINING)
    assert torch.equal(anew.forward(x[1, 2]), results[0][0][1, 2])
    assert torch.equal(anew.adjoint(y[0, 1]), results[0][1][0, 1])


def test_views_are_taken_as_what_they_show() -> None:
    transform = Transform(_points(9), (5, 5), EVALUATION)
    x = _complex(2, 5, 5)
    for view in (x.conj(), x.mT, x[:1].expand(2, 5, 5)):
        assert torch.equal(transform.forward(view), transform.forward(view.resolve_conj().contiguous()))


def test_points_are_set_once_for_a_trajectory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plan = Transform._plan
    monkeypatch.setattr(Transform, "_plan", lambda self, double: made.append(double) or plan(self, double))
    points = torch.from_numpy(_points(20, seed=9))
    for _ in range(3):
        transform = transform_of(points.clone(), (6, 6), TRAINING)
        transform.adjoint(transform.forward(_complex(4, 6, 6)))
    assert made == [True]
    assert transform_of(points, (6, 6), EVALUATION) is not transform
    assert transform_of(points + 0.001, (6, 6), TRAINING) is not transform


def test_a_device_without_numbers_gets_shapes() -> None:
    transform = Transform(_points(11), (4, 6), TRAINING)
    x = torch.empty(2, 3, 4, 6, dtype=torch.complex64, device="meta", requires_grad=True)
    there = transform.forward(x)
    assert (there.shape, there.device.type, there.dtype) == ((2, 3, 11), "meta", torch.complex64)
    (gradient,) = torch.autograd.grad(there.real.sum(), x)
    assert gradient.shape == x.shape


@pytest.mark.parametrize(
    ("points", "fix"),
    [
        (np.zeros((4, 3)), "samples, 2"),
        (np.zeros((0, 2)), "samples, 2"),
        (np.full((4, 2), 12.0), "divide numbers of the grid"),
        (np.full((4, 2), np.nan), "cycles per pixel"),
    ],
)
def test_what_is_no_trajectory_is_refused(points: np.ndarray, fix: str) -> None:
    with pytest.raises(GeometryError, match=fix):
        Transform(points, (4, 4), TRAINING)


def test_images_that_do_not_fit_are_refused() -> None:
    transform = Transform(_points(4), (4, 5), TRAINING)
    for wrong in (_complex(5, 4), _complex(4, 5).real):
        with pytest.raises(GeometryError, match="complex"):
            transform.forward(wrong)
    with pytest.raises(GeometryError):
        transform.adjoint(_complex(3))


def test_a_package_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "finufft", None)
    monkeypatch.setitem(sys.modules, "cufinufft", None)
    with pytest.raises(MissingExtra, match=r"pip install 'wardround\[nufft\]'"):
        Transform(_points(4), (4, 4), TRAINING).forward(_complex(4, 4))
    with pytest.raises(StudyError, match="pip install cufinufft"):
        nufft.cufinufft()
