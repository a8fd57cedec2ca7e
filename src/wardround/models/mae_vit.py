"""A masked autoencoder: a vision transformer sees a few patches of an image, and a light decoder says the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from wardround.models.checkpointing import Checkpointed
from wardround.models.transformer import Block, Encoder, EncoderSettings, Sizes, begin_layers, grid_of, positions
from wardround.study.models import Preset
from wardround.study.tasks import Modality

# Of each decoder: values of a token, blocks, heads.
_DECODERS: dict[Preset, tuple[int, int, int]] = {"tiny": (24, 1, 2), "small": (96, 2, 3), "paper": (512, 8, 16)}


class MaskedViTSettings(EncoderSettings):
    """Masked autoencoder (He et al., CVPR 2022); its `encoder.*` is that of a `vit` of the same numbers."""

    modalities: ClassVar[frozenset[Modality] | None] = frozenset()

    kind: Literal["mae_vit"]

    def build_pretrainer(self, dimensions: int, channels: int) -> Any:
        """The network; see `MaskedViT`."""
        return MaskedViT(dimensions, channels, self.sizes, _DECODERS[self.preset])

    def patch_size(self) -> int:
        """Voxels of a patch along each axis."""
        return self.sizes.patch


class MaskedViT(nn.Module):
    """Images (B, C, *size) and the places of the patches that are seen, (B, V) -> all patches (B, N, C patch^d)."""

    def __init__(self, dimensions: int, channels: int, sizes: Sizes, decoder: tuple[int, int, int]) -> None:
        super().__init__()
        self.encoder = Encoder(dimensions, channels, sizes)
        self.decoder = _Decoder(sizes.width, channels * sizes.patch**dimensions, *decoder)

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        """What the patches are said to be, each with mean 0 and deviation 1; those that are seen, too."""
        grid = grid_of(images.shape[2:], self.encoder.size)
        found: Tensor = self.decoder(self.encoder(images, kept), kept, grid)
        return found


class _Decoder(Checkpointed):
    def __init__(self, before: int, pixels: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(before, width)
        self.hidden = nn.Parameter(torch.empty(width).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.pixels = nn.Linear(width, pixels)
        begin_layers(self)

    def forward(self, seen: Tensor, kept: Tensor, grid: Sequence[int]) -> Tensor:
        """Tokens (B, V, before) of the patches at `kept` -> all patches."""
        known = self.embed(seen)
        places = positions(grid, known.shape[2], known.device)
        # A stand-in wherever nothing was seen; places of an image are all different.
        every = self.hidden.to(known.dtype).expand(len(known), len(places), -1)
        x = every.scatter(1, kept[..., None].expand(-1, -1, known.shape[2]), known) + places
        for block in self.blocks:
            x = self.through(block, x)
        found: Tensor = self.pixels(self.norm(x))
        return found
