"""Gradient checkpointing: the same gradients, statistics and random numbers as without, in less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tests.models.test_ct_models import _scan as ct_scan
from tests.models.test_ct_models import _system
from tests.models.test_models import _scan as mri_scan
from torch import Tensor, nn

from wardround.learning.footprint import Live
from wardround.models.adapters import attach
from wardround.models.build import build_model
from wardround.models.checkpointing import Checkpointed, checkpoint_blocks
from wardround.models.learn import LearnSettings
from wardround.models.lite_medsam import LiteMedSAMSettings
from wardround.models.lpd import LPDSettings
from wardround.models.mae_vit import MaskedViTSettings
from wardround.models.prompts import FIRST_CORNER, LAST_CORNER
from wardround.models.segmenters import SwinUNETRSettings
from wardround.models.unrolled import MoDLSettings
from wardround.models.vit import ViTSettings
from wardround.study.adapters import LoRA
from wardround.study.registry import builtin

Made = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def vit() -> Made:
    network = ViTSettings(kind="vit", preset="tiny").build_classifier(2, 2, 3)
    return network, lambda model: model(images(4, 2, 16, 16))


def adapted() -> Made:
    """LoRA in blocks of which all else is frozen, so that nothing before them asks for a gradient."""
    network, step = vit()
    attach(network, LoRA(kind="lora", targets=("encoder.*.q_proj",), rank=2))
    for name, parameter in network.named_parameters():
        parameter.data += 0.01 * name.endswith("lora.b.weight")
    return network, step


def mae() -> Made:
    network = MaskedViTSettings(kind="mae_vit", preset="tiny").build_pretrainer(2, 2)
    kept = torch.arange(4).repeat(3, 1)
    return network, lambda model: model(images(3, 2, 16, 16), kept)


def medsam() -> Made:
    """Its encoder normalises by batches, and keeps their statistics."""
    network = LiteMedSAMSettings(kind="lite_medsam", preset="tiny").build_prompted(2, 3)
    box = torch.tensor([4.0, 5.0, 40.0, 50.0]).reshape(1, 1, 2, 2).repeat(2, 1, 1, 1)
    return network, lambda model: model(images(2, 3, 64, 64), box, (FIRST_CORNER, LAST_CORNER))


def modl(norm: str = "batch") -> Made:
    operator, data, _ = mri_scan(32)
    network = build_model(MoDLSettings.model_validate({"kind": "modl", "preset": "tiny", "norm": norm}))
    return network, lambda model: model(operator, data).abs()


def mri(kind: str, **given: Any) -> Made:
    operator, data, _ = mri_scan(32)
    network = build_model(builtin("model", kind).model_validate({"kind": kind, "preset": "tiny", **given}))  # type: ignore[arg-type]
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return network, lambda model: model(operator, data).abs()


def learn() -> Made:
    network = build_model(LearnSettings(kind="learn", preset="tiny", weighted=True, guided=True), "ct")
    return network, lambda model: model(_system(), ct_scan()[0])


def lpd() -> Made:
    network = build_model(LPDSettings(kind="lpd", preset="tiny", conditioned=True), "ct")
    return network, lambda model: model(_system(), ct_scan()[0])


def swin() -> Made:
    pytest.importorskip("einops", reason="the extra `swin` is not installed")
    network = SwinUNETRSettings(kind="swin_unetr", preset="tiny").build_network(2, 1, 2)
    return network, lambda model: model(images(1, 1, 64, 64))


def transformers(kind: str) -> Made:
    pytest.importorskip("transformers", reason="the extra `foundation` is not installed")
    from tests.models.test_transformers import built
    from tests.models.test_transformers import images as seen

    return built(kind), lambda model: model(seen())


class Dropping(Checkpointed):
    """Blocks that draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Tanh()) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.through(block, x)
        return x + torch.rand(x.shape)


def dropping() -> Made:
    return Dropping(), lambda model: model(images(5, 8))


def stepped(model: nn.Module, step: Callable[[nn.Module], Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients and the state behind a step, and what is drawn next."""
    torch.manual_seed(3)
    model.train()
    step(model).square().mean().backward()
    after = torch.rand(3)
    found = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**found, **model.state_dict()}, after


QUICK = [vit, adapted, medsam, modl, dropping]
CASES = [
    *QUICK,
    *(pytest.param(made, marks=pytest.mark.slow) for made in (mae, learn, lpd, swin)),
    *(pytest.param(partial(mri, kind), marks=pytest.mark.slow, id=kind) for kind in ("varnet", "e2e_varnet")),
    pytest.param(partial(mri, "swin_denoiser", prompts=3), marks=pytest.mark.slow, id="swin_denoiser"),
    *(pytest.param(partial(transformers, kind), marks=pytest.mark.slow, id=kind) for kind in ("vit", "dinov2", "swin")),
]


@pytest.mark.parametrize("made", CASES)
def test_a_step_is_the_same_with_and_without(made: Callable[[], Made]) -> None:
    """Bit for bit: the same operations on the same values, on one thread."""
    torch.manual_seed(0)
    model, step = made()
    other = copy.deepcopy(model)
    assert checkpoint_blocks(other) > 0
    plain, drawn = stepped(model, step)
    found, again = stepped(other, step)
    assert any(name.startswith("gradient of ") for name in plain)
    assert found.keys() == plain.keys()
    assert [name for name in plain if not torch.equal(plain[name], found[name])] == []
    assert torch.equal(drawn, again)


@pytest.mark.slow
@pytest.mark.parametrize("made", CASES)
def test_activations_take_less_memory(made: Callable[[], Made]) -> None:
    torch.manual_seed(0)
    model, step = made()
    peaks = []
    for _ in range(2):
        with Live() as live:
            step(model).square().mean().backward()
        peaks.append(live.peak)
        model.zero_grad(set_to_none=True)
        checkpoint_blocks(model)
    assert peaks[1] < peaks[0]


@pytest.mark.slow
def test_what_is_kept_of_a_block_is_its_input() -> None:
    """Without: the inputs of its layers, about 16 times its own, as a perceptron of four times the width has two."""
    batch, tokens, width = 4, 16, 48
    given = 4 * batch * tokens * width

    def kept(layers: int, checkpointed: bool) -> int:
        model = ViTSettings(kind="vit", preset="tiny", layers=layers).build_classifier(2, 2, 3)
        if checkpointed:
            checkpoint_blocks(model)
        with Live() as live:
            loss = model(images(batch, 2, 16, 16)).square().mean()
            found = live._now
        assert loss.requires_grad
        return found

    random = torch.get_rng_state().nbytes
    assert given <= kept(2, True) - kept(1, True) <= given + random
    assert kept(2, False) - kept(1, False) > 14 * given


def test_nothing_is_computed_twice_without_gradients() -> None:
    model, step = dropping()
    checkpoint_blocks(model)
    calls = []
    model.get_submodule("blocks.0").register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        step(model)
    assert calls == [1]
    step(model).sum().backward()
    assert calls == [1, 1, 1]
