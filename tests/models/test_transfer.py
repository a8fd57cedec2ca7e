"""The networks for real scanners: complex by default, indifferent to the scale of the data, and TV when untrained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.solvers import tv
from wardround.models.blocks import Denoiser, ResidualUNet
from wardround.models.unrolled import PRESETS, START_ITERATIONS, START_WEIGHT, MoDL, MoDLShape, beginning, modl_shape
from wardround.models.unrolled import MoDLSettings as Settings
from wardround.study.load import load_study
from wardround.tasks.losses import psnr_loss

TRANSFER = replace(PRESETS["transfer"], channels=4)


def _scan(size: int = 24, dtype: torch.dtype = torch.complex64) -> tuple[CartesianMRI, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, size, size, dtype=dtype, generator=generator)
    maps = maps / maps.abs().square().sum(1, keepdim=True).sqrt()
    mask = (torch.rand(2, 1, size, generator=generator) < 0.5).to(maps.real.dtype)
    image = torch.randn(2, size, size, dtype=dtype, generator=generator)
    operator = CartesianMRI(maps, mask)
    return operator, operator.A(image)


def _network(shape: MoDLShape = TRANSFER) -> MoDL:
    torch.manual_seed(0)
    network = MoDL(shape)
    for parameter in network.denoiser.parameters():
        nn.init.normal_(parameter, std=0.05)
    return network


def test_a_study_that_names_neither_preset_nor_image_has_complex_images() -> None:
    plain = load_study({"name": "trial", "sites": {"A": {}}})
    assert not plain.model.real_images
    assert load_study({"name": "trial", "sites": {"A": {}}, "model": {"preset": "small"}}).model.real_images
    # In all but that, it is the network of before; written out with every default, it stays what it is.
    assert replace(modl_shape(Settings()), image="real") == modl_shape(Settings(preset="small"))
    assert not load_study(plain.model_dump(mode="json")).model.real_images
    assert modl_shape(Settings(image="real")) == modl_shape(Settings(preset="small"))


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


def test_untrained_it_keeps_to_total_variation_where_nothing_was_measured() -> None:
    """With D = identity a data step moves the image along A* alone: what the mask leaves out stays TV's."""
    operator, data = _scan()
    maps, mask = operator.maps[:, :1] / operator.maps[:, :1].abs(), operator.mask
    single = CartesianMRI(maps, mask)
    measured = mask[:, None] * data[:, :1]
    with torch.no_grad():
        image, first = MoDL(TRANSFER)(single, measured), beginning(single, measured)
    unmeasured = CartesianMRI(maps, 1 - mask)
    torch.testing.assert_close(unmeasured.A(image), unmeasured.A(first), rtol=1e-3, atol=1e-4)
    # And it fits the data better.
    assert (single.A(image) - measured).norm() < 0.5 * (single.A(first) - measured).norm()


def test_every_unroll_has_a_lambda_of_its_own() -> None:
    operator, data = _scan()
    network = _network()
    assert network.weight.shape == (TRANSFER.unrolls,)
    network(operator, data).abs().square().mean().backward()
    assert network.log_weight.grad is not None
    assert (network.log_weight.grad != 0).all()


def test_the_denoiser_sees_what_the_image_leaves_unexplained() -> None:
    operator, data = _scan()
    network = _network(replace(TRANSFER, unrolls=1))
    seen: list[torch.Tensor] = []
    network.denoiser.register_forward_hook(
        lambda module, given, kwargs, made: seen.append(kwargs["guides"][0]), with_kwargs=True
    )
    with torch.no_grad():
        network(operator, data)
        first = beginning(operator, data)
        torch.testing.assert_close(seen[0], operator.A_adjoint(data - operator.A(first)), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_gradients_are_exact() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(1, 1, 6, 6, dtype=torch.complex128, generator=generator) / 2
    operator = CartesianMRI(maps, (torch.rand(1, 1, 6, generator=generator) < 0.6).double())
    shape = replace(TRANSFER, unrolls=2, cg_iterations=2, channels=2, levels=2, start="adjoint", residual=True)
    network = MoDL(shape).double()
    for parameter in network.denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    data = torch.randn(1, 1, 6, 6, dtype=torch.complex128, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: network(operator, y), (data,))


def test_the_psnr_loss_is_in_hundredths_of_a_decibel() -> None:
    """An error of 0.1 everywhere is 20 dB, one of 0.01 40 dB: together 30 dB."""
    target = torch.zeros(2, 16, 16)
    image = torch.stack([torch.full((16, 16), 0.1), torch.full((16, 16), 0.01)])
    assert float(psnr_loss(image, target)) == pytest.approx(0.5 - 0.30, rel=1e-4)


@pytest.mark.parametrize("preset", ["small_complex", "transfer"])
def test_the_documentation_counts_parameters_right(preset: str) -> None:
    count = sum(parameter.numel() for parameter in MoDL(PRESETS[preset]).parameters())
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert f"| `modl` | `{preset}` | {count:,} |" in page.read_text(encoding="utf-8")
