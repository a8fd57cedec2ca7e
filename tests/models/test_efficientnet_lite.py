"""EfficientNet-lite0: its size and padding, and that a study starts from the public file's tensors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from wardround.errors import StudyError
from wardround.models.efficientnet_lite import EfficientNetLite, EfficientNetLiteSettings, _convolution

EXAMPLE = Path(__file__).parents[2] / "examples" / "efficientnet_lite_weights.py"


@pytest.fixture(scope="module")
def convert() -> Any:
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.convert


def test_it_has_the_weights_of_the_published_network() -> None:
    # 4,652,008 with 1,000 classes: Google's table says 4.7 million.
    assert sum(p.numel() for p in EfficientNetLite().parameters()) == 4_652_008
    for size in ((32, 32), (33, 47)):
        assert EfficientNetLite(1, 5, tiny=True)(torch.zeros(2, 1, *size)).shape == (2, 5)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [7, 8])
def test_a_convolution_keeps_the_size_over_the_stride_rounded_up(kernel: int, stride: int, size: int) -> None:
    assert _convolution(1, 1, kernel, stride)(torch.zeros(1, 1, size, size)).shape[2:] == (-(-size // stride),) * 2


def test_of_an_even_image_zeros_come_below_and_right_first() -> None:
    layers = _convolution(1, 1, 3, 2)
    padded = layers[0](torch.ones(1, 1, 8, 8))  # type: ignore[index]
    assert padded.shape[2:] == (9, 9)
    assert padded[0, 0, 0, 0] == 1.0
    assert not padded[0, 0, -1].any()


def test_public_weights_become_a_file_to_start_from(convert: Any, tmp_path: Path) -> None:
    network = EfficientNetLite()
    theirs = {f"t{number}": tensor for number, tensor in enumerate(network.state_dict().values())}
    *names, weight, bias = theirs
    public = {name: theirs[name] for name in names} | {"_fc.weight": theirs[weight], "_fc.bias": theirs[bias]}
    torch.save(public, tmp_path / "public.pth")
    assert len(convert(tmp_path / "public.pth", tmp_path / "own.safetensors")) == 64
    other = EfficientNetLite(classes=2)
    left = other.load_state_dict(load_file(tmp_path / "own.safetensors"), strict=False)
    assert all("classifier" in name or "num_batches" in name for name in left.missing_keys)
    last = "blocks.15.layers.2.1.weight"
    assert torch.equal(other.state_dict()[last], network.state_dict()[last])
    torch.save({"_fc.weight": theirs[weight]}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the weights"):
        convert(tmp_path / "other.pth", tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_volumes_are_refused() -> None:
    with pytest.raises(StudyError, match="for pictures"):
        EfficientNetLiteSettings(kind="efficientnet_lite").build_classifier(3, 1, 2)
