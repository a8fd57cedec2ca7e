"""The law of the adjoint: every operator goes through every test here. Adding one is one line in OPERATORS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from tests.examples import examples
from wardround.imaging.acquisition.ct.operator import CTProjector
from wardround.imaging.acquisition.ct.phantom import HEAD, ellipse_image, ellipse_sinogram
from wardround.imaging.acquisition.ct.system import CTSystem
from wardround.imaging.acquisition.mri.noncartesian import NonCartesianMRI
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.operator import LinearOperator
from wardround.imaging.acquisition.wrapped import Prompted, RealImage, Weighted
from wardround.study.ct import CTAcquisition, CTGeometry

# (batch, channels, height, width, seed, dtype of the images) -> an operator for that batch
Factory = Callable[[int, int, int, int, int, torch.dtype], LinearOperator]
Kind = Literal["parallel", "fan_flat", "fan_arc"]
Model = Literal["joseph", "strip"]
Storage = Literal["stored", "on_the_fly"]


def _cartesian(mask_shape: Callable[[int, int, int], tuple[int, ...]]) -> Factory:
    def build(batch: int, coils: int, height: int, width: int, seed: int, dtype: torch.dtype) -> LinearOperator:
        random = torch.Generator().manual_seed(seed)
        maps = torch.randn(batch, coils, height, width, generator=random, dtype=dtype.to_complex())
        mask = (torch.rand(mask_shape(batch, height, width), generator=random) < 0.5).to(dtype.to_real())
        return CartesianMRI(maps, mask)

    return build


def _weighted(batch: int, coils: int, height: int, width: int, seed: int, dtype: torch.dtype) -> LinearOperator:
    random = torch.Generator().manual_seed(seed)
    maps = torch.randn(1, coils, height, width, generator=random, dtype=dtype.to_complex())
    return CartesianMRI(maps, torch.rand(batch, height, width, generator=random, dtype=dtype.to_real()))


def _along(each: bool, weighted: bool) -> Factory:
    """Any points of k-space, one trajectory for all or one for each."""

    def build(batch: int, coils: int, height: int, width: int, seed: int, dtype: torch.dtype) -> LinearOperator:
        random = torch.Generator().manual_seed(seed)
        maps = torch.randn(batch, coils, height, width, generator=random, dtype=dtype.to_complex())
        points = torch.rand(batch if each else 1, 3 * coils + seed % 7, 2, generator=random, dtype=torch.float64) - 0.5
        weights = torch.rand(points.shape[:2], generator=random, dtype=torch.float64)
        return NonCartesianMRI(maps, points, weights if weighted else None, tolerance=1e-12)

    return build


def _real(build: Factory) -> Factory:
    return lambda b, c, h, w, seed, dtype: RealImage(build(b, c, h, w, seed, dtype.to_complex()))


def _ct(kind: Kind, model: Model, storage: Storage = "stored", *, square: bool = False) -> Factory:
    def build(batch: int, channels: int, height: int, width: int, seed: int, dtype: torch.dtype) -> LinearOperator:
        distances = {} if kind == "parallel" else {"source_distance": 60.0, "detector_distance": 30.0 + seed}
        geometry = CTGeometry(
            kind=kind,
            size=(height, height if square else width),
            views=4 * channels if square else 2 * channels + 1,
            start=seed,
            bins=25,
            bin=2.0 if kind == "parallel" else 3.0 + seed / 20,
            offset=(seed % 5) / 4,
            **distances,
        )
        return CTProjector(geometry, model=model, storage=storage)

    return build


def _by_trust(build: Factory) -> Factory:
    def weighted(b: int, c: int, h: int, w: int, seed: int, dtype: torch.dtype) -> LinearOperator:
        operator = build(b, c, h, w, seed, dtype)
        random = torch.Generator().manual_seed(seed)
        return Weighted(operator, torch.rand(b, *operator.data_shape, generator=random, dtype=dtype.to_real()))

    return weighted


# name, factory, whether images are complex
OPERATORS: list[tuple[str, Factory, bool]] = [
    ("cartesian, lines", _cartesian(lambda b, h, w: (w,)), True),
    ("cartesian, lines of each scan", _cartesian(lambda b, h, w: (b, 1, w)), True),
    ("cartesian, points of each scan", _cartesian(lambda b, h, w: (b, h, w)), True),
    ("cartesian, points", _cartesian(lambda b, h, w: (h, w)), True),
    ("cartesian, weights, shared maps", _weighted, True),
    ("cartesian, lines, real images", _real(_cartesian(lambda b, h, w: (w,))), False),
    ("along a trajectory", _along(each=False, weighted=False), True),
    ("along a trajectory of each scan, weights", _along(each=True, weighted=True), True),
    ("ct, parallel, joseph", _ct("parallel", "joseph"), False),
    ("ct, parallel, strip, symmetric", _ct("parallel", "strip", square=True), False),
    ("ct, flat fan, joseph", _ct("fan_flat", "joseph"), False),
    ("ct, flat fan, strip, on the fly", _ct("fan_flat", "strip", "on_the_fly"), False),
    ("ct, curved fan, joseph, symmetric", _ct("fan_arc", "joseph", square=True), False),
    ("ct, curved fan, strip", _ct("fan_arc", "strip"), False),
    ("ct, flat fan, weighted rays", _by_trust(_ct("fan_flat", "joseph")), False),
]

every_operator = pytest.mark.parametrize(
    ("build", "is_complex"), [case[1:] for case in OPERATORS], ids=[case[0] for case in OPERATORS]
)
sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 17), st.integers(2, 17), st.integers(0, 99))
few = hypothesis_settings(max_examples=examples(25), deadline=None)


def _draw(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=dtype)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.sum(a * b.conj())


def _image_dtype(is_complex: bool, real: torch.dtype) -> torch.dtype:
    return real.to_complex() if is_complex else real


def _case(
    build: Factory, is_complex: bool, size: tuple[int, ...], real: torch.dtype
) -> tuple[LinearOperator, Tensor, Tensor]:
    batch, channels, height, width, seed = size
    dtype = _image_dtype(is_complex, real)
    operator = build(batch, channels, height, width, seed, dtype)
    x = _draw((batch, *operator.image_shape), seed, dtype)
    y = _draw((batch, *operator.data_shape), seed + 1, operator.A(x).dtype)
    return operator, x, y


@every_operator
@few
@given(size=sizes)
def test_adjoint_is_exact(build: Factory, is_complex: bool, size: tuple[int, ...]) -> None:
    operator, x, y = _case(build, is_complex, size, torch.float32)
    measured = operator.A(x)
    difference = _inner(measured, y) - _inner(x, operator.A_adjoint(y))
    # Over real images the inner product of data is its real part.
    difference = difference.abs() if is_complex else difference.real.abs()
    assert difference <= 1e-5 * measured.norm() * y.norm()


@every_operator
@few
@given(size=sizes)
def test_linear(build: Factory, is_complex: bool, size: tuple[int, ...]) -> None:
    operator, x, y = _case(build, is_complex, size, torch.float64)
    other = _draw(x.shape, size[-1] + 7, x.dtype)
    factor = 1.7 - 0.3j if is_complex else 1.7
    torch.testing.assert_close(
        operator.A(factor * x + other), factor * operator.A(x) + operator.A(other), rtol=1e-9, atol=1e-9
    )
    back = _draw(y.shape, size[-1] + 8, y.dtype)
    torch.testing.assert_close(
        operator.A_adjoint(factor * y + back),
        factor * operator.A_adjoint(y) + operator.A_adjoint(back),
        rtol=1e-9,
        atol=1e-9,
    )


@every_operator
@few
@given(size=sizes)
def test_normal_is_adjoint_after_forward(build: Factory, is_complex: bool, size: tuple[int, ...]) -> None:
    operator, x, _ = _case(build, is_complex, size, torch.float64)
    torch.testing.assert_close(operator.normal(x), operator.A_adjoint(operator.A(x)), rtol=1e-9, atol=1e-9)


@every_operator
@few
@given(size=sizes)
def test_shapes_and_dtypes_follow_the_input(build: Factory, is_complex: bool, size: tuple[int, ...]) -> None:
    operator, x, y = _case(build, is_complex, size, torch.float32)
    assert operator.A(x).shape == y.shape
    assert operator.A_adjoint(y).shape == x.shape
    assert operator.A(x).dtype == y.dtype
    assert {operator.A_adjoint(y).dtype, operator.normal(x).dtype} == {x.dtype}


@every_operator
@few
@given(size=sizes)
def test_solve_solves(build: Factory, is_complex: bool, size: tuple[int, ...]) -> None:
    operator, x, _ = _case(build, is_complex, size, torch.float64)
    weight = 0.1 * float(operator.norm(x).max()) ** 2 + 0.1
    solution = operator.solve(x, weight, iterations=100, start=0.5 * x, tolerance=1e-10)
    residual = operator.normal(solution) + weight * solution - x
    assert residual.norm() <= 1e-9 * x.norm()


@every_operator
def test_solve_stops_each_item_alone_and_never_divides_by_zero(build: Factory, is_complex: bool) -> None:
    operator, x, _ = _case(build, is_complex, (3, 2, 8, 9, 0), torch.float32)
    easy = torch.cat([x[:2], torch.zeros_like(x[2:])])
    easy.requires_grad_()
    solution = operator.solve(easy, 1.0, iterations=200)
    assert solution[2].abs().max() == 0
    residual = operator.normal(solution) + solution - easy
    assert residual.norm() <= 1e-4 * easy.norm()
    solution.abs().square().sum().backward()
    assert easy.grad is not None
    assert easy.grad.isfinite().all()


@every_operator
def test_norm_is_the_largest_singular_value_or_above(build: Factory, is_complex: bool) -> None:
    operator, x, _ = _case(build, is_complex, (2, 2, 6, 5, 1), torch.float64)
    norm = operator.norm(x, iterations=200)
    assert norm.shape == (2,)
    estimate = LinearOperator.norm(operator, x, iterations=200)
    assert (norm >= 0.999 * estimate).all()
    for _ in range(20):
        x = operator.normal(x)
        assert (operator.A(x).flatten(1).norm(dim=1) <= 1.001 * norm * x.flatten(1).norm(dim=1)).all()
        x = x / x.norm()


def _needing_gradients(build: Factory, is_complex: bool) -> tuple[LinearOperator, Tensor, Tensor]:
    operator, x, y = _case(build, is_complex, (2, 2, 4, 3, 2), torch.float64)
    return operator, x.requires_grad_(), y.requires_grad_()


@every_operator
def test_gradients_are_exact(build: Factory, is_complex: bool) -> None:
    operator, x, y = _needing_gradients(build, is_complex)
    # Against random directions; one number at a time below.
    assert torch.autograd.gradcheck(operator.A, x, fast_mode=True)
    assert torch.autograd.gradcheck(operator.A_adjoint, y, fast_mode=True)
    assert torch.autograd.gradcheck(operator.normal, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(operator.normal, x, fast_mode=True)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: operator.solve(x, w, iterations=3), (x, weight), fast_mode=True)


@pytest.mark.slow
@every_operator
def test_gradients_are_exact_in_every_number(build: Factory, is_complex: bool) -> None:
    operator, x, y = _needing_gradients(build, is_complex)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(operator.A, x)
    assert torch.autograd.gradcheck(operator.A_adjoint, y)
    assert torch.autograd.gradcheck(operator.normal, x)
    assert torch.autograd.gradgradcheck(operator.normal, x)
    assert torch.autograd.gradcheck(lambda x, w: operator.solve(x, w, iterations=3), (x, weight))
    start = _draw(x.shape, 5, x.dtype).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, s: operator.solve(x, 0.7, iterations=3, start=s), (x, start))


@pytest.mark.parametrize("wrapper", ["prompted", "real", "weighted"])
def test_a_wrapped_operator_keeps_what_it_does_not_change(wrapper: str) -> None:
    geometry = CTGeometry(
        size=(12, 12), pixel=9.0, views=8, bins=31, bin=9.0, source_distance=595, detector_distance=490
    )
    system = CTSystem(CTAcquisition(geometry=geometry, photons=1e3))
    prompted = Prompted(system, torch.ones(1, 1, 3))
    y = system.A(torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(0)))
    weights = torch.linspace(0.25, 1.0, y.numel()).reshape(y.shape)
    operators = {"prompted": prompted, "real": RealImage(prompted), "weighted": Weighted(prompted, weights)}
    operator, root = operators[wrapper], weights.sqrt() if wrapper == "weighted" else torch.tensor(1.0)
    assert operator.protocol is not None
    assert torch.equal(operator.protocol, system.protocol)
    assert operator.prompt is prompted.prompt
    torch.testing.assert_close(operator.initial(root * y), system.initial(y))
    # The variance of data that were multiplied by a root is multiplied by its square.
    torch.testing.assert_close(operator.uncertainty(root * y), root**2 * system.uncertainty(y))


# `A` against what is known in closed form, one test an acquisition.


@pytest.mark.parametrize("shape", [(32, 32), (33, 31), (32, 33)])
def test_cartesian_of_a_gaussian(shape: tuple[int, int]) -> None:
    """exp(-r^2 / 2 s^2) centred at (a, b) becomes 2 pi s^2 exp(-2 pi^2 s^2 f^2) e^{-2 pi i f.(a, b)} / sqrt(HW)."""
    height, width = shape
    s, a, b = 2.0, 1.5, -2.0
    y = (torch.arange(height) - height // 2).double()[:, None]
    x = (torch.arange(width) - width // 2).double()[None, :]
    image = torch.exp(-((y - a) ** 2 + (x - b) ** 2) / (2 * s**2)).to(torch.complex128)
    gains = torch.tensor([1.0, 0.5j], dtype=torch.complex128)
    operator = CartesianMRI(gains.reshape(1, 2, 1, 1).expand(1, 2, height, width), torch.ones(width).double())
    fy, fx = y / height, x / width
    spectrum = 2 * torch.pi * s**2 * torch.exp(-2 * torch.pi**2 * s**2 * (fy**2 + fx**2))
    expected = spectrum * torch.exp(-2j * torch.pi * (fy * a + fx * b)) / (height * width) ** 0.5
    measured = operator.A(image[None])[0]
    torch.testing.assert_close(measured[0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(measured[1], 0.5j * expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8), (7, 9), (8, 5)])
def test_cartesian_of_a_point_with_a_mask(shape: tuple[int, int]) -> None:
    """A point at the centre has constant k-space 1 / sqrt(HW), measured where the mask says, and nowhere else."""
    height, width = shape
    image = torch.zeros(1, height, width, dtype=torch.complex128)
    image[0, height // 2, width // 2] = 1
    mask = torch.zeros(width).double()
    mask[[0, width // 2]] = 1
    operator = CartesianMRI(torch.ones(1, 1, height, width, dtype=torch.complex128), mask)
    expected = (mask / (height * width) ** 0.5).expand(1, 1, height, width).to(torch.complex128)
    torch.testing.assert_close(operator.A(image), expected)


@pytest.mark.parametrize("shape", [(32, 33), (33, 30)])
def test_along_a_trajectory_of_a_gaussian(shape: tuple[int, int]) -> None:
    """The same spectrum as above, at any points: exp(-2 pi^2 s^2 k^2) e^{-2 pi i k.(a, b)} 2 pi s^2 / sqrt(HW)."""
    height, width = shape
    s, a, b = 2.0, 1.5, -2.0
    y = (torch.arange(height) - height // 2).double()[:, None]
    x = (torch.arange(width) - width // 2).double()[None, :]
    image = torch.exp(-((y - a) ** 2 + (x - b) ** 2) / (2 * s**2)).to(torch.complex128)
    points = torch.rand(1, 200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    operator = NonCartesianMRI(torch.ones(1, 1, height, width, dtype=torch.complex128), points, tolerance=1e-9)
    ky, kx = points[0].T
    spectrum = 2 * torch.pi * s**2 * torch.exp(-2 * torch.pi**2 * s**2 * (ky**2 + kx**2))
    expected = spectrum * torch.exp(-2j * torch.pi * (ky * a + kx * b)) / (height * width) ** 0.5
    torch.testing.assert_close(operator.A(image[None])[0, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", ["joseph", "strip"])
@pytest.mark.parametrize("kind", ["parallel", "fan_flat", "fan_arc"])
def test_ct_of_ellipses(kind: Kind, model: Model) -> None:
    """Chords through ellipses, averaged over bins, up to what pixels of 2 mm leave of their edges."""
    distances = {} if kind == "parallel" else {"source_distance": 595.0, "detector_distance": 490.6}
    wide = 1.0 if kind == "parallel" else 2.0
    geometry = CTGeometry(kind=kind, size=(128, 128), pixel=2.0, views=60, bins=277, bin=wide, offset=0.25, **distances)
    image = torch.from_numpy(ellipse_image(HEAD, geometry))
    expected = torch.from_numpy(ellipse_sinogram(HEAD, geometry, rays_per_bin=4))
    error = CTProjector(geometry, model=model).A(image[None])[0] - expected
    assert error.norm() <= 0.006 * expected.norm()
    assert abs(error.sum()) <= 0.0005 * expected.sum()
