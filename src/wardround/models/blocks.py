"""Small convolutional networks that predict what to add to an image: the parts of the unrolled ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, pixel_shuffle, pixel_unshuffle

from wardround.models.conditioning import Modulation, modulated

Norm = Literal["none", "batch", "instance"]


class Denoiser(nn.Module):
    """A stack of 3x3 convolutions that predicts what to add to an image (DnCNN, Zhang et al. 2017).

    `parts` is 2 for complex images and 1 for real ones.
    `scale` s folds s x s pixels into channels first and back last (pixel shuffle), so the stack runs on
    images s times smaller in each direction: on a processor that is the cheaper way to the same field of
    view. Weights start at He's scale, which keeps the size of the signal through the stack, those of the
    last layer at zero: an untrained denoiser is the identity. `norm` stands between the inner layers.
    `guides` is the number of further images that it sees and does not change. Without `bias` (and `norm`) it is
    homogeneous, D(c x) = c D(x) for c > 0, and serves noise of levels that it never saw (Mohan et al., ICLR 2020).
    """

    def __init__(
        self,
        channels: int,
        layers: int,
        *,
        parts: int = 2,
        scale: int = 1,
        norm: Norm = "none",
        guides: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.scale = scale
        folded = parts * scale * scale
        stack: list[nn.Module] = [convolution((1 + guides) * folded, channels, bias=bias), nn.ReLU()]
        for _ in range(layers - 2):
            # A bias in front of a normalisation would be subtracted again.
            stack += [convolution(channels, channels, bias=bias and norm == "none"), *_norm(norm, channels), nn.ReLU()]
        last = convolution(channels, folded, bias=bias)
        nn.init.zeros_(last.weight)
        self.stack = nn.Sequential(*stack, last)
        # What stands right before a ReLU, where a normalisation does not undo it.
        self.blocks = {str(i - 1): channels for i, layer in enumerate(stack) if isinstance(layer, nn.ReLU)}
        #: The module in the middle, where methods look for what the network makes of an image.
        self.bottleneck = f"stack.{list(self.blocks)[(layers - 1) // 2]}"

    @property
    def encoder_parts(self) -> tuple[str, ...]:
        """The first two thirds of its convolutions, with what follows each: six of nine in ModFed (Wu et al., 2024)."""
        places = [place for place, layer in enumerate(self.stack) if isinstance(layer, nn.Conv2d)]
        end = places[round(2 * len(places) / 3)]
        return tuple(f"stack.{place}" for place in range(end))

    def forward(self, image: Tensor, films: Modulation | None = None, guides: Sequence[Tensor] = ()) -> Tensor:
        """Images (B, H, W) of the same type in and out; sizes that `scale` does not divide are padded inside."""
        films = films or {}

        def change(h: Tensor) -> Tensor:
            for name, layer in self.stack.named_children():
                h = modulated(layer(h), films, name)
            return h

        return _with_change(image, guides, change, self.scale)


class ResidualUNet(nn.Module):
    """A small U-Net that predicts what to add to an image: as `Denoiser`, with a wider field of view.

    Level l has channels 2^l feature maps at half the resolution of the level above, two convolutions down and one
    up; skips are concatenated (Ronneberger et al., MICCAI 2015). Untrained, it is the identity. `bias` as in
    `Denoiser`.
    """

    def __init__(
        self, channels: int, levels: int, *, parts: int = 2, scale: int = 1, guides: int = 0, bias: bool = True
    ) -> None:
        super().__init__()
        self.scale = scale
        self.levels = levels
        folded = parts * scale * scale
        widths = [channels * 2**level for level in range(levels)]
        above = [(1 + guides) * folded, *widths]
        strides = [1] + [2] * (levels - 1)
        self.down = nn.ModuleList(convolution(above[i], w, stride=strides[i], bias=bias) for i, w in enumerate(widths))
        self.inner = nn.ModuleList(convolution(w, w, bias=bias) for w in widths)
        self.up = nn.ModuleList(convolution(w + 2 * w, w, bias=bias) for w in widths[:-1])
        self.last = convolution(channels, folded, bias=bias)
        nn.init.zeros_(self.last.weight)
        self.blocks = {f"{part}.{i}": w for part in ("down", "inner") for i, w in enumerate(widths)}
        self.blocks |= {f"up.{i}": w for i, w in enumerate(widths[:-1])}
        #: The module of the deepest level, where methods look for what the network makes of an image.
        self.bottleneck = f"inner.{levels - 1}"

    @property
    def encoder_parts(self) -> tuple[str, ...]:
        """The way down."""
        return ("down", "inner")

    def forward(self, image: Tensor, films: Modulation | None = None, guides: Sequence[Tensor] = ()) -> Tensor:
        """Images (B, H, W) of the same type in and out; sizes that are no multiple are padded inside."""
        films = films or {}

        def block(part: str, level: int, h: Tensor) -> Tensor:
            layer = getattr(self, part)[level]
            return torch.relu(modulated(layer(h), films, f"{part}.{level}"))

        def change(h: Tensor) -> Tensor:
            skips = []
            for level in range(self.levels):
                h = block("inner", level, block("down", level, h))
                skips.append(h)
            for level in reversed(range(self.levels - 1)):
                h = block("up", level, torch.cat([skips[level], interpolate(h, scale_factor=2)], 1))
            result: Tensor = self.last(h)
            return result

        return _with_change(image, guides, change, self.scale, multiple=2 ** (self.levels - 1))


def as_channels(image: Tensor) -> Tensor:
    """Complex (B, H, W) -> real (B, 2, H, W); real (B, H, W) -> (B, 1, H, W)."""
    return torch.view_as_real(image).permute(0, 3, 1, 2) if image.is_complex() else image.unsqueeze(1)


def from_channels(channels: Tensor) -> Tensor:
    """Real (B, 2, H, W) -> complex (B, H, W); (B, 1, H, W) -> real (B, H, W)."""
    if channels.shape[1] == 1:
        return channels.squeeze(1)
    return torch.view_as_complex(channels.permute(0, 2, 3, 1).contiguous())


def convolution(inputs: int, outputs: int, *, bias: bool = True, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution at He's scale (ICCV 2015), which trains much faster here than torch's default."""
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias, stride=stride)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _with_change(
    image: Tensor, guides: Sequence[Tensor], change: Callable[[Tensor], Tensor], scale: int, *, multiple: int = 1
) -> Tensor:
    """The image plus what `change` makes of its and the guides' folded pixels, padded to whole ones."""
    channels = as_channels(image)
    height, width = image.shape[-2:]
    seen = torch.cat([channels, *map(as_channels, guides)], 1) if guides else channels
    whole = pad(seen, (0, -width % (scale * multiple), 0, -height % (scale * multiple)))
    added = pixel_shuffle(change(pixel_unshuffle(whole, scale)), scale)
    return from_channels(channels + added[..., :height, :width])


def _norm(kind: Norm, channels: int) -> tuple[nn.Module, ...]:
    if kind == "batch":
        return (nn.BatchNorm2d(channels),)
    if kind == "instance":
        return (nn.InstanceNorm2d(channels, affine=True),)
    return ()
