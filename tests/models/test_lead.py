"""Frozen leading layers: what they give of an image is computed once, and is what the layers give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from wardround.learning.frozen import freeze, remember, train_mode
from wardround.models.efficientnet_lite import EfficientNetLite
from wardround.models.lead import Lead


class Counting(nn.Module):
    """Doubles, and counts the images that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return 2.0 * x


def test_an_image_passes_once_and_alone() -> None:
    layer, images = Counting(), torch.arange(12.0).reshape(3, 1, 2, 2)
    lead = Lead([layer])
    assert torch.equal(lead(images), 2.0 * images)
    assert torch.equal(lead(images.flip(0)), 2.0 * images.flip(0))
    assert layer.seen == 3
    assert torch.equal(lead(images[:1] + 1.0), 2.0 * (images[:1] + 1.0))
    assert layer.seen == 4


def test_no_more_is_kept_than_there_is_room_for() -> None:
    layer, images = Counting(), torch.arange(12.0).reshape(3, 1, 2, 2)
    lead = Lead([layer], capacity=2 * 16)
    lead(images)
    lead(images)
    assert layer.seen == 3 + 1


@pytest.mark.parametrize("patterns", [("stem.*", "blocks.0.*"), ("blocks.0.*",), ("stem.*", "blocks.1.*")])
def test_a_network_with_a_lead_gives_and_learns_what_it_does_without(patterns: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    plain = EfficientNetLite(1, 3, tiny=True)
    freeze(plain, patterns)
    kept = copy.deepcopy(plain)
    remember(kept)
    leading = {("stem.*", "blocks.0.*"): 2, ("stem.*", "blocks.1.*"): 1}.get(patterns)
    assert (None if kept.lead is None else len(kept.lead)) == leading
    assert list(kept.state_dict()) == list(plain.state_dict())
    images = torch.randn(4, 1, 16, 16)
    found = []
    for model in (plain, kept):
        train_mode(model)
        torch.manual_seed(1)
        out = model(images)
        out.square().sum().backward()
        gradient = model.classifier[1].weight.grad
        assert gradient is not None
        found.append((out.detach(), gradient))
    # A product of a batch may be summed in another order than that of one image.
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


def test_a_copy_on_another_device_has_layers_of_its_own() -> None:
    model = EfficientNetLite(1, 3, tiny=True)
    freeze(model, ["stem.*"])
    remember(model)
    copied = copy.deepcopy(model).to("meta").eval()
    assert copied(torch.zeros(2, 1, 16, 16, device="meta")).shape == (2, 3)
    assert model.eval()(torch.zeros(2, 1, 16, 16)).device.type == "cpu"
