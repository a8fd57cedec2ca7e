"""Networks: what they are before training, and that they learn through the physics."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.examples import quickly
from torch import Tensor, nn

from wardround.errors import GeometryError
from wardround.imaging.acquisition.mri.operator import CartesianMRI
from wardround.imaging.acquisition.mri.simulate import simulate
from wardround.models.blocks import Denoiser
from wardround.models.build import build_model
from wardround.models.cnn import UNetSettings as UNet
from wardround.models.e2e_varnet import E2EVarNetSettings
from wardround.models.lite_medsam import LiteMedSAMSettings
from wardround.models.mae_vit import MaskedViTSettings
from wardround.models.outliner import RARE, build_outliner
from wardround.models.segmenters import NetworkSettings
from wardround.models.swin_denoiser import SwinDenoiserSettings
from wardround.models.unrolled import PRESETS, modl_shape
from wardround.models.unrolled import MoDL as MoDLNetwork
from wardround.models.unrolled import MoDLSettings as MoDL
from wardround.models.varnet import VarNetSettings
from wardround.study.acquisition import Mask, MRIAcquisition
from wardround.study.models import ClassifierSettings
from wardround.study.models import ModelSettings as Model
from wardround.study.registry import BUILTIN, builtin

CONFIGS = [
    MoDL(preset="tiny"),
    MoDL(preset="tiny", norm="batch"),
    MoDL(preset="tiny", norm="instance"),
    UNet(kind="unet", preset="tiny"),
    UNet(kind="unet", preset="tiny", norm="batch"),
    VarNetSettings(kind="varnet", preset="tiny"),
    E2EVarNetSettings(kind="e2e_varnet", preset="tiny"),
    SwinDenoiserSettings(kind="swin_denoiser", preset="tiny", prompts=3),
]


def _scan(size: int = 64) -> tuple[CartesianMRI, Tensor, Tensor]:
    """Two slices of a phantom of discs: operator, data and target magnitude images (2, H, W)."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    head = 0.5 * (x**2 + (y / 1.2) ** 2 < 0.5)
    images = [(head + 0.4 * ((x - shift) ** 2 + y**2 < 0.05)).astype(np.float32) for shift in (-0.2, 0.3)]
    acquisition = MRIAcquisition(coils=4, mask=Mask(acceleration=3.0, calibration=0.12))
    scans = [simulate(image, acquisition, np.random.default_rng(i)) for i, image in enumerate(images)]
    operator = CartesianMRI(torch.stack([s.maps for s in scans]), torch.stack([s.mask for s in scans]))
    return operator, torch.stack([s.kspace for s in scans]), torch.from_numpy(np.stack(images))


def _build(config: Model) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config)


@pytest.mark.parametrize("config", quickly(CONFIGS, 0, 1, 2, 3, 4, 7))
def test_every_model_turns_data_into_complex_images(config: Model) -> None:
    operator, data, target = _scan()
    image = _build(config)(operator, data)
    assert image.shape == target.shape
    assert image.dtype == torch.complex64
    assert torch.isfinite(torch.view_as_real(image)).all()


@pytest.mark.parametrize("config", quickly(CONFIGS, 0, 4))
def test_every_model_learns_within_sixty_steps(config: Model) -> None:
    operator, data, target = _scan()
    model = _build(config)
    # A transformer takes smaller steps.
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4 if config.kind == "swin_denoiser" else 3e-3)

    def step() -> float:
        optimizer.zero_grad()
        loss = (model(operator, data).abs() - target).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    first = step()
    assert any(step() < 0.8 * first for _ in range(59))


def test_the_same_seed_gives_the_same_model() -> None:
    one, other = (_build(MoDL(preset="tiny")).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_untrained_denoiser_is_the_identity_at_every_scale() -> None:
    image = torch.view_as_complex(torch.randn(2, 16, 24, 2, generator=torch.Generator().manual_seed(0)))
    for scale in (1, 2, 4):
        assert torch.equal(Denoiser(8, 3, scale=scale)(image), image)


def test_untrained_unet_gives_the_zero_filled_image() -> None:
    operator, data, _ = _scan()
    torch.testing.assert_close(_build(UNet(kind="unet", preset="tiny"))(operator, data), operator.A_adjoint(data))


@pytest.mark.parametrize(
    "config", [MoDL(preset="tiny", scale=4), *quickly((CONFIGS[0], *CONFIGS[3:4], *CONFIGS[5:]), 0, 1)]
)
def test_odd_sizes_pass_through_every_model(config: Model) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(1, 2, 45, 39, dtype=torch.complex64, generator=generator)
    operator = CartesianMRI(maps, torch.ones(1, 1, 39))
    model = _build(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    image = model(operator, torch.randn(1, 2, 45, 39, dtype=torch.complex64, generator=generator))
    assert image.shape == (1, 45, 39)
    assert torch.isfinite(torch.view_as_real(image)).all()


def test_a_unet_says_that_images_are_too_small() -> None:
    operator = CartesianMRI(torch.ones(1, 1, 16, 40, dtype=torch.complex64), torch.ones(1, 1, 40))
    with pytest.raises(GeometryError, match="at least 32 x 32 pixels, not 16 x 40"):
        _build(CONFIGS[3])(operator, torch.ones(1, 1, 16, 40, dtype=torch.complex64))


def test_what_is_padded_does_not_move_the_image() -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(8, 3, scale=2)
    nn.init.normal_(list(denoiser.stack.parameters())[-2], std=0.3)
    image = torch.randn(1, 33, 31, dtype=torch.complex64)
    padded = nn.functional.pad(image, (0, 1, 0, 1))
    torch.testing.assert_close(denoiser(image), denoiser(padded)[:, :33, :31])


def test_folded_pixels_come_back_where_they_were() -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(8, 2, scale=2)
    for parameter in denoiser.stack.parameters():
        nn.init.normal_(parameter, std=0.3)
    image = torch.zeros(1, 32, 32, dtype=torch.complex64)
    image[0, 16, 20] = 1.0
    change = (denoiser(image) - denoiser(torch.zeros_like(image))).abs()[0]
    update_bound = 5 * 2  # two 3x3 layers at half resolution see five pixels, of two each
    rows, columns = torch.nonzero(change, as_tuple=True)
    assert len(rows) > 4
    assert (rows - 16).abs().max() < update_bound
    assert (columns - 20).abs().max() < update_bound


def test_untrained_modl_solves_the_regularised_equations() -> None:
    """With D = identity, the unrolls are proximal-point steps from A* y, each with its own linear system."""
    operator, data, _ = _scan()
    model = MoDLNetwork(modl_shape(MoDL(preset="tiny", unrolls=1, cg_iterations=50)))
    adjoint = operator.A_adjoint(data)
    with torch.no_grad():
        image = model(operator, data)
        residual = operator.normal(image) + model.weight * image - (1 + model.weight) * adjoint
    assert float(residual.abs().square().sum().sqrt() / adjoint.abs().square().sum().sqrt()) < 1e-4


def test_weight_is_learned_shared_and_stays_positive() -> None:
    operator, data, target = _scan()
    model = _build(MoDL(preset="tiny"))
    assert isinstance(model, MoDLNetwork)
    assert float(model.weight.detach()) == pytest.approx(PRESETS["tiny"].initial_weight, rel=1e-5)
    (model(operator, data).abs() - target).square().mean().backward()
    assert model.log_weight.grad is not None
    assert model.log_weight.grad.item() != 0.0
    with torch.no_grad():
        model.log_weight.fill_(-30.0)
    assert float(model.weight.detach()) > 0


def test_parameters_do_not_grow_with_unrolls() -> None:
    few, many = (_build(MoDL(preset="tiny", unrolls=n)) for n in (1, 7))
    assert sum(p.numel() for p in few.parameters()) == sum(p.numel() for p in many.parameters())


def test_batch_statistics_exist_where_a_study_wants_them_local() -> None:
    buffers = {name for name, _ in _build(MoDL(preset="tiny", norm="batch")).named_buffers()}
    assert any(name.endswith("running_mean") for name in buffers)
    assert not list(_build(MoDL(preset="tiny")).named_buffers())


@pytest.mark.parametrize("preset", ["tiny", "small", "paper"])
@pytest.mark.parametrize("kind", [kind for kind in BUILTIN["model"] if "preset" in builtin("model", kind).model_fields])
def test_the_documentation_counts_parameters_right(kind: str, preset: str) -> None:
    if kind == "swin_unetr":
        pytest.importorskip("einops", reason="the extra `swin` is not installed")
    config = builtin("model", kind).model_validate({"kind": kind, "preset": preset})
    if isinstance(config, NetworkSettings):
        network = config.build_network(2, 1, 1)
    elif isinstance(config, ClassifierSettings):
        with torch.device("meta"):  # the largest has 86 million
            network = config.build_classifier(2, 3, 2)
    elif isinstance(config, MaskedViTSettings):
        with torch.device("meta"):
            network = config.build_pretrainer(2, 3)
    elif isinstance(config, LiteMedSAMSettings):
        network = config.build_prompted(2, 3)
    else:
        assert isinstance(config, Model)
        mri = kind in ("modl", "unet") or config.modalities == frozenset({"mri"})
        with torch.device("meta" if mri else "cpu"):  # the largest have 30 million
            network = build_model(config, "mri" if mri else "ct")
    count = sum(p.numel() for p in network.parameters())
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert f"| `{config.kind}` | `{preset}` | {count:,} |" in page.read_text(encoding="utf-8")


def test_a_study_overrides_its_preset() -> None:
    shape = modl_shape(MoDL(preset="paper", unrolls=3, norm="instance"))
    assert (shape.unrolls, shape.norm, shape.channels) == (3, "instance", PRESETS["paper"].channels)


def test_gradients_are_exact() -> None:
    """The whole network, conjugate gradients included, against finite differences in double precision."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(1, 2, 6, 6, dtype=torch.complex128, generator=generator) / 2
    operator = CartesianMRI(maps, (torch.rand(1, 1, 6, generator=generator) < 0.6).double())
    shape = modl_shape(MoDL(preset="tiny", unrolls=2, cg_iterations=2, channels=4, layers=2))
    model = MoDLNetwork(shape).double()
    for parameter in model.denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    data = torch.randn(1, 2, 6, 6, dtype=torch.complex128, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: model(operator, y), (data,))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", ["monai_unet", "segresnet", "dynunet", "swin_unetr"])
def test_a_network_begins_by_marking_nothing(kind: str, dimensions: int) -> None:
    """Built from the same draw, it is the plain network less a constant of each structure, its last bias."""
    if kind == "swin_unetr":
        pytest.importorskip("einops", reason="the extra `swin` is not installed")
    settings = builtin("model", kind).model_validate({"kind": kind, "preset": "tiny"})
    assert isinstance(settings, NetworkSettings)
    # The smallest at which the deepest layer of a Swin UNETR has more than one place.
    side = 64 if kind == "swin_unetr" else 32
    images = torch.randn(1, 1, *[side] * dimensions, generator=torch.Generator().manual_seed(1))
    logits = []
    for build in (settings.build_network, partial(build_outliner, settings)):
        torch.manual_seed(0)
        with torch.no_grad():
            logits.append(build(dimensions, 1, 2).eval()(images))
    lower = (logits[1] - logits[0]).flatten(2)
    assert torch.allclose(lower, lower[..., :1].expand_as(lower), atol=1e-5)
    # torch draws a bias within 1 of 0.
    assert ((lower > RARE - 1) & (lower < RARE + 1)).all()
