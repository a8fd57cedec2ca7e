"""The workload of bill.py: two classes of made-up images, and a vision transformer as large as ViT-L/16."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from wardround.tasks.task import Dataset, MetricSpec, Source, Split

SIZE, PATCH = 224, 16


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm (Dosovitskiy et al., ICLR 2021)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, width) -> the same."""
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        moved: Tensor = x + self.mlp(self.norm2(x))
        return moved


class Transformer(nn.Module):
    """ViT-L/16: 24 blocks of width 1024 with 16 heads, about 304 million values."""

    def __init__(self, depth: int = 24, width: int = 1024, heads: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.zeros(1, (SIZE // PATCH) ** 2 + 1, width))
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 224, 224) -> (B, 2)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(images), -1, -1), tokens], dim=1) + self.position
        scores: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return scores


@dataclass(frozen=True)
class Images:
    """Images (N, 3, 224, 224) of one site, one a patient, and their classes."""

    images: Tensor
    classes: Tensor

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return 2

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> tuple[Tensor, Tensor]:
        return self.images[list(indices)], self.classes[list(indices)]

    def patients(self, split: Split) -> int:
        return 2 if split == "train" else 1

    def evaluation(self, split: Split) -> Iterator[tuple[int, Any]]:
        if split != "train":
            yield 2, (self.images[2:], self.classes[2:])


class LargeTask:
    """Two classes."""

    metrics = (MetricSpec("accuracy", 0.0, 1.0, 1e-6, True),)

    def __init__(self, depth: int = 24) -> None:
        self._depth = depth

    def build_model(self) -> nn.Module:
        return Transformer(self._depth)

    def dataset(self, site: str, source: Source) -> Images:
        random = torch.Generator().manual_seed(ord(site[-1]))
        return Images(torch.randn(3, 3, SIZE, SIZE, generator=random), torch.tensor([0, 1, 0]))

    def pooled(self, parts: Sequence[Dataset]) -> Dataset:
        raise ValueError("this workload has no pooled arm")

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, classes = batch
        return functional.cross_entropy(model(images), classes)

    def score(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, classes = batch
        return {"accuracy": (model(images).argmax(dim=1) == classes).float()}


def make_task(**options: Any) -> LargeTask:
    """The factory that the study names."""
    return LargeTask(**options)
