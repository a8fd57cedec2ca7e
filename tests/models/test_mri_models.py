"""VarNet, E2E-VarNet and the Swin denoiser against their equations, written out in double precision."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.examples import quickly
from tests.models.test_models import _scan
from torch import Tensor, nn
from torch.nn import functional

from wardround.errors import GeometryError, StudyError
from wardround.imaging.acquisition.mri.coils import calibration_region
from wardround.imaging.acquisition.mri.masks import centred, poisson_disc, random_lines
from wardround.imaging.acquisition.mri.operator import CartesianMRI, fft2c, ifft2c
from wardround.imaging.acquisition.wrapped import Prompted
from wardround.models import e2e_varnet, swin_denoiser, varnet
from wardround.models.adapters import attach, merged
from wardround.models.build import build_model
from wardround.models.e2e_varnet import E2EVarNet, calibration_window
from wardround.models.normalised_unet import NormalisedUNet
from wardround.models.swin_denoiser import Block, SwinReconstruction, SwinShape, separated
from wardround.models.varnet import VarNet
from wardround.study.adapters import LoRA, Partial, Prompts
from wardround.study.registry import builtin

KINDS = ("varnet", "e2e_varnet", "swin_denoiser")
EXACT = 1e-10  # double precision, of values of about one
ROUNDING = 1e-4  # float32 through a U-Net in another batch: sums of some 10^3 terms, ten layers deep


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.complex128) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lines(width: int, *measured: int) -> Tensor:
    return torch.tensor([[[float(n in measured) for n in range(width)]]], dtype=torch.float64)


def shaken(model: nn.Module, std: float = 0.1) -> nn.Module:
    """What training might have left in it: no layer is zero."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model


def built(kind: str, **given: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(builtin("model", kind).model_validate({"kind": kind, "preset": "tiny", **given}))


# The U-Net ----------------------------------------------------------------------------------------------------------


def test_the_unet_sees_images_of_mean_0_and_variance_1_and_its_result_has_their_scale() -> None:
    net = shaken(NormalisedUNet(2)).double()
    image = 7.0 * noise(1, 32, 48) + (3.0 - 2.0j)
    mean = image.mean()
    scale = math.sqrt(float((image - mean).abs().square().sum()) / (2 * image.numel()))
    seen = (image - mean) / scale
    made = net.unet(torch.stack([seen.real, seen.imag], 1))
    expected = scale * torch.complex(made[:, 0], made[:, 1])
    assert expected.abs().max() > 1.0
    torch.testing.assert_close(net(image), expected, rtol=0.0, atol=100 * EXACT)


def test_an_empty_image_stays_empty_and_has_a_gradient() -> None:
    net = shaken(NormalisedUNet(2))
    images = torch.stack([torch.zeros(20, 33, dtype=torch.complex64), noise(20, 33, dtype=torch.complex64)])
    images.requires_grad_()
    found = net(images)
    assert found.shape == images.shape
    assert not found[0].abs().any()
    found.abs().sum().backward()
    assert images.grad is not None
    assert torch.isfinite(torch.view_as_real(images.grad)).all()


# VarNet -------------------------------------------------------------------------------------------------------------


def test_varnet_takes_its_steps() -> None:
    """A as a sum over coils and places, from the definition of the transform."""
    size, eta = 6, (0.5, 0.8)
    model = VarNet(varnet.VarNetShape(cascades=2, channels=2)).double()
    shaken(model)
    with torch.no_grad():
        model.log_steps.copy_(torch.tensor(eta, dtype=torch.float64).log())
    maps, mask = noise(1, 2, size, size) / 3, lines(size, 0, 2, 3, 5)
    y = mask[:, None] * noise(1, 2, size, size, seed=1)
    place = torch.arange(size).double() - size // 2
    dft = torch.polar(
        torch.full((size, size), size**-0.5, dtype=torch.float64), -2 * torch.pi * torch.outer(place, place) / size
    )
    x = sum(maps[0, c].conj() * (dft.conj() @ (mask[0] * y[0, c]) @ dft.conj()) for c in range(2))
    for t in range(2):
        misfit = [mask[0] * (dft @ (maps[0, c] * x) @ dft) - y[0, c] for c in range(2)]
        gradient = sum(maps[0, c].conj() * (dft.conj() @ (mask[0] * misfit[c]) @ dft.conj()) for c in range(2))
        x = x - eta[t] * gradient - model.regularisers[t](x[None])[0]
    torch.testing.assert_close(model(CartesianMRI(maps, mask), y)[0], x, rtol=0.0, atol=EXACT)


def test_an_untrained_varnet_comes_near_the_data() -> None:
    operator, data, _ = _scan()
    with torch.no_grad():
        few, many = (
            (operator.A(built("varnet", cascades=n, channels=1)(operator, data)) - data).norm() for n in (1, 9)
        )
    assert many < few < data.norm()


# E2E-VarNet ---------------------------------------------------------------------------------------------------------


def test_a_refinement_is_that_of_monai() -> None:
    """Same maps, mask, weights and numbers of either package's transform; sizes odd and even."""
    from monai.apps.reconstruction.networks.blocks.varnetblock import VarNetBlock

    class Reals(nn.Module):
        """A network of complex images, for MONAI's layout (B, 1, H, W, 2)."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(self.net(torch.view_as_complex(x)[:, 0]))[:, None]

    model = E2EVarNet(e2e_varnet.E2EVarNetShape(cascades=2, channels=2, map_channels=1)).double()
    shaken(model)
    mask = lines(11, 0, 4, 5, 6, 9)
    y = mask[:, None] * noise(2, 3, 8, 11)
    maps = model.maps(mask, y)
    k = torch.view_as_real(y)
    for t, net in enumerate(model.regularisers):
        block = VarNetBlock(Reals(net)).double()
        with torch.no_grad():
            block.dc_weight.fill_(model.steps[t])
        k = block(k, torch.view_as_real(y), mask[:, None, :, :, None].bool(), torch.view_as_real(maps))
    assert (k - torch.view_as_real(y)).abs().max() > 0.1
    torch.testing.assert_close(torch.view_as_real(model.kspace(mask, y)), k, rtol=0.0, atol=EXACT)


def test_learned_maps_are_those_of_the_equation() -> None:
    model = E2EVarNet(e2e_varnet.E2EVarNetShape(cascades=1, channels=1, map_channels=2)).double()
    shaken(model)
    mask = lines(8, 0, 3, 4, 5, 7)
    y = mask[:, None] * noise(1, 3, 6, 8)
    low = torch.zeros_like(y)
    low[..., 3:6] = y[..., 3:6]
    images = [ifft2c(low[:, c]) + model.maps.unet(ifft2c(low[:, c])) for c in range(3)]
    root = sum(image.abs().square() for image in images).sqrt()
    found = model.maps(mask, y)
    for c in range(3):
        torch.testing.assert_close(found[:, c], images[c] / root, rtol=0.0, atol=EXACT)
    torch.testing.assert_close(found.abs().square().sum(1).sqrt(), torch.ones_like(root), rtol=0.0, atol=EXACT)


def test_the_result_is_the_root_sum_of_squares_and_known_maps_give_no_more_than_its_phase() -> None:
    model = shaken(built("e2e_varnet"))
    operator, data, _ = _scan(32)
    with torch.no_grad():
        image = model(operator, data)
        coils = ifft2c(model.kspace(operator.mask, data))
        torch.testing.assert_close(image.abs(), coils.abs().square().sum(1).sqrt())
        combined = (operator.maps.conj() * coils).sum(1)
        assert ((image * combined.conj()).real > 0.999 * image.abs() * combined.abs() - 1e-6).all()
        other = CartesianMRI(torch.zeros_like(operator.maps), operator.mask)
        torch.testing.assert_close(model(other, data).abs(), image.abs())


def test_an_untrained_e2e_varnet_gives_the_zero_filled_coils() -> None:
    operator, data, _ = _scan(32)
    with torch.no_grad():
        found = built("e2e_varnet")(operator, data).abs()
    torch.testing.assert_close(found, ifft2c(data).abs().square().sum(1).sqrt())


def test_coils_of_zeros_change_nothing() -> None:
    """A batch of scans with unlike numbers of coils is padded with such: no value, no gradient, no NaN."""
    model = shaken(built("e2e_varnet"))
    operator, data, target = _scan(32)
    empty = torch.zeros(2, 2, 32, 32, dtype=torch.complex64)
    padded = CartesianMRI(torch.cat([operator.maps, empty], 1), operator.mask)
    found = []
    for known, measured in ((operator, data), (padded, torch.cat([data, empty], 1))):
        model.zero_grad()
        image = model(known, measured)
        (image.abs() - target).square().mean().backward()
        found.append([image.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 10
    for plain, with_zeros in zip(*found, strict=True):
        torch.testing.assert_close(with_zeros, plain, rtol=ROUNDING, atol=ROUNDING * float(plain.abs().max()))


@pytest.mark.parametrize("coils", quickly((1, 5), 0))
def test_any_number_of_coils_is_served_by_one_network(coils: int) -> None:
    mask = lines(40, *range(15, 25), 3, 38).float()
    data = mask[:, None] * noise(2, coils, 33, 40, dtype=torch.complex64)
    image = shaken(built("e2e_varnet"))(CartesianMRI(torch.ones(1, coils, 33, 40, dtype=torch.complex64), mask), data)
    assert image.shape == (2, 33, 40)
    assert torch.isfinite(torch.view_as_real(image)).all()


def test_the_calibration_window_is_that_of_the_estimated_maps() -> None:
    random = np.random.default_rng(0)
    block = np.zeros((9, 12), np.float32)
    block[3:6, 5:8] = block[0, 0] = 1.0
    masks = [
        np.broadcast_to(random_lines(12, 6, 4, random), (9, 12)),
        block,
        np.ones((9, 12), np.float32),
        poisson_disc((9, 12), 40, (3, 5), random),
    ]
    found = calibration_window(torch.from_numpy(np.stack(masks).astype(np.float32))).numpy()
    for mask, window in zip(masks, found, strict=True):
        rows, columns = calibration_region(np.asarray(mask, np.float32))
        expected = np.zeros((9, 12))
        expected[centred(rows, 9), centred(columns, 12)] = 1.0
        np.testing.assert_array_equal(window, expected)


@pytest.mark.slow
def test_what_has_no_calibration_lines_or_is_not_cartesian_is_refused() -> None:
    operator, data, _ = _scan(32)
    model = built("e2e_varnet")
    without = operator.mask.clone()
    without[..., 10:22] = 0.0
    with pytest.raises(GeometryError, match="the centre of k-space was not measured"):
        model(CartesianMRI(operator.maps, without), data)
    with pytest.raises(GeometryError, match=r"e2e_varnet .* a Prompted measures something else; take the model varnet"):
        model(Prompted(operator, torch.ones(2, 1, 1)), data)


# The Swin denoiser --------------------------------------------------------------------------------------------------

SHAPE = SwinShape(1, 1, width=4, groups=1, layers=2, heads=2, window=2, scale=1, prompts=3)


def attended(block: Block, tokens: Tensor, groups: list[list[tuple[int, int]]]) -> Tensor:
    """What a block makes of tokens (H, W, d) of which those of a group see each other: token by token, head by head."""
    found = tokens.clone()
    own = block.attention
    side = 2 * block.window - 1
    for group in groups:
        for here in group:
            seen = [block.norm1(tokens[place]) for place in group]
            if block.prompts is not None:
                seen += [block.norm1(prompt) for prompt in block.prompts[0]]
            q = own.q_proj(block.norm1(tokens[here])).reshape(own.heads, -1)
            keys = [own.k_proj(one).reshape(own.heads, -1) for one in seen]
            values = [own.v_proj(one).reshape(own.heads, -1) for one in seen]
            heads = []
            for head in range(own.heads):
                logits = [q[head] @ key[head] / q.shape[1] ** 0.5 for key in keys]
                for number, place in enumerate(group):
                    dy, dx = here[0] - place[0] + block.window - 1, here[1] - place[1] + block.window - 1
                    logits[number] = logits[number] + own.bias[head, dy * side + dx]
                weights = torch.stack(logits).softmax(0)
                heads.append(sum(w * value[head] for w, value in zip(weights, values, strict=True)))
            x = tokens[here] + own.out_proj(torch.cat(heads))
            found[here] = x + block.mlp(block.norm2(x))
    return found


@pytest.mark.parametrize("prompts", [0, 3])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_block_attends_to_its_window_and_its_prompts(shifted: bool, prompts: int) -> None:
    """Windows of 2 x 2 on 4 x 4 tokens; shifted, those in the middle are whole and those at the edges are cut."""
    block = Block(replace(SHAPE, prompts=prompts), shifted=shifted).double()
    shaken(block, 0.5)
    tokens = noise(1, 4, 4, 4, dtype=torch.float64)
    cuts = ([0], [1, 2], [3]) if shifted else ([0, 1], [2, 3])
    groups = [[(y, x) for y in rows for x in columns] for rows in cuts for columns in cuts]
    with torch.no_grad():
        found = block(tokens, separated(4, 4, 2, torch.device("cpu")))[0]
        torch.testing.assert_close(found, attended(block, tokens[0], groups), rtol=0.0, atol=100 * EXACT)


def test_a_reconstruction_alternates_denoising_and_least_squares() -> None:
    model = SwinReconstruction(replace(SHAPE, unrolls=2, cg_iterations=60, initial_weight=0.3)).double()
    shaken(model)
    maps, mask = noise(1, 2, 6, 7), lines(7, 0, 2, 3, 4)
    operator, y = CartesianMRI(maps, mask), mask[:, None] * noise(1, 2, 6, 7, seed=1)
    columns = [operator.normal(e.reshape(1, 6, 7)).flatten() for e in torch.eye(42, dtype=torch.complex128)]
    normal, weight = torch.stack(columns, 1), model.weight.detach()
    with torch.no_grad():
        x = operator.A_adjoint(y)
        for _ in range(2):
            right = (operator.A_adjoint(y) + weight * model.denoiser(x)).flatten()
            x = torch.linalg.solve(normal + weight * torch.eye(42), right).reshape(1, 6, 7)
        torch.testing.assert_close(model(operator, y), x, rtol=0.0, atol=1e4 * EXACT)


def test_an_untrained_swin_denoiser_is_the_identity_at_any_size() -> None:
    denoiser = built("swin_denoiser", prompts=2).denoiser
    image = noise(2, 19, 30, dtype=torch.complex64)
    assert torch.equal(denoiser(image), image)
    found = shaken(denoiser)(image)
    assert found.shape == image.shape
    assert torch.isfinite(torch.view_as_real(found)).all()


def test_shifts_carry_what_is_seen_beyond_a_window() -> None:
    """Convolutions of ones and zeros aside: a point reaches the next window through the shifted block alone."""
    first, second = Block(SHAPE, shifted=False), Block(SHAPE, shifted=True)
    apart = separated(4, 4, 2, torch.device("cpu"))
    tokens = torch.zeros(1, 4, 4, 4)
    point = tokens.clone()
    point[0, 0, 0, 1] = 1.0
    with torch.no_grad():
        near = (first(point, apart) - first(tokens, apart)).abs().sum(3)[0] > 0
        far = (second(first(point, apart), apart) - second(first(tokens, apart), apart)).abs().sum(3)[0] > 0
    assert near[:2, :2].all()
    assert int(near.sum()) == 4
    assert int(far.sum()) == 9


def test_prompts_are_named_for_policies_and_a_network_without_them_begins_alike() -> None:
    plain, prompted = built("swin_denoiser"), built("swin_denoiser", prompts=5)
    names = [name for name, _ in prompted.named_parameters() if name.endswith(".prompts")]
    assert names == [f"denoiser.groups.0.blocks.{n}.prompts" for n in range(2)]
    assert all(tuple(prompted.get_parameter(name).shape) == (1, 5, 16) for name in names)
    assert prompted.state_dict().keys() - plain.state_dict().keys() == set(names)
    attached = attach(prompted, Partial(kind="partial", trained=("*.prompts",)))
    assert attached.frozen == plain.state_dict().keys()
    with pytest.raises(StudyError, match=r"model\.prompts of swin_denoiser"):
        attach(plain, Prompts(kind="prompts", targets=("denoiser.groups.0.blocks.*",), features=16))


@pytest.mark.slow
def test_prompts_alone_learn() -> None:
    operator, data, target = _scan(32)
    model = shaken(built("swin_denoiser", prompts=4), 0.05)
    attach(model, Partial(kind="partial", trained=("*.prompts",)))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)

    def step() -> float:
        optimizer.zero_grad()
        loss = (model(operator, data).abs() - target).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    first = step()
    assert any(step() < first for _ in range(10))


def test_heads_share_the_width_evenly() -> None:
    with pytest.raises(ValueError, match="4 heads do not share a width of 18 evenly"):
        swin_denoiser.SwinDenoiserSettings(kind="swin_denoiser", width=18, heads=4)


# All of them --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", quickly(KINDS, 2))
def test_low_rank_products_begin_as_nothing_learn_and_merge(kind: str) -> None:
    """By the patterns that docs/models.md names."""
    operator, data, target = _scan(32)
    model = shaken(built(kind), 0.02)
    with torch.no_grad():
        before = model(operator, data)
    targets = ("*.q_proj", "*.v_proj") if kind == "swin_denoiser" else ("*.conv",)
    attach(model, LoRA(kind="lora", targets=targets, rank=1))
    with torch.no_grad():
        assert torch.equal(model(operator, data), before)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        functional.mse_loss(model(operator, data).abs(), target).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learning)
    with torch.no_grad():
        changed = model(operator, data)
        assert (changed - before).abs().max() > 1e-4
        whole = merged(model)
        assert not [name for name in whole.state_dict() if "lora" in name]
        torch.testing.assert_close(whole(operator, data), changed, rtol=0.0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_scans_of_ct_are_refused(kind: str) -> None:
    with pytest.raises(StudyError, match=f"model.kind: {kind} is for MRI, and these scans are CT"):
        build_model(builtin("model", kind).model_validate({"kind": kind, "preset": "tiny"}), "ct")


def test_coil_images_have_the_scale_of_the_target() -> None:
    """A fully sampled scan without noise is E2E-VarNet's answer: no scale or shift is left to learn."""
    image = noise(1, 12, 15)
    maps = noise(1, 3, 12, 15, seed=1)
    maps = maps / maps.abs().square().sum(1, keepdim=True).sqrt()
    operator = CartesianMRI(maps, torch.ones(1, 1, 15).double())
    found = built("e2e_varnet").double()(operator, fft2c(maps * image[:, None]))
    torch.testing.assert_close(found, image, rtol=0.0, atol=EXACT)
