"""The network for real scanners: its equation, indifferent to the scale of the data, and TV when untrained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.solvers import tv
from wardround.models.blocks import Denoiser, ResidualUNet
from wardround.models.cascade import (
    PRESETS,
    SOLVE_ITERATIONS,
    START_ITERATIONS,
    START_WEIGHT,
    Cascade,
    CascadeShape,
    beginning,
)

SHAPE = replace(PRESETS["small"], channels=4)


def _scan(size: int = 24, dtype: torch.dtype = torch.complex64) -> tuple[CartesianMRI, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, size, size, dtype=dtype, generator=generator)
    maps = maps / maps.abs().square().sum(1, keepdim=True).sqrt()
    mask = (torch.rand(2, 1, size, generator=generator) < 0.5).to(maps.real.dtype)
    image = torch.randn(2, size, size, dtype=dtype, generator=generator)
    operator = CartesianMRI(maps, mask)
    return operator, operator.A(image)


def _network(shape: CascadeShape = SHAPE) -> Cascade:
    torch.manual_seed(0)
    network = Cascade(shape)
    for parameter in network.denoiser.parameters():
        nn.init.normal_(parameter, std=0.05)
    return network


def test_it_takes_the_turns_of_the_equation() -> None:
    operator, data = _scan()
    network = _network(replace(SHAPE, cascades=3))
    with torch.no_grad():
        network.log_steps.copy_(torch.tensor([-0.3, 0.2]))
        expected = []
        for one, y in _items(operator, data):
            peak = one.A_adjoint(y).abs().max()
            image = beginning(one, y / peak) * peak
            measured = one.mask.sum() * y.shape[1] * y.shape[2]
            rho = ((one.A(image) - y).abs().square().sum() / measured).sqrt() / peak
            for step in (torch.tensor(-0.3).exp(), torch.tensor(0.2).exp(), None):
                level = (10 * rho * peak).expand_as(image).to(image.dtype)
                z = network.denoiser(image, guides=(one.A_adjoint(y - one.A(image)), level))
                if step is not None:
                    image = z + step * one.A_adjoint(y - one.A(z))
            weight = (rho / 0.045) ** 2
            expected.append(one.solve(one.A_adjoint(y) + weight * z, weight, iterations=SOLVE_ITERATIONS, start=z))
        torch.testing.assert_close(network(operator, data), torch.cat(expected), rtol=1e-3, atol=1e-4)


def _items(operator: CartesianMRI, data: torch.Tensor) -> Iterator[tuple[CartesianMRI, torch.Tensor]]:
    """Each item of a batch, alone."""
    for k in range(len(data)):
        yield CartesianMRI(operator.maps[k : k + 1], operator.mask[k : k + 1]), data[k : k + 1]


def test_good_data_are_trusted_more_than_the_network_and_noise_less() -> None:
    """A network that is wrong everywhere: what it leaves of measured samples falls with what total variation does."""
    operator, data = _scan()
    with torch.no_grad():
        noise = torch.randn(data.shape, dtype=data.dtype, generator=torch.Generator().manual_seed(2))
        network, measured = _network(), operator.mask[:, None]
        left = []
        for level in (0.0, 0.3, 3.0):
            y = data + level * noise * measured
            image = network(operator, y)
            left.append(float((operator.A(image) - y).norm() / y.norm()))
    assert left[0] < left[1] < left[2]


@pytest.mark.parametrize("factor", [1e-3, 37.0])
def test_the_scale_of_the_data_is_the_scale_of_the_image(factor: float) -> None:
    operator, data = _scan()
    network = _network()
    with torch.no_grad():
        torch.testing.assert_close(
            network(operator, factor * data), factor * network(operator, data), rtol=1e-3, atol=1e-4 * factor
        )


@pytest.mark.parametrize("block", [Denoiser(4, 3, bias=False, scale=2), ResidualUNet(4, 3, bias=False, scale=2)])
def test_a_denoiser_without_biases_is_homogeneous(block: nn.Module) -> None:
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
    image = torch.randn(1, 24, 24, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(block(3 * image), 3 * block(image), rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in block.named_parameters() if name.endswith("bias")]


def test_untrained_it_is_total_variation_of_data_of_peak_one_and_steps_to_the_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wardround.models.cascade.ERROR", 1e-4)
    operator, data = _scan()
    network = Cascade(SHAPE)
    with torch.no_grad():
        network.log_steps.fill_(-30.0)
        found = network(operator, data)
    for item, (one, y) in enumerate(_items(operator, data)):
        peak = one.A_adjoint(y).abs().max()
        image = peak * tv(one, y / peak, START_WEIGHT, START_ITERATIONS)
        torch.testing.assert_close(found[item : item + 1], image, rtol=1e-3, atol=1e-4)
    assert not network(operator, torch.zeros_like(data)).abs().any()


def test_with_one_coil_and_all_trust_in_the_data_measured_samples_come_back_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever D does: the mask times itself is the mask."""
    monkeypatch.setattr("wardround.models.cascade.ERROR", 1e4)
    operator, data = _scan()
    maps, mask = operator.maps[:, :1] / operator.maps[:, :1].abs(), operator.mask
    single, measured = CartesianMRI(maps, mask), mask[:, None] * data[:, :1]
    network = _network()
    with torch.no_grad():
        torch.testing.assert_close(single.A(network(single, measured)), measured, rtol=1e-4, atol=1e-4)
        # Untrained, what was not measured stays total variation's.
        image = Cascade(SHAPE)(single, measured)
        peak = single.A_adjoint(measured).abs().flatten(1).amax(1)[:, None, None]
        first = beginning(single, measured / peak[:, None]) * peak
    unmeasured = CartesianMRI(maps, 1 - mask)
    torch.testing.assert_close(unmeasured.A(image), unmeasured.A(first), rtol=1e-3, atol=1e-4)


def test_every_turn_but_the_last_has_a_step_of_its_own() -> None:
    operator, data = _scan()
    network = _network(replace(SHAPE, cascades=3))
    network(operator, data).abs().square().mean().backward()
    assert network.log_steps.grad is not None
    assert (network.log_steps.grad != 0).all()


@pytest.mark.slow
def test_gradients_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all but total variation's image and what it leaves of the data, through which none flow."""
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(1, 1, 6, 6, dtype=torch.complex128, generator=generator) / 2
    operator = CartesianMRI(maps, (torch.rand(1, 1, 6, generator=generator) < 0.6).double())
    network = _network(replace(SHAPE, channels=2, levels=2)).double()
    data = torch.randn(1, 1, 6, 6, dtype=torch.complex128, generator=generator).requires_grad_()
    monkeypatch.setattr("wardround.models.cascade.beginning", lambda operator, data: operator.A_adjoint(data))
    monkeypatch.setattr("wardround.models.cascade.misfit", lambda operator, data, image: data.new_ones(1).real / 1000)
    assert torch.autograd.gradcheck(lambda y: network(operator, y), (data,))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_documentation_counts_parameters_right(preset: str) -> None:
    count = sum(parameter.numel() for parameter in Cascade(PRESETS[preset]).parameters())
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert f"| `cascade` | `{preset}` | {count:,} |" in page.read_text(encoding="utf-8")
