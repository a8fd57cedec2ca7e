"""The workload of overhead.py: a MONAI UNet on made-up images with made-up masks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

from wardround.tasks.task import Dataset, MetricSpec, Source, Split

IMAGES = 64
SIZE = 128


@dataclass(frozen=True)
class Images:
    """Images (N, 1, 128, 128) and masks of one site."""

    images: Tensor
    masks: Tensor

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.numpy().tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int], random: np.random.Generator) -> tuple[Tensor, Tensor]:
        return self.images[list(indices)], self.masks[list(indices)]

    def patients(self, split: Split) -> int:
        return IMAGES if split == "train" else 0

    def evaluation(self, split: Split) -> Iterator[tuple[int, Any]]:
        return iter(())


class UNetTask:
    """Binary segmentation with a UNet of 16-32-64-128 channels, 162,007 parameters."""

    metrics: tuple[MetricSpec, ...] = ()

    def build_model(self) -> nn.Module:
        return UNet(2, 1, 1, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=0)

    def dataset(self, site: str, source: Source) -> Images:
        return site_images(int(site.removeprefix("S")))

    def pooled(self, parts: Sequence[Dataset]) -> Dataset:
        raise ValueError("this workload has no pooled arm")

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, masks = batch
        return nn.functional.binary_cross_entropy_with_logits(model(images), masks)

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {}


def site_images(number: int) -> Images:
    """The data of site `number`."""
    random = torch.Generator().manual_seed(number)
    images = torch.randn(IMAGES, 1, SIZE, SIZE, generator=random)
    smooth = nn.functional.avg_pool2d(images, 9, stride=1, padding=4)
    return Images(images, (smooth > 0.1).float())
