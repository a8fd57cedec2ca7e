"""MONAI's networks for classification, by name and size: images in, a logit for every class out."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from wardround.study.models import ClassifierSettings, Layer, Preset

_DENSE: dict[Preset, tuple[int, int, tuple[int, ...]]] = {
    "tiny": (8, 4, (2, 2)),
    "small": (24, 12, (3, 6, 12, 8)),
    "paper": (64, 32, (6, 12, 24, 16)),
}


class DenseNetSettings(ClassifierSettings):
    """DenseNet (Huang et al., CVPR 2017); `paper` is DenseNet-121."""

    kind: Literal["densenet"]
    head_parts: ClassVar[tuple[str, ...]] = ("class_layers.*",)

    def build_classifier(self, dimensions: int, channels: int, classes: int) -> Any:
        """The network."""
        from monai.networks.nets import DenseNet

        first, growth, blocks = _DENSE[self.preset]
        return DenseNet(dimensions, channels, classes, first, growth, blocks)

    @property
    def represents(self) -> Layer:
        """What the last layer makes classes of."""
        return Layer("class_layers.out", "input")


_RESNET: dict[Preset, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "tiny": ("basic", (1, 1, 1, 1), (8, 8, 16, 16)),
    "small": ("basic", (1, 1, 1, 1), (32, 64, 128, 256)),
    "paper": ("basic", (2, 2, 2, 2), (64, 128, 256, 512)),
}


class ResNetSettings(ClassifierSettings):
    """ResNet (He et al., CVPR 2016); `paper` is ResNet-18."""

    kind: Literal["resnet"]
    head_parts: ClassVar[tuple[str, ...]] = ("fc.*",)

    def build_classifier(self, dimensions: int, channels: int, classes: int) -> Any:
        """The network."""
        from monai.networks.nets import ResNet

        block, layers, planes = _RESNET[self.preset]
        return ResNet(
            block, list(layers), list(planes), spatial_dims=dimensions, n_input_channels=channels, num_classes=classes
        )

    @property
    def represents(self) -> Layer:
        """What the last layer makes classes of."""
        return Layer("fc", "input")


_EFFICIENT: dict[Preset, str] = {"tiny": "efficientnet-b0", "small": "efficientnet-b0", "paper": "efficientnet-b4"}


class EfficientNetSettings(ClassifierSettings):
    """EfficientNet (Tan and Le, ICML 2019): B0, or B4 as `paper`."""

    kind: Literal["efficientnet"]
    head_parts: ClassVar[tuple[str, ...]] = ("_fc.*",)

    def build_classifier(self, dimensions: int, channels: int, classes: int) -> Any:
        """The network, without pretrained weights: those come from a file of the study's `start`."""
        from monai.networks.nets import EfficientNetBN

        return EfficientNetBN(_EFFICIENT[self.preset], False, True, dimensions, channels, classes)

    @property
    def represents(self) -> Layer:
        """What the last layer makes classes of, before any is dropped out."""
        return Layer("_avg_pooling")
