"""Adapters: what they add, what they leave as it is, and how they become plain weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose
from pydantic import TypeAdapter
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.models.adapters import added_values, attach, merged
from wardround.study.adapters import Adapters

_READ: TypeAdapter[Any] = TypeAdapter(Adapters)
# A few roundings of float32 in sums of some hundred terms of order one.
CLOSE = 100 * torch.finfo(torch.float32).eps


class Block(nn.Module):
    """A block of tokens (B, N, 8): attention with layers of its own, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.mlp = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        mixed = torch.softmax(self.q_proj(y) @ y.mT / 8**0.5, dim=-1) @ self.v_proj(y)
        return x + self.mlp(mixed)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


LAYERS = {
    "linear": (nn.Linear(6, 5), (4, 6)),
    "conv1d": (nn.Conv1d(3, 5, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (nn.Conv2d(3, 5, (3, 1), padding="same", dilation=2, padding_mode="reflect"), (2, 3, 8, 8)),
    "conv3d": (nn.Conv3d(2, 4, 2, bias=False), (1, 2, 4, 4, 4)),
}


def adapters(**given: Any) -> Adapters:
    found: Adapters = _READ.validate_python(given)
    return found


def disturbed(model: nn.Module) -> nn.Module:
    """What training might have left in the adapters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in added_values(model):
                parameter.copy_(0.5 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_low_rank_product_begins_as_nothing_and_merges_into_the_weight(kind: str, stabilised: bool) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]
    model, x = nn.Sequential(copy.deepcopy(layer)), torch.randn(shape)
    before = model(x)
    attach(model, adapters(kind="lora", targets=["0"], rank=2, alpha=3.0, rank_stabilised=stabilised))
    assert torch.equal(model(x), before)
    disturbed(model)
    changed = model(x)
    assert (changed - before).abs().max() > 0.1
    factor = 3.0 / 2**0.5 if stabilised else 1.5
    part = model.get_submodule("0.lora")
    a, b = part.get_parameter("a.weight").detach(), part.get_parameter("b.weight").detach()
    product = factor * (b.flatten(1).double() @ a.flatten(1).double()).reshape(layer.weight.shape)
    whole = copy.deepcopy(layer)
    with torch.no_grad():
        whole.weight.add_(product)
    assert_allclose(changed.detach(), whole(x).detach(), atol=CLOSE * float(changed.detach().abs().max()))
    assert list(merged(model).state_dict()) == list(nn.Sequential(layer).state_dict())
    assert_allclose(model(x).detach(), whole(x).detach(), atol=CLOSE * float(changed.detach().abs().max()))


@pytest.mark.parametrize(
    ("given", "learn"),
    [
        ({"kind": "lora", "targets": ["blocks.*.[qv]_proj"], "rank": 2}, 8 * 2 * 8),
        ({"kind": "lora", "targets": ["blocks.*.[qv]_proj"], "rank": 2, "factors": "second"}, 4 * 2 * 8),
        ({"kind": "lora", "targets": ["blocks.0.q_proj"], "rank": 2, "local_rank": 3, "trained": ["head.*"]}, 80 + 18),
        ({"kind": "bottleneck", "targets": ["blocks.*.mlp"], "features": 8, "width": 2}, 2 * (2 * 16 + 2 + 8)),
        ({"kind": "prompts", "targets": ["blocks.?"], "features": 8, "tokens": 3}, 2 * 24),
        ({"kind": "partial", "trained": ["*.norm.*"]}, 2 * 16),
    ],
)
def test_all_else_is_frozen_and_keeps_its_name_and_value(given: dict[str, Any], learn: int) -> None:
    torch.manual_seed(1)
    model, x = Network(), torch.randn(2, 5, 8)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attached = attach(model, adapters(**given))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == learn
    assert attached.frozen == model.state_dict().keys() - trained.keys()
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):  # What begins at zero hides what is behind it for one step.
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in base.items() if name not in trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    assert attached.local == {name for name in after if "lora_local" in name}


def test_adapters_keep_float32_over_a_base_of_16_bits() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.bfloat16))
    attach(model, adapters(kind="lora", targets=["0"], rank=1))
    assert model(torch.ones(1, 4, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert {model.state_dict()[name].dtype for name in added_values(model)} == {torch.float32}


def test_prompts_leave_no_token_behind() -> None:
    model, x = Network(), torch.randn(2, 5, 8)
    attach(model, adapters(kind="prompts", targets=["blocks.1"], features=8, tokens=3))
    assert model.blocks[1](x).shape == x.shape


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"kind": "lora", "targets": ["*.q_prj"]}, r"'\*\.q_prj' matches no layer.*blocks\.0\.q_proj"),
        ({"kind": "lora", "targets": ["blocks.0"]}, "blocks.0 is a Block, and LoRA is for linear and conv"),
        ({"kind": "lora", "targets": ["attention.out_proj"]}, "MultiheadAttention of torch, which does not call it"),
        ({"kind": "lora", "targets": ["depthwise"]}, "convolution of 4 groups"),
        ({"kind": "partial", "trained": ["haed.*"]}, r"'haed\.\*' matches no value.*head\."),
    ],
)
def test_what_cannot_be_adapted_is_refused(given: dict[str, Any], error: str) -> None:
    model = Network()
    model.add_module("attention", nn.MultiheadAttention(4, 2))
    model.add_module("depthwise", nn.Conv2d(4, 4, 3, groups=4))
    with pytest.raises(StudyError, match=error):
        attach(model, adapters(**given))


def test_a_wrong_width_is_named_when_tokens_come() -> None:
    model = Network()
    attach(model, adapters(kind="bottleneck", targets=["blocks.0.mlp"], features=7, width=2))
    with pytest.raises(StudyError, match=r"adapters\.features: 7, and what passes a Linear .* has 8"):
        model(torch.zeros(1, 2, 8))


def test_a_bottleneck_is_no_part_of_a_weight() -> None:
    model = Network()
    attach(model, adapters(kind="bottleneck", targets=["blocks.0.mlp"], features=8, width=2))
    with pytest.raises(StudyError, match="cannot be merged"):
        merged(model)
