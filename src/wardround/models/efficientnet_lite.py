"""EfficientNet-lite0: a small network for pictures of which public ImageNet weights exist in one file."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.models.lead import Lead
from wardround.study.models import ClassifierSettings, Layer

# Of each group of blocks: expansion, channels, blocks, stride of the first, kernel (Tan and Le, ICML 2019, table 1).
_GROUPS = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
_STEM, _HEAD = 32, 1280


class EfficientNetLiteSettings(ClassifierSettings):
    """EfficientNet-lite0, 4.7 million weights with 1,000 classes; `tiny` has a block a group and an eighth the head."""

    kind: Literal["efficientnet_lite"]
    head_parts: ClassVar[tuple[str, ...]] = ("classifier.*",)

    def build_classifier(self, dimensions: int, channels: int, classes: int) -> Any:
        """The network, without pretrained weights: those come from a file of the study's `start`."""
        if dimensions != 2:
            raise StudyError("model.kind: efficientnet_lite is for pictures; give task.dimensions 2, or take densenet")
        return EfficientNetLite(channels, classes, tiny=self.preset == "tiny")

    @property
    def represents(self) -> Layer:
        """What the last layer makes classes of."""
        return Layer("classifier", "input")


class EfficientNetLite(nn.Module):
    """EfficientNet-lite0: EfficientNet-B0 with ReLU6 and without squeeze-and-excitation, so that it runs anywhere.

    Its tensors stand in the order of those of the public PyTorch file, with its shapes. Images (B, C, H, W) -> (B, K).
    """

    def __init__(self, channels: int = 3, classes: int = 1000, *, tiny: bool = False) -> None:
        super().__init__()
        self.stem = _convolution(channels, _STEM, 3, 2)
        blocks, before = [], _STEM
        for expansion, width, count, stride, kernel in _GROUPS:
            for number in range(1 if tiny else count):
                blocks.append(_Block(before, width, expansion, kernel, stride if number == 0 else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        features = _HEAD // 8 if tiny else _HEAD
        self.head = _convolution(before, features, 1, 1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(features, classes))
        self.lead: Lead | None = None

    def layers(self) -> tuple[nn.Module, ...]:
        """All but the classifier; see `wardround.models.lead.Layered`."""
        return (self.stem, *self.blocks, self.head)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K)."""
        layers = self.layers()
        x = images if self.lead is None else self.lead(images)
        for layer in layers[0 if self.lead is None else len(self.lead) :]:
            x = layer(x)
        found: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return found


class _SamePadding(nn.Module):
    """Zeros around an image so that a convolution of stride s gives ceil(size / s): one more below and right than above
    and left where their number is odd, as TensorFlow does, in which the weights were trained."""

    def __init__(self, kernel: int, stride: int) -> None:
        super().__init__()
        self._kernel, self._stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (max((-(-n // self._stride) - 1) * self._stride + self._kernel - n, 0) for n in x.shape[2:])
        if not rows and not columns:
            return x
        return nn.functional.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def _convolution(before: int, after: int, kernel: int, stride: int, groups: int = 1, active: bool = True) -> nn.Module:
    layers = [
        _SamePadding(kernel, stride),
        nn.Conv2d(before, after, kernel, stride, groups=groups, bias=False),
        nn.BatchNorm2d(after, eps=1e-3, momentum=0.01),
    ]
    return nn.Sequential(*layers, nn.ReLU6()) if active else nn.Sequential(*layers)


class _Block(nn.Module):
    """A mobile inverted bottleneck: expand, filter each channel, project; added to its input where shapes agree."""

    def __init__(self, before: int, after: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        inside = before * expansion
        expand = [_convolution(before, inside, 1, 1)] if expansion > 1 else []
        self.layers = nn.Sequential(
            *expand,
            _convolution(inside, inside, kernel, stride, groups=inside),
            _convolution(inside, after, 1, 1, active=False),
        )
        self._adds = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(x)
        return found + x if self._adds else found
