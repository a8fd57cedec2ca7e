"""TinyViT without its head, as LiteMedSAM has it: an image to a grid of embeddings, a quarter as fine on each side.

After Wu et al., *TinyViT*, ECCV 2022, section 3 and appendix A, with the changes of the published LiteMedSAM: the patch
embedding and the last merging do not halve the grid. Modules are named as in its checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wardround.models.checkpointing import Checkpointed


@dataclass(frozen=True)
class TinyViTShape:
    """Of each of the four stages: channels, blocks, heads, and pixels of a side of an attention window.

    The first stage is of convolutions, and its heads and window are not used. `neck`: channels of an embedding.
    """

    channels: tuple[int, int, int, int]
    blocks: tuple[int, int, int, int]
    heads: tuple[int, int, int, int]
    windows: tuple[int, int, int, int]
    neck: int


class TinyViT(nn.Module):
    """Images (B, 3, S, S), S a multiple of 4 -> embeddings (B, neck, S / 4, S / 4)."""

    def __init__(self, shape: TinyViTShape) -> None:
        super().__init__()
        first = shape.channels[0]
        self.patch_embed = _PatchEmbedding(first)
        stages: list[nn.Module] = []
        for number, width in enumerate(shape.channels):
            last = number == len(shape.channels) - 1
            following = None if last else _Merging(width, shape.channels[number + 1], 1 if number == 2 else 2)
            blocks = [
                _Inverted(width) if number == 0 else _Block(width, shape.heads[number], shape.windows[number])
                for _ in range(shape.blocks[number])
            ]
            stages.append(_Stage(blocks, following))
        self.layers = nn.ModuleList(stages)
        width, neck = shape.channels[-1], shape.neck
        self.neck = nn.Sequential(
            nn.Conv2d(width, neck, 1, bias=False),
            ChannelNorm(neck),
            nn.Conv2d(neck, neck, 3, padding=1, bias=False),
            ChannelNorm(neck),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings of images."""
        x = self.patch_embed(images)
        for stage in self.layers:
            x = stage(x)
        found: Tensor = self.neck(x)
        return found


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel: (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Each pixel's channels with mean 0 and variance 1, scaled and shifted."""
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        normal = (x - mean) * torch.rsqrt(variance + 1e-6)
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


class _Convolution(nn.Module):
    """A convolution `c` without a bias and its batch normalisation `bn`."""

    def __init__(self, before: int, after: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.bn(self.c(x))
        return found


class _PatchEmbedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(_Convolution(3, width // 2), nn.GELU(), _Convolution(width // 2, width))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.seq(x)
        return found


class _Stage(Checkpointed):
    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.through(block, x)
        return x if self.downsample is None else self.downsample(x)


class _Inverted(nn.Module):
    """A mobile inverted bottleneck that widens fourfold, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inside = 4 * width
        self.conv1 = _Convolution(width, inside)
        self.conv2 = _Convolution(inside, inside, 3, groups=inside)
        self.conv3 = _Convolution(inside, width)
        self.act = nn.GELU()
        # A block that does nothing at first.
        nn.init.zeros_(self.conv3.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(x + self.conv3(self.act(self.conv2(self.act(self.conv1(x))))))
        return found


class _Merging(nn.Module):
    """From one stage to the next: other channels, and a grid of every `stride`-th pixel."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _Convolution(before, after)
        self.conv2 = _Convolution(after, after, 3, stride, groups=after)
        self.conv3 = _Convolution(after, after)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv3(self.act(self.conv2(self.act(self.conv1(x)))))
        return found


class _Block(nn.Module):
    """Attention inside windows, a convolution of each channel, and a perceptron of each pixel."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.attn = _Attention(width, heads, window)
        self.local_conv = _Convolution(width, width, 3, groups=width)
        self.mlp = _Perceptron(width)
        self._window = window

    def forward(self, x: Tensor) -> Tensor:
        x = self.local_conv(x + self._attended(x))
        found: Tensor = x + self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return found

    def _attended(self, x: Tensor) -> Tensor:
        """Windows side by side, the last ones filled up with zeros: (B, C, H, W) -> the same."""
        batch, channels, height, width = x.shape
        side = self._window
        rows, columns = -(-height // side), -(-width // side)
        padded = nn.functional.pad(x, (0, columns * side - width, 0, rows * side - height))
        windows = padded.reshape(batch, channels, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        found = self.attn(windows.reshape(-1, side * side, channels))
        found = found.reshape(batch, rows, columns, side, side, channels).permute(0, 5, 1, 3, 2, 4)
        whole: Tensor = found.reshape(batch, channels, rows * side, columns * side)[..., :height, :width]
        return whole


class _Attention(nn.Module):
    """Attention among the pixels of a window, with a learned bias for each distance: (N, pixels, C) -> the same."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self._heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        for linear in (self.qkv, self.proj):
            _begin(linear)
        at = torch.arange(window)
        away = (at[:, None] - at).abs()
        # By how many rows and columns pixel (i, j) is away from (k, l), as one number.
        pairs = away[:, None, :, None] * window + away[None, :, None, :]
        self.away: Tensor
        self.register_buffer("away", pairs.reshape(window**2, window**2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        count, pixels, width = x.shape
        # A head's queries, keys and values lie together.
        parts = self.qkv(self.norm(x)).reshape(count, pixels, self._heads, 3, width // self._heads)
        q, k, v = parts.permute(3, 0, 2, 1, 4).unbind(0)
        found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.attention_biases[:, self.away])
        mixed: Tensor = self.proj(found.transpose(1, 2).reshape(count, pixels, width))
        return mixed


class _Perceptron(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.act = nn.GELU()
        for linear in (self.fc1, self.fc2):
            _begin(linear)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc2(self.act(self.fc1(self.norm(x))))
        return found


def _begin(linear: Any) -> None:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
