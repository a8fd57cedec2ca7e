"""A vision transformer that classifies: the mean of what its tokens say goes to a head."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from wardround.models.transformer import Encoder, EncoderSettings, Sizes
from wardround.study.models import ClassifierSettings, Layer


class ViTSettings(ClassifierSettings, EncoderSettings):
    """Vision transformer (Dosovitskiy et al., ICLR 2021) with the mean of its tokens; `paper` is ViT-B."""

    kind: Literal["vit"]
    head_parts: ClassVar[tuple[str, ...]] = ("head.*",)

    def build_classifier(self, dimensions: int, channels: int, classes: int) -> Any:
        """The network."""
        return ViT(dimensions, channels, classes, self.sizes)

    @property
    def represents(self) -> Layer:
        """What the head makes classes of."""
        return Layer("head", "input")


class ViT(nn.Module):
    """Images (B, C, *size) -> logits (B, K)."""

    def __init__(self, dimensions: int, channels: int, classes: int, sizes: Sizes) -> None:
        super().__init__()
        self.encoder = Encoder(dimensions, channels, sizes)
        self.head = nn.Linear(sizes.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K)."""
        found: Tensor = self.head(self.encoder(images).mean(dim=1))
        return found
