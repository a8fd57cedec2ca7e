"""The network for real scanners: its equation, indifferent to the scale of the data, and TV when untrained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.solvers import tv
from wardround.models.blocks import Denoiser, ResidualUNet
from wardround.models.cascade import PRESETS, START_ITERATIONS, START_WEIGHT, Cascade, CascadeShape, beginning

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
    network = _network()
    with torch.no_grad():
        network.log_steps.copy_(torch.tensor([-0.3, 0.2]))
        image = beginning(operator, data)
        for step in (torch.tensor(-0.3).exp(), torch.tensor(0.2).exp()):
            z = network.denoiser(image, guides=(operator.A_adjoint(data - operator.A(image)),))
            image = z + step * operator.A_adjoint(data - operator.A(z))
        torch.testing.assert_close(network(operator, data), image, rtol=1e-3, atol=1e-4)


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


def test_the_first_image_is_total_variation_of_data_of_peak_one() -> None:
    operator, data = _scan()
    found = beginning(operator, data)
    for item in range(2):
        one = CartesianMRI(operator.maps[item : item + 1], operator.mask[item : item + 1])
        peak = one.A_adjoint(data[item : item + 1]).abs().max()
        image = peak * tv(one, data[item : item + 1] / peak, START_WEIGHT, START_ITERATIONS)
        torch.testing.assert_close(found[item : item + 1], image, rtol=1e-4, atol=1e-5)
    assert not beginning(operator, torch.zeros_like(data)).abs().any()


def test_with_one_coil_measured_samples_come_back_as_they_were() -> None:
    """Whatever D does: the last turn ends with a whole step, and the mask times itself is the mask."""
    operator, data = _scan()
    maps, mask = operator.maps[:, :1] / operator.maps[:, :1].abs(), operator.mask
    single, measured = CartesianMRI(maps, mask), mask[:, None] * data[:, :1]
    with torch.no_grad():
        torch.testing.assert_close(single.A(_network()(single, measured)), measured, rtol=1e-4, atol=1e-4)
        # Untrained, what was not measured stays total variation's.
        image, first = Cascade(SHAPE)(single, measured), beginning(single, measured)
    unmeasured = CartesianMRI(maps, 1 - mask)
    torch.testing.assert_close(unmeasured.A(image), unmeasured.A(first), rtol=1e-3, atol=1e-4)


def test_every_turn_has_a_step_of_its_own() -> None:
    operator, data = _scan()
    network = _network()
    network(operator, data).abs().square().mean().backward()
    assert network.log_steps.grad is not None
    assert (network.log_steps.grad != 0).all()


@pytest.mark.slow
def test_gradients_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all but total variation's image, through which none flow."""
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(1, 1, 6, 6, dtype=torch.complex128, generator=generator) / 2
    operator = CartesianMRI(maps, (torch.rand(1, 1, 6, generator=generator) < 0.6).double())
    network = _network(replace(SHAPE, channels=2, levels=2)).double()
    data = torch.randn(1, 1, 6, 6, dtype=torch.complex128, generator=generator).requires_grad_()
    monkeypatch.setattr("wardround.models.cascade.beginning", lambda operator, data: operator.A_adjoint(data))
    assert torch.autograd.gradcheck(lambda y: network(operator, y), (data,))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_documentation_counts_parameters_right(preset: str) -> None:
    count = sum(parameter.numel() for parameter in Cascade(PRESETS[preset]).parameters())
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert f"| `cascade` | `{preset}` | {count:,} |" in page.read_text(encoding="utf-8")
