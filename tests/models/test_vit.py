"""Vision transformers: patches against slices, what a masked autoencoder sees, and names that two kinds share."""

from __future__ import annotations

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from wardround.errors import StudyError
from wardround.models.adapters import attach
from wardround.models.mae_vit import MaskedViT, MaskedViTSettings
from wardround.models.transformer import grid_of, image_of, patches_of, positions
from wardround.models.vit import ViT, ViTSettings
from wardround.study.adapters import LoRA

PATCH = 4


def vit(dimensions: int = 2) -> ViT:
    torch.manual_seed(1)
    network: ViT = ViTSettings(kind="vit", preset="tiny").build_classifier(dimensions, 2, 5)
    return network


def masked(dimensions: int = 2) -> MaskedViT:
    torch.manual_seed(2)
    network: MaskedViT = MaskedViTSettings(kind="mae_vit", preset="tiny").build_pretrainer(dimensions, 2)
    return network


@pytest.mark.parametrize("size", [(8, 12), (8, 4, 12)])
def test_patches_are_slices_in_order(size: tuple[int, ...]) -> None:
    images = torch.randn(2, 3, *size)
    found, grid = patches_of(images, PATCH), grid_of(size, PATCH)
    for number, place in enumerate(itertools.product(*map(range, grid))):
        part = images[(slice(None), slice(None), *(slice(PATCH * n, PATCH * (n + 1)) for n in place))]
        assert torch.equal(found[:, number], part.flatten(1))
    assert torch.equal(image_of(found, grid, PATCH), images)


@pytest.mark.parametrize(("grid", "width"), [((2, 3), 48), ((2, 2, 2), 50)])
def test_every_place_is_told_apart(grid: tuple[int, ...], width: int) -> None:
    found = positions(grid, width, torch.device("cpu"))
    assert found.shape == (torch.Size(grid).numel(), width)
    apart = torch.cdist(found, found) + torch.eye(len(found))
    # The fastest angles of neighbours differ by 1.
    assert apart.min() > 0.5


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_masked_autoencoder_sees_what_is_kept_and_nothing_else(dimensions: int) -> None:
    network, grid = masked(dimensions), (2,) * dimensions
    images, kept = torch.randn(2, 2, *[8] * dimensions), torch.tensor([[0, 3], [1, 2]])
    patches = patches_of(images, PATCH)
    hidden = torch.ones(patches.shape[:2]).scatter(1, kept, 0.0)[..., None]
    found = network(images, kept)
    assert found.shape == patches.shape
    other = image_of(patches + 7.0 * hidden, grid, PATCH)
    assert torch.equal(network(other, kept), found)
    moved = image_of(patches + 7.0 * (1.0 - hidden), grid, PATCH)
    assert not torch.allclose(network(moved, kept), found)


def test_places_of_patches_count_and_their_order_does_not() -> None:
    """Sums of at most 8 values in another order, in float32, behind two blocks of about as many steps each."""
    network, images = vit().encoder, torch.randn(1, 2, 8, 16)
    whole, order = network(images), torch.randperm(8)
    assert torch.allclose(network(images, order[None]), whole[:, order], atol=1e-4)
    alike = torch.ones(1, 2, 8, 16)
    assert torch.pdist(network(alike)[0]).min() > 1e-2


@pytest.mark.parametrize("dimensions", [2, 3])
def test_both_kinds_have_the_same_encoder(dimensions: int) -> None:
    def shapes(network: nn.Module) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in network.state_dict().items() if name.startswith("encoder.")}

    assert shapes(vit(dimensions)) == shapes(masked(dimensions))
    others = {name.split(".")[0] for name in vit(dimensions).state_dict() if not name.startswith("encoder.")}
    assert others == {"head"}
    assert vit(dimensions)(torch.zeros(3, 2, *[8] * dimensions)).shape == (3, 5)


def test_adapters_reach_queries_and_values() -> None:
    network, images = vit(), torch.randn(1, 2, 8, 8)
    before = network(images)
    attach(network, LoRA(kind="lora", targets=("encoder.*.q_proj", "encoder.*.v_proj"), rank=2, trained=("head.*",)))
    assert torch.equal(network(images), before)
    network(images).sum().backward()
    moved = {name for name, value in network.named_parameters() if value.grad is not None and value.grad.any()}
    assert moved == {
        *(f"encoder.blocks.{n}.attention.{layer}.lora.b.weight" for n in range(2) for layer in ("q_proj", "v_proj")),
        "head.weight",
        "head.bias",
    }


def test_a_size_of_no_whole_patches_is_one_clear_error() -> None:
    says = r"task.size: 8 x 10 is no whole number of patches of 4; take multiples of it, or set model.patch"
    with pytest.raises(StudyError, match=says):
        ViTSettings(kind="vit", preset="tiny").check_size((8, 10))
    with pytest.raises(StudyError, match=says):
        vit()(torch.zeros(1, 2, 8, 10))
    ViTSettings(kind="vit", preset="tiny", patch=2).check_size((8, 10))


def test_a_study_sets_the_numbers_of_an_encoder() -> None:
    """ViT-L/16 of 1,000 classes has 304,326,632 values with a class token and learned places of 224 x 224 (timm)."""
    large = ViTSettings(kind="vit", preset="paper", width=1024, layers=24, heads=16)
    with torch.device("meta"):
        count = sum(value.numel() for value in large.build_classifier(2, 3, 1000).parameters())
    assert count == 304_326_632 - 1024 * (1 + 1 + 14 * 14)
    assert MaskedViTSettings(kind="mae_vit", preset="tiny", layers=3).build_pretrainer(2, 1).encoder.blocks[2]
    with pytest.raises(ValidationError, match=r"model\.heads: 5 heads do not share a width of 48 evenly"):
        ViTSettings(kind="vit", preset="tiny", heads=5)
