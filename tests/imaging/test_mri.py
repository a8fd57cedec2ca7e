"""Cartesian MRI beyond the laws: the transform's definition, its shortcuts and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.coils import birdcage_maps
from wardround.imaging.acquisition.mri.masks import equispaced_lines
from wardround.imaging.acquisition.mri.operator import CartesianMRI, fft2c, ifft2c


def _complex(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _dft(size: int) -> Tensor:
    """Centred orthonormal transform as a matrix: exp(-2 pi i k n / N) / sqrt(N), k and n from -N // 2."""
    index = torch.arange(size, dtype=torch.float64) - size // 2
    return torch.polar(torch.full((size, size), size**-0.5).double(), -2 * torch.pi * torch.outer(index, index) / size)


@pytest.mark.parametrize("shape", [(8, 6), (7, 9), (6, 5), (1, 4)])
def test_the_transform_is_the_centred_orthonormal_one(shape: tuple[int, int]) -> None:
    x = _complex(2, *shape)
    expected = _dft(shape[0]) @ x @ _dft(shape[1])
    torch.testing.assert_close(fft2c(x), expected)
    torch.testing.assert_close(ifft2c(expected), x)
    torch.testing.assert_close(fft2c(x).norm(), x.norm())


def test_normal_is_the_same_whether_lines_come_as_a_row_or_as_an_image() -> None:
    """Found to be lines, a full mask takes the fast way of a row; as points it takes the transform of both axes."""
    maps = _complex(2, 3, 9, 8)
    line = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 1]).double()
    x = _complex(2, 9, 8, seed=1)
    row = CartesianMRI(maps, line).normal(x)
    image = CartesianMRI(maps, line.expand(9, 8)).normal(x)
    points = line.expand(2, 9, 8).clone()
    points[1, 0, 1] = 1
    torch.testing.assert_close(row, image, rtol=0, atol=0)
    torch.testing.assert_close(CartesianMRI(maps, points).normal(x)[0], row[0])


@pytest.mark.parametrize("shared", [True, False])
def test_a_large_batch_is_the_same_as_its_slices_alone(shared: bool) -> None:
    """Large enough that `normal` works through it in parts."""
    batch = 5
    maps = _complex(1 if shared else batch, 8, 96, 128, dtype=torch.complex64)
    mask = (torch.rand(batch, 96, 128, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    x = _complex(batch, 96, 128, seed=3, dtype=torch.complex64)
    together = CartesianMRI(maps, mask).normal(x)
    for i in range(batch):
        own = maps if shared else maps[i : i + 1]
        torch.testing.assert_close(together[i], CartesianMRI(own, mask[i : i + 1]).normal(x[i : i + 1])[0])


def test_maps_and_mask_can_be_learned() -> None:
    maps = _complex(1, 2, 4, 3).requires_grad_()
    mask = torch.tensor([1.0, 0.5, 0.25]).double().requires_grad_()
    x = _complex(1, 4, 3, seed=4)
    assert torch.autograd.gradcheck(lambda s, m: CartesianMRI(s, m).normal(x), (maps, mask))


def test_solving_takes_conjugated_and_transposed_views() -> None:
    operator = CartesianMRI(_complex(2, 3, 6, 6), torch.tensor([1.0, 0, 1, 1, 1, 0]).double())
    rhs = _complex(2, 6, 6, seed=5)
    for view in (rhs.conj(), rhs.mT, rhs[:1].expand(2, 6, 6)):
        plain = view.resolve_conj().contiguous()
        solution = operator.solve(view, 0.5, iterations=5, start=view)
        torch.testing.assert_close(solution, operator.solve(plain, 0.5, iterations=5, start=plain))


def test_double_precision_data_keep_their_precision() -> None:
    operator = CartesianMRI(_complex(1, 2, 6, 5), torch.ones(5).double())
    x = _complex(1, 6, 5, seed=6)
    weighted = operator.maps.abs().square().sum(1) * x
    torch.testing.assert_close(operator.normal(x), weighted, rtol=1e-12, atol=1e-12)


def test_undersampling_by_two_folds_the_image() -> None:
    """Every second line of one coil: the image and its copy half a field of view away, half as strong each."""
    x = _complex(1, 4, 8)
    mask = torch.zeros(8).double()
    mask[::2] = 1
    folded = CartesianMRI(torch.ones(1, 1, 4, 8, dtype=torch.complex128), mask).normal(x)
    torch.testing.assert_close(folded, (x + x.roll(4, -1)) / 2)


def test_several_coils_unfold_it() -> None:
    maps = torch.from_numpy(birdcage_maps(6, (16, 16))).to(torch.complex128)[None]
    mask = torch.zeros(16).double()
    mask[::2] = 1
    operator = CartesianMRI(maps, mask)
    x = _complex(1, 16, 16)
    torch.testing.assert_close(operator.solve(operator.normal(x), 0.0, iterations=200, tolerance=1e-12), x)


@pytest.mark.parametrize(
    ("maps", "mask", "fix"),
    [
        (torch.ones(2, 4, 4, dtype=torch.complex64), torch.ones(4), "maps\\[None\\]"),
        (torch.ones(1, 2, 4, 4), torch.ones(4), "complex"),
        (torch.ones(1, 2, 4, 4, dtype=torch.complex64), torch.ones(4, dtype=torch.bool), "mask.float"),
        (torch.ones(1, 2, 4, 4, dtype=torch.complex64), torch.ones(5), "broadcast"),
        (torch.ones(3, 2, 4, 4, dtype=torch.complex64), torch.ones(2, 4, 4), "broadcast"),
        (torch.ones(1, 2, 4, 4, dtype=torch.complex64), torch.ones(1, 1, 4, 4), "broadcast"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_fix(maps: Tensor, mask: Tensor, fix: str) -> None:
    with pytest.raises(GeometryError, match=fix):
        CartesianMRI(maps, mask)


def test_maps_of_coils_that_reach_into_the_image_still_sum_to_one() -> None:
    for radius in (1.01, 1.2, 1.4):
        maps = birdcage_maps(4, (33, 32), radius, angles=np.pi / 4 + np.pi / 2 * np.arange(4))
        np.testing.assert_allclose((np.abs(maps) ** 2).sum(0), 1, rtol=1e-5)


def test_equispaced_lines_stay_on_the_axis_at_the_last_offset() -> None:
    class LastOffset:
        def random(self) -> float:
            return 1 - 2**-53

    line = equispaced_lines(16, 8, 2, LastOffset())  # type: ignore[arg-type]
    assert 7 <= line.sum() <= 8
