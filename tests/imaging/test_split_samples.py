"""Measured samples split in two: what the network sees and what its image is measured against."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.coils import calibration_region, low_resolution_maps
from wardround.imaging.acquisition.mri.masks import centred, sampling_mask
from wardround.imaging.acquisition.mri.split import (
    held_out_samples,
    kspace_loss,
    of_lines,
    outside_centre,
    unseen_share,
)
from wardround.study import Mask
from wardround.study.supervision import Supervision

FAMILIES = ("random", "equispaced", "poisson")
hows = st.builds(
    Supervision,
    kind=st.just("split"),
    share=st.floats(0.05, 0.95),
    density=st.sampled_from(["gaussian", "uniform"]),
)


def drawn_mask(family: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    mask = Mask.model_validate({"family": family, "acceleration": 3, "calibration": 0.12})
    return sampling_mask(mask, shape, np.random.default_rng(seed))


@given(
    family=st.sampled_from(FAMILIES),
    shape=st.tuples(st.integers(16, 33), st.integers(16, 33)),
    how=hows,
    seed=st.integers(0, 2**32 - 1),
)
def test_the_two_parts_are_apart_together_what_was_measured_and_leave_the_centre(
    family: str, shape: tuple[int, int], how: Supervision, seed: int
) -> None:
    mask = drawn_mask(family, shape, seed)
    held = held_out_samples(mask, how, np.random.default_rng(seed))
    assert held.dtype == np.float32
    assert set(np.unique(held)) <= {0.0, 1.0}
    # Of what was measured alone: what is left, Theta, and what is held out are disjoint and make the whole.
    theta = mask - held
    assert set(np.unique(theta)) <= {0.0, 1.0}
    centre = tuple(centred(n, size) for n, size in zip(calibration_region(mask), shape, strict=True))
    assert not held[centre].any()
    outside = int(mask.sum() - mask[centre].sum())
    assert held.sum() == max(1, round(how.share * outside))
    assert np.array_equal(held, held_out_samples(mask, how, np.random.default_rng(seed)))


@given(seed=st.integers(0, 2**32 - 1), how=hows)
def test_lines_are_held_out_whole(seed: int, how: Supervision) -> None:
    mask = drawn_mask("random", (17, 32), seed)
    assert of_lines(mask)
    how = how.model_copy(update={"held": "lines"})
    held = held_out_samples(mask, how, np.random.default_rng(seed))
    assert of_lines(held)
    outside = outside_centre(mask).any(0)
    assert held[0].sum() == max(1, round(how.share * outside.sum()))
    assert not held[:, ~outside].any()
    poisson = drawn_mask("poisson", (17, 32), seed)
    assert not of_lines(poisson)
    with pytest.raises(GeometryError, match="whole lines cannot be held out"):
        held_out_samples(poisson, how, np.random.default_rng(seed))


@pytest.mark.parametrize("family", FAMILIES)
def test_coil_maps_know_nothing_of_what_is_held_out(family: str) -> None:
    mask = drawn_mask(family, (24, 20), 5)
    random = np.random.default_rng(1)
    kspace = torch.from_numpy(random.standard_normal((1, 3, 24, 20, 2)) @ np.array([1, 1j])) * torch.from_numpy(mask)
    held = held_out_samples(mask, Supervision(kind="split", share=0.7), np.random.default_rng(2))
    seen = torch.from_numpy(mask - held)
    of_all = low_resolution_maps(kspace, torch.from_numpy(mask)[None])
    assert torch.equal(low_resolution_maps(kspace * seen, seen[None]), of_all)


@pytest.mark.parametrize(
    ("density", "odds"),
    # Columns 1 and 8 of 9 (4 and 3 beside the centre; a deviation is a quarter of 9 - 1 = 8, so 2): exp(-4^2 / 8) to
    # exp(-3^2 / 8) is 1 to exp(7 / 8).
    [("uniform", 0.5), ("gaussian", 1.0 / (1.0 + math.exp(7.0 / 8.0)))],
)
def test_samples_are_drawn_by_their_density(density: str, odds: float) -> None:
    mask = np.zeros((1, 9), np.float32)
    mask[0, [0, 4, 7]] = 1
    how = Supervision.model_validate({"kind": "split", "share": 0.5, "density": density})
    random, draws = np.random.default_rng(3), 800
    count = sum(held_out_samples(mask, how, random)[0, 0] for _ in range(draws))
    # Four standard deviations of a binomial.
    assert abs(count / draws - odds) < 4.0 * math.sqrt(odds * (1.0 - odds) / draws)


def test_a_scan_of_its_centre_alone_cannot_be_split() -> None:
    with pytest.raises(GeometryError, match="lower `calibration`"):
        held_out_samples(np.ones((6, 6), np.float32), Supervision(kind="split"), np.random.default_rng(0))


def test_the_loss_is_the_sum_of_both_ratios() -> None:
    random = np.random.default_rng(0)
    parts = random.standard_normal((4, 3, 2, 4, 5))
    predicted, measured = parts[0] + 1j * parts[1], parts[2] + 1j * parts[3]
    measured[:, :, 1] = predicted[:, :, 1] = 0.0
    found = kspace_loss(torch.from_numpy(predicted), torch.from_numpy(measured))
    for item in range(3):
        squares = absolutes = all_squares = all_absolutes = 0.0
        for u, y in zip(predicted[item].ravel().tolist(), measured[item].ravel().tolist(), strict=True):
            squares += abs(y - u) ** 2
            absolutes += abs(y - u)
            all_squares += abs(y) ** 2
            all_absolutes += abs(y)
        expected = math.sqrt(squares) / math.sqrt(all_squares) + absolutes / all_absolutes
        assert float(found[item]) == pytest.approx(expected, rel=1e-12)
    nothing = torch.zeros(3, 2, 4, 5, dtype=torch.complex128)
    assert kspace_loss(nothing, torch.from_numpy(measured)).tolist() == pytest.approx([2.0] * 3)
    assert kspace_loss(torch.from_numpy(measured), torch.from_numpy(measured)).tolist() == [0.0] * 3


def test_the_gradient_of_the_loss_is_exact_and_finite_where_nothing_was_measured() -> None:
    random = torch.Generator().manual_seed(0)
    measured = torch.randn(2, 1, 2, 3, dtype=torch.complex128, generator=random)
    predicted = torch.randn(2, 1, 2, 3, dtype=torch.complex128, generator=random).requires_grad_()

    def loss(u: Tensor) -> Tensor:
        return kspace_loss(u, measured)

    assert torch.autograd.gradcheck(loss, (predicted,))
    zeros = torch.zeros(1, 1, 2, 2, dtype=torch.complex64, requires_grad=True)
    (gradient,) = torch.autograd.grad(kspace_loss(zeros, torch.zeros(1, 1, 2, 2, dtype=torch.complex64)).sum(), zeros)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_what_no_coil_sees_is_counted_by_its_share() -> None:
    # Two coils; of two pixels both coils see the first (0.36 + 0.64), and none the second.
    maps = torch.tensor([[[[0.6, 0.0]], [[0.8j, 0.0]]]], dtype=torch.complex128)
    image = torch.tensor([[[3.0j, 4.0]]], dtype=torch.complex128, requires_grad=True)
    share = unseen_share(image, maps)
    assert share.tolist() == pytest.approx([0.8])
    (gradient,) = torch.autograd.grad(share.sum(), image)
    # Towards 0 where nothing is seen, by the whole image's size; elsewhere nothing.
    assert gradient.flatten().tolist() == pytest.approx([0.0, 0.2])
    assert unseen_share(torch.zeros_like(image), maps).tolist() == [0.0]
    # Half seen: w^2 is 1 - 0.25.
    assert unseen_share(image[..., 1:], torch.full((1, 1, 1, 1), 0.5 + 0j)).tolist() == pytest.approx([0.75**0.5])
