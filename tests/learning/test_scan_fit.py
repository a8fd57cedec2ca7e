"""A network fitted to one scan: three parts of its samples that share none, and the step whose values are used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.raw_files import transformed
from wardround.errors import GeometryError, StudyError
from wardround.imaging.acquisition.mri.coils import calibration_region
from wardround.imaging.acquisition.mri.masks import centred
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.learning.scan_fit import MOST_STEPS, SliceInThree, fit_to_scan
from wardround.models.build import build_model
from wardround.study.load import load_study
from wardround.study.supervision import Supervision
from wardround.tasks.mri import MRIBatch

ROWS, COLUMNS = 16, 20
CENTRE = slice(8, 12)
HOW = Supervision(kind="split")


def _random(seed: int = 3) -> np.random.Generator:
    return np.random.default_rng(seed)


def _operator(columns: tuple[int, ...] = (0, 3, 6, 8, 9, 10, 11, 14, 15, 17, 19)) -> CartesianMRI:
    """Two coils, which see half of the square of a pixel in the first column, and all elsewhere."""
    drawn = torch.randn(1, 2, ROWS, COLUMNS, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    maps = drawn / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
    maps[..., 0] *= 0.5**0.5
    mask = torch.zeros(1, ROWS, COLUMNS)
    mask[..., list(columns)] = 1
    return CartesianMRI(maps, mask)


def _image(seed: int = 1) -> Tensor:
    return torch.randn(1, ROWS, COLUMNS, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


def _slice(seed: int = 1) -> MRIBatch:
    operator = _operator()
    return MRIBatch.measured(operator, operator.A(_image(seed)))


class Scaled(nn.Module):
    """The zero-filled image times one value; remembers what it was given."""

    def __init__(self, scale: float = 1.5) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.given: list[tuple[Tensor, Tensor]] = []

    def forward(self, operator: CartesianMRI, data: Tensor) -> Tensor:
        self.given.append((operator.mask.clone(), data.clone()))
        return self.scale * operator.A_adjoint(data)


class Known(nn.Module):
    """One image whatever was measured, times a value that is trained and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("image", _image())
        self.scale = nn.Parameter(torch.ones(()))
        self.fixed = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, operator: CartesianMRI, data: Tensor) -> Tensor:
        return self.scale * self.fixed * self.image  # type: ignore[operator]


def test_the_three_parts_share_nothing_and_the_loss_is_of_the_second_alone() -> None:
    slice_, network = _slice(), Scaled()
    part = SliceInThree.of(slice_, HOW, _random())
    loss = part.loss(network, _random(4))
    ((theta, data),) = network.given
    omega, gamma = slice_.mask, part.apart.held
    lambda_ = omega - theta - gamma
    for one in (theta, lambda_, gamma):
        assert set(one.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(data, slice_.kspace * theta[:, None])
    # The centre is 4 columns of all rows; of the other 7 lines a fifth is set apart, and two fifths of the rest drawn.
    assert calibration_region(omega[0].numpy()) == (ROWS, 4)
    assert centred(4, COLUMNS) == CENTRE
    assert bool(theta[0, :, CENTRE].all())
    assert gamma.sum() == 1 * ROWS
    assert lambda_.sum() == 2 * ROWS
    assert all(bool((one == one[:, :1]).all()) for one in (theta, lambda_, gamma))
    # By numpy in double precision: x of Theta, what it predicts of Lambda, and what no coil sees of it.
    maps = slice_.maps[0].numpy().astype(np.complex128)
    kept = np.fft.ifftshift(data[0].numpy().astype(np.complex128), axes=(-2, -1))
    coils = np.fft.fftshift(np.fft.ifft2(kept, norm="ortho"), axes=(-2, -1))
    x = 1.5 * (maps.conj() * coils).sum(0)
    predicted = transformed(maps * x)
    asked = lambda_[0].numpy() > 0
    y, u = slice_.kspace[0].numpy()[:, asked], predicted[:, asked]
    fit = np.linalg.norm(y - u) / np.linalg.norm(y) + np.abs(y - u).sum() / np.abs(y).sum()
    dark = np.zeros((ROWS, COLUMNS))
    dark[:, 0] = 0.5
    unseen = np.sqrt((dark * np.abs(x) ** 2).sum() / (np.abs(x) ** 2).sum())
    assert unseen > 0.01
    y, u = (values[..., CENTRE] for values in (slice_.kspace[0].numpy(), predicted))
    bright = np.linalg.norm(y - u) / np.linalg.norm(y)
    assert loss.item() == pytest.approx(fit + unseen + bright, rel=1e-4)
    # The error of Gamma is half of such a loss, of an image of all others.
    error = part.error(network)
    assert torch.equal(network.given[1][0], omega - gamma)
    predicted = _operator().maps * (1.5 * CartesianMRI(slice_.maps, omega - gamma).A_adjoint(slice_.kspace))[:, None]
    asked = gamma[0].numpy() > 0
    y, u = slice_.kspace[0].numpy()[:, asked], transformed(predicted[0].detach().numpy())[:, asked]
    assert error == pytest.approx(
        (np.linalg.norm(y - u) / np.linalg.norm(y) + np.abs(y - u).sum() / np.abs(y).sum()) / 2, rel=1e-4
    )


def test_samples_are_set_apart_one_by_one_where_a_scan_is_not_of_lines() -> None:
    operator = _operator()
    operator.mask[0, ::2, 19] = 0
    part = SliceInThree.of(MRIBatch.measured(operator, operator.A(_image())), HOW, _random())
    outside = 6 * ROWS + ROWS // 2
    assert part.apart.held.sum() == round(0.2 * outside)
    part.loss(network := Scaled(), _random())
    assert network.given[0][0].sum() == 4 * ROWS + outside - 21 - round(0.4 * (outside - 21))


def test_no_step_knows_what_was_set_apart() -> None:
    """Other data of Gamma: the same losses, gradients and values; another error."""
    slice_ = _slice()
    gamma = SliceInThree.of(slice_, HOW, _random()).apart.held
    other = replace(slice_, kspace=slice_.kspace + 5.0 * gamma[:, None])
    gradients, errors, values = [], [], []
    for one in (slice_, other):
        part, network = SliceInThree.of(one, HOW, _random()), Scaled(20.0)
        assert torch.equal(part.apart.held, gamma)
        (gradient,) = torch.autograd.grad(part.loss(network, _random(4)), network.scale)
        gradients.append(gradient)
        errors.append(part.error(network))
        # One step, whose values are used in both cases: from 20.0, less is better for both.
        fitted, done = fit_to_scan(Scaled(20.0), [one], HOW, 1, _random(), rate=0.01)
        assert done.kept == 1
        values.append(fitted.get_parameter("scale"))
    assert gradients[0] == gradients[1] != 0.0
    assert values[0] == values[1] != 20.0
    assert errors[0] != errors[1]


def test_a_fit_that_predicts_nothing_better_leaves_the_network_as_it_was() -> None:
    """What is learned from is twice the image, what is set apart the image itself, as the network has it at first."""
    slice_, network = _slice(), Known()
    gamma = SliceInThree.of(slice_, HOW, _random()).apart.held
    misleading = replace(slice_, kspace=slice_.kspace * (2.0 - gamma[:, None]))
    fitted, done = fit_to_scan(network, [misleading], HOW, MOST_STEPS, _random(), rate=0.01)
    assert fitted is network
    assert network.scale.item() == 1.0
    assert (done.kept, done.changed, done.label) == (0, False, "")
    assert done.before == done.after < 1e-6
    # Five times in a row without a better answer, every five steps.
    assert done.steps == 25
    assert "Adapted to this scan: no. None of 25 steps on 1 slice predicted" in done.said


def test_a_fit_that_predicts_better_takes_the_best_step_and_touches_what_trains_alone() -> None:
    slices, network = [replace(_slice(), kspace=2.0 * _slice().kspace) for _ in range(2)], Known()
    fitted, done = fit_to_scan(network, slices, HOW, 30, _random(), rate=0.04)
    assert network.scale.item() == network.fixed.item() == fitted.get_parameter("fixed").item() == 1.0
    # Adam's steps are at most of the size of its rate; the error of Gamma is |2 - scale| / 2.
    assert 1.0 < fitted.get_parameter("scale").item() < 2.5
    assert done.before == pytest.approx(0.5, abs=1e-4)
    assert done.after == pytest.approx(abs(2.0 - fitted.get_parameter("scale").item()) / 2, abs=1e-4)
    assert done.after < 0.1
    assert done.kept % 5 == 0
    assert done.to_json() == {
        "changed": True,
        "asked": 30,
        "steps": 30,
        "kept": done.kept,
        "slices": 2,
        "before": done.before,
        "after": done.after,
    }
    assert len(done.label) < 80
    assert f"30 steps on 2 slices, of which step {done.kept} is used" in done.said
    assert not fitted.training


class Broken(Known):
    """Not a number once its value has moved."""

    def forward(self, operator: CartesianMRI, data: Tensor) -> Tensor:
        found = super().forward(operator, data)
        return found if self.scale == 1.0 else found * torch.nan


def test_a_fit_that_leads_nowhere_ends_at_once() -> None:
    fitted, done = fit_to_scan(network := Broken(), [_slice(2)], HOW, 50, _random())
    assert fitted is network
    assert (done.steps, done.kept) == (5, 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["modl", "e2e_varnet", "swin_denoiser"])
def test_networks_are_fitted_with_the_same_bits_each_time_and_stay_as_they_were(kind: str) -> None:
    study: dict[str, Any] = {"name": "s", "sites": {"A": {}}, "acquisition": {"coils": 2}}
    model = load_study({**study, "model": {"kind": kind, "preset": "tiny"}}).model
    assert model.consistent
    torch.manual_seed(0)
    network = build_model(model).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = [fit_to_scan(network, [_slice()], HOW, 5, _random(seed), rate=0.01) for seed in (3, 3, 4)]
    states = [fitted.state_dict() for fitted, _ in found]
    assert found[0][1] == found[1][1]
    assert all(torch.equal(states[0][name], states[1][name]) for name in before)
    assert found[0][1].before != found[2][1].before
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(value.grad is None for value in network.parameters())


def test_too_few_samples_and_networks_that_do_not_train_are_refused() -> None:
    few = _operator((0, 3, 8, 9, 10, 11, 17))
    for message in ("3 lines", "47 samples"):
        with pytest.raises(GeometryError, match=f"{message} of a slice were measured outside its calibration centre"):
            fit_to_scan(Known(), [MRIBatch.measured(few, few.A(_image()))], HOW, 5, _random())
        few.mask[0, 0, 0] = 0
    full = _operator(tuple(range(COLUMNS)))
    with pytest.raises(GeometryError, match="the scan is fully sampled"):
        fit_to_scan(Known(), [MRIBatch.measured(full, full.A(_image()))], HOW, 5, _random())
    network = Known()
    network.scale.requires_grad_(False)
    with pytest.raises(StudyError, match="all its values are frozen"):
        fit_to_scan(network, [_slice()], HOW, 5, _random())
