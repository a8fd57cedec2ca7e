"""A Swin transformer that denoises complex images, between conjugate-gradient steps that fit them to the data.

z_k = D(x_k),  x_{k+1} = (A* A + lambda I)^-1 (A* y + lambda z_k),  starting at x_0 = A* y

as MoDL (Aggarwal, Mani & Jacob, IEEE TMI 38 (2019), 394) with one D for all iterations: attention inside windows that
every second block shifts by half (Liu et al., *Swin Transformer*, ICCV 2021), in groups that end in a convolution
(Liang et al., *SwinIR*, ICCVW 2021). Each block may have deep prompts: learned tokens that its windows see beside their
own (Jia et al., *Visual prompt tuning*, ECCV 2022), for studies that train and exchange nothing else (Feng et al.,
*FedPR*, CVPR 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from wardround.imaging.acquisition.operator import LinearOperator
from wardround.models.blocks import as_channels, convolution, from_channels
from wardround.models.checkpointing import Checkpointed
from wardround.models.transformer import begin_layers
from wardround.study.models import PresetSettings
from wardround.study.tasks import Modality

_MLP = 2  # times the width, as in SwinIR


@dataclass(frozen=True)
class SwinShape:
    """Everything that decides the network's parameters and cost; see `PRESETS`.

    `groups` of `layers` blocks each, with tokens of `width` values, attention of `heads` heads in windows of
    `window` x `window` tokens, and `prompts` learned tokens a block. A token is `scale` x `scale` pixels.
    """

    unrolls: int
    cg_iterations: int
    width: int
    groups: int
    layers: int
    heads: int
    window: int = 8
    scale: int = 2
    prompts: int = 0
    initial_weight: float = 0.05


PRESETS = {
    "tiny": SwinShape(unrolls=2, cg_iterations=4, width=16, groups=1, layers=2, heads=2, window=4),
    "small": SwinShape(unrolls=3, cg_iterations=6, width=48, groups=2, layers=2, heads=4),
    "paper": SwinShape(unrolls=3, cg_iterations=10, width=180, groups=6, layers=6, heads=6, scale=1),
}


def swin_shape(config: SwinDenoiserSettings) -> SwinShape:
    """The preset of a study with its own choices on top."""
    chosen = config.model_dump(exclude={"kind", "preset"}, exclude_none=True)
    return replace(PRESETS[config.preset], **chosen)


class SwinReconstruction(nn.Module):
    """Reconstructs complex images from measurements through any linear operator; the equation is the module's.

    Images are expected on a scale of about [0, 1]. `weight`, the lambda of the equation, is exp(log_weight), so it
    stays positive; each solve starts at the denoised image. Untrained, D is the identity.
    """

    #: Adapters of kind `prompts` put tokens before a block's, which windows cannot have; `*.prompts` are its own.
    takes_prompts = False

    def __init__(self, shape: SwinShape) -> None:
        super().__init__()
        self.unrolls = shape.unrolls
        self.cg_iterations = shape.cg_iterations
        self.denoiser = SwinDenoiser(shape)
        self.log_weight = nn.Parameter(torch.tensor(math.log(shape.initial_weight)))

    @property
    def weight(self) -> Tensor:
        """How much the denoised image counts against the data; a positive 0-d tensor."""
        return self.log_weight.exp()

    def forward(self, operator: LinearOperator, data: Tensor) -> Tensor:
        """Measured data (B, *data_shape) -> complex images (B, H, W)."""
        adjoint = operator.A_adjoint(data)
        weight = self.weight
        image = operator.initial(data)
        for _ in range(self.unrolls):
            prior = self.denoiser(image)
            image = operator.solve(adjoint + weight * prior, weight, iterations=self.cg_iterations, start=prior)
        return image


class SwinDenoiser(nn.Module):
    """Adds to complex images (B, H, W) what a Swin transformer makes of them.

    `scale` s folds s x s pixels into a token. Images of any size: they are padded with zeros to whole windows inside.
    The last layer starts at zero, so an untrained denoiser is the identity.
    """

    def __init__(self, shape: SwinShape, *, parts: int = 2) -> None:
        super().__init__()
        self.scale = shape.scale
        self.window = shape.window
        folded = parts * shape.scale**2
        self.first = convolution(folded, shape.width)
        self.groups = nn.ModuleList(Group(shape) for _ in range(shape.groups))
        self.norm = nn.LayerNorm(shape.width)
        self.body = convolution(shape.width, shape.width)
        self.last = convolution(shape.width, folded)
        nn.init.zeros_(self.last.weight)

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, H, W) of the same type in and out."""
        channels = as_channels(image)
        height, width = image.shape[-2:]
        whole = self.scale * self.window
        padded = pad(channels, (0, -width % whole, 0, -height % whole))
        shallow = self.first(pixel_unshuffle(padded, self.scale))
        h = shallow
        apart = separated(h.shape[-2], h.shape[-1], self.window, h.device)
        for group in self.groups:
            h = group(h, apart)
        deep = self.norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        added = pixel_shuffle(self.last(shallow + self.body(deep)), self.scale)
        return from_channels(channels + added[..., :height, :width])


class Group(Checkpointed):
    """Blocks, every second one with shifted windows, and a convolution of what they make, which is added."""

    def __init__(self, shape: SwinShape) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(shape, shifted=number % 2 == 1) for number in range(shape.layers))
        self.convolution = convolution(shape.width, shape.width)

    def forward(self, x: Tensor, apart: Tensor) -> Tensor:
        """Feature maps (B, width, H, W) of the same shape; `apart` as `separated` gives it."""
        tokens = x.permute(0, 2, 3, 1)
        for block in self.blocks:
            tokens = self.through(block, tokens, apart)
        found: Tensor = x + self.convolution(tokens.permute(0, 3, 1, 2))
        return found


class Block(nn.Module):
    """Attention inside windows, then a perceptron, each on normalised tokens and added to them: (B, H, W, width).

    `prompts`, (1, tokens, width), are normalised like tokens, and every window attends to them beside its own tokens,
    with no bias for where they are. What a block makes of its prompts themselves is dropped, for the next has its own.
    """

    prompts: nn.Parameter | None

    def __init__(self, shape: SwinShape, *, shifted: bool) -> None:
        super().__init__()
        self.window = shape.window
        self.shift = shape.window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(shape.width)
        self.attention = WindowAttention(shape.width, shape.heads, shape.window)
        self.norm2 = nn.LayerNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, _MLP * shape.width), nn.GELU(), nn.Linear(_MLP * shape.width, shape.width)
        )
        begin_layers(self)
        # Last, so that a network without prompts begins with the same values elsewhere.
        self.register_parameter("prompts", None)
        if shape.prompts:
            self.prompts = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, shape.prompts, shape.width)))

    def forward(self, x: Tensor, apart: Tensor) -> Tensor:
        """Tokens of the same shape; `apart` as `separated` gives it."""
        height, width = x.shape[1:3]
        h = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2)) if self.shift else self.norm1(x)
        prompts = None if self.prompts is None else self.norm1(self.prompts)
        seen = self.attention(windows_of(h, self.window), prompts, apart if self.shift else None)
        h = image_of(seen, height, width, self.window)
        x = x + (torch.roll(h, (self.shift, self.shift), (1, 2)) if self.shift else h)
        found: Tensor = x + self.mlp(self.norm2(x))
        return found


class WindowAttention(nn.Module):
    """Self-attention of several heads inside windows, with a learned bias for each place relative to the token's own.

    softmax(q k^T / sqrt(d) + bias) v, each projection a layer that is called, so that adapters reach it.
    """

    index: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        # A row a head: the lint of models takes many short rows that learn alike for a layer that was planted.
        self.bias = nn.Parameter(nn.init.trunc_normal_(torch.empty(heads, (2 * window - 1) ** 2), std=0.02))
        self.register_buffer("index", relative_places(window), persistent=False)

    def forward(self, x: Tensor, prompts: Tensor | None, apart: Tensor | None) -> Tensor:
        """Tokens by window (B, windows, N, width), prompts (1, T, width), `apart` (windows, N, N) -> tokens alike."""
        q, k, v = (self._heads(layer(x)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        bias = self.bias[:, self.index]
        if apart is not None:
            bias = bias + torch.zeros_like(apart, dtype=bias.dtype).masked_fill(apart, -torch.inf).unsqueeze(1)
        if prompts is not None:
            k, v = (
                torch.cat([self._heads(layer(prompts)[:, None]).expand(*own.shape[:3], -1, -1), own], 3)
                for layer, own in ((self.k_proj, k), (self.v_proj, v))
            )
            bias = pad(bias, (prompts.shape[1], 0))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias, -1)
        found: Tensor = self.out_proj((weights @ v).transpose(2, 3).flatten(3))
        return found

    def _heads(self, x: Tensor) -> Tensor:
        """(B, windows, N, width) -> (B, windows, heads, N, width / heads)."""
        return x.reshape(*x.shape[:3], self.heads, -1).transpose(2, 3)


# Windows -------------------------------------------------------------------------------------------------------------


def windows_of(x: Tensor, window: int) -> Tensor:
    """(B, H, W, d) -> (B, windows, window^2, d), row by row; H and W are multiples of `window`."""
    batch, height, width, values = x.shape
    split = x.reshape(batch, height // window, window, width // window, window, values)
    return split.transpose(2, 3).reshape(batch, -1, window**2, values)


def image_of(windows: Tensor, height: int, width: int, window: int) -> Tensor:
    """What `windows_of` undoes."""
    split = windows.reshape(len(windows), height // window, width // window, window, window, -1)
    return split.transpose(2, 3).reshape(len(windows), height, width, -1)


def relative_places(window: int) -> Tensor:
    """(N, N) for N = window^2 tokens: which of the (2 window - 1)^2 places the second has relative to the first."""
    axis = torch.arange(window)
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
    apart = places[:, :, None] - places[:, None, :] + window - 1
    return apart[0] * (2 * window - 1) + apart[1]


def separated(height: int, width: int, window: int, device: torch.device) -> Tensor:
    """(windows, N, N): which tokens of shifted windows do not see each other.

    The shift is by half a window, around the edges: a window at the end holds tokens from both ends of the image.
    """
    rows, columns = (_strips(size, window, device) for size in (height, width))
    labels = windows_of((3 * rows[:, None] + columns)[None, ..., None], window)[0, ..., 0]
    return labels[:, :, None] != labels[:, None, :]


def _strips(size: int, window: int, device: torch.device) -> Tensor:
    """Of each place of a shifted axis, which strip it is in: those that came around are their own."""
    place = torch.arange(size, device=device)
    return (place >= size - window).long() + (place >= size - window // 2).long()


class SwinDenoiserSettings(PresetSettings):
    """A Swin transformer as the denoiser of MoDL, with deep prompts where the study wants them (FedPR); MRI."""

    kind: Literal["swin_denoiser"]
    modalities = frozenset({"mri"})
    consistent = True
    unrolls: int | None = Field(None, ge=1, le=50)
    cg_iterations: int | None = Field(None, ge=1, le=100)
    width: int | None = Field(None, ge=1, le=4096, description="values of a token; default 16, 48, 180")
    groups: int | None = Field(None, ge=1, le=24, description="of blocks, each with a convolution; default 1, 2, 6")
    layers: int | None = Field(None, ge=1, le=24, description="blocks of a group; default 2, 2, 6")
    heads: int | None = Field(None, ge=1, description="of each block's attention; default 2, 4, 6")
    window: int | None = Field(None, ge=2, le=64, description="tokens along each side of a window; default 4, 8, 8")
    scale: Literal[1, 2, 4] | None = Field(None, description="pixels along each side of a token; default 2, 2, 1")
    prompts: int | None = Field(
        None, ge=0, le=1024, description="learned tokens of each block, named `*.prompts`; default none, FedPR's are 20"
    )

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        shape = swin_shape(self)
        if shape.width % shape.heads:
            raise ValueError(
                f"model.heads: {shape.heads} heads do not share a width of {shape.width} evenly; take a divisor of it"
            )
        return self

    def build(self, modality: Modality) -> SwinReconstruction:
        """The network."""
        return SwinReconstruction(swin_shape(self))

    def describe(self) -> str:
        """Kind, size and prompts."""
        count = swin_shape(self).prompts
        return super().describe() + (f", {count} prompts in each block" if count else "")
