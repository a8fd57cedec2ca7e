"""The encoder of vision transformers: patches of an image as tokens, through blocks of attention.

Attention has layers of its own for queries, keys and values, so that adapters reach them. Positions are fixed sines and
cosines (He et al., CVPR 2022), so no value depends on how large images are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from wardround.errors import StudyError
from wardround.models.checkpointing import Checkpointed
from wardround.study.models import Preset, PresetSettings

_SLOWEST = 10_000.0


@dataclass(frozen=True)
class Sizes:
    """Of an encoder: voxels of a patch along each axis, values of a token, blocks, heads of each."""

    patch: int
    width: int
    layers: int
    heads: int


_SIZES: dict[Preset, Sizes] = {
    "tiny": Sizes(4, 48, 2, 2),
    "small": Sizes(8, 192, 6, 3),
    "paper": Sizes(16, 768, 12, 12),
}


class EncoderSettings(PresetSettings):
    """The base of networks with such an encoder: its numbers, by preset or one by one."""

    patch: int | None = Field(
        None, ge=1, description="voxels of a patch along each axis; default 4 of `tiny`, 8 of `small`, 16 of `paper`"
    )
    width: int | None = Field(None, ge=1, description="values of a token; default 48, 192, 768")
    layers: int | None = Field(None, ge=1, description="blocks; default 2, 6, 12")
    heads: int | None = Field(None, ge=1, description="heads of each block; default 2, 3, 12")

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.sizes.width % self.sizes.heads:
            raise ValueError(
                f"model.heads: {self.sizes.heads} heads do not share a width of {self.sizes.width} evenly; take a "
                "divisor of it"
            )
        return self

    @property
    def sizes(self) -> Sizes:
        """Those of the preset, but for what the study says."""
        given = {key: value for key in _SIZES[self.preset].__dict__ if (value := getattr(self, key)) is not None}
        return replace(_SIZES[self.preset], **given)

    def check_size(self, size: Sequence[int]) -> None:
        """Raises StudyError for images of no whole number of patches."""
        grid_of(size, self.sizes.patch)


class Encoder(Checkpointed):
    """Images (B, C, *size) -> tokens (B, patches, width)."""

    def __init__(self, dimensions: int, channels: int, sizes: Sizes) -> None:
        super().__init__()
        self.size = sizes.patch
        self.patch = nn.Linear(channels * sizes.patch**dimensions, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        begin_layers(self)

    def forward(self, images: Tensor, kept: Tensor | None = None) -> Tensor:
        """Tokens of all patches, or of those at `kept` (B, V): the others are not computed."""
        patches = patches_of(images, self.size)
        places = positions(grid_of(images.shape[2:], self.size), self.norm.normalized_shape[0], images.device)
        if kept is None:
            x = self.patch(patches) + places
        else:
            chosen = kept[..., None].expand(-1, -1, patches.shape[2])
            x = self.patch(patches.gather(1, chosen)) + places[kept]
        for block in self.blocks:
            x = self.through(block, x)
        found: Tensor = self.norm(x)
        return found


class Block(nn.Module):
    """Attention, then a perceptron, each on normalised tokens and added to them: (B, N, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of the same shape."""
        x = x + self.attention(self.norm1(x))
        found: Tensor = x + self.mlp(self.norm2(x))
        return found


class Attention(nn.Module):
    """Self-attention of several heads, each projection a layer that is called: (B, N, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of the same shape."""
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        found: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return found


def begin_layers(network: nn.Module) -> None:
    """As He et al.: Glorot's uniform weights and no bias."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


# Patches ------------------------------------------------------------------------------------------------------------


def grid_of(size: Sequence[int], patch: int) -> tuple[int, ...]:
    """How many patches of `patch` voxels lie along each axis of an image; raises StudyError where one is cut off."""
    if any(n < patch or n % patch for n in size):
        shown = " x ".join(map(str, size))
        raise StudyError(
            f"task.size: {shown} is no whole number of patches of {patch}; take multiples of it, or set model.patch"
        )
    return tuple(n // patch for n in size)


def patches_of(images: Tensor, patch: int) -> Tensor:
    """(B, C, *size) -> (B, N, C patch^d), the last axis of an image fastest."""
    grid = grid_of(images.shape[2:], patch)
    axes = range(len(grid))
    split = images.reshape(*images.shape[:2], *(n for along in grid for n in (along, patch)))
    ordered = split.permute(0, *(2 + 2 * a for a in axes), 1, *(3 + 2 * a for a in axes))
    return ordered.reshape(len(images), math.prod(grid), -1)


def image_of(patches: Tensor, grid: Sequence[int], patch: int) -> Tensor:
    """(B, N, C patch^d) -> (B, C, *size): what `patches_of` undoes."""
    axes = range(len(grid))
    split = patches.reshape(len(patches), *grid, -1, *(patch for _ in grid))
    ordered = split.permute(0, 1 + len(grid), *(n for a in axes for n in (1 + a, 2 + len(grid) + a)))
    return ordered.reshape(len(patches), -1, *(n * patch for n in grid))


def positions(grid: Sequence[int], width: int, device: torch.device) -> Tensor:
    """(N, width): sines and cosines of each axis, of periods from 2 pi to 2 pi 10,000; zero where width does not go
    into them."""
    count = width // (2 * len(grid))
    speeds = _SLOWEST ** (-torch.arange(count, device=device) / count)
    parts = []
    for axis, along in enumerate(grid):
        angles = torch.arange(along, device=device)[:, None] * speeds
        shape = [along if a == axis else 1 for a in range(len(grid))]
        parts += [made.reshape(*shape, count).expand(*grid, count) for made in (angles.sin(), angles.cos())]
    return functional.pad(torch.cat(parts, dim=-1).flatten(0, -2), (0, width - 2 * count * len(grid)))
