"""The half of Segment Anything that sees prompts: points and boxes to embeddings, and those to a mask.

After Kirillov et al., *Segment Anything*, ICCV 2023, section 3 and appendix A. Modules are named as in the published
checkpoints, so that those load; of the four masks that the decoder can give, the first is made, the one for a prompt
that means one thing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wardround.models.tiny_vit import ChannelNorm

# What a point of a prompt is; a box is its two corners. `PADDING` follows points without a box.
OUTSIDE, INSIDE, FIRST_CORNER, LAST_CORNER = range(4)
PADDING = -1
_MASKS = 4


class PromptEncoder(nn.Module):
    """Points of prompts as embeddings of `width` values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pe_layer = _Places(width // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, width) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, width)
        # Prompts that are masks: no study gives one, but the checkpoint has the weights.
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, 4, 2, 2),
            ChannelNorm(4),
            nn.GELU(),
            nn.Conv2d(4, 16, 2, 2),
            ChannelNorm(16),
            nn.GELU(),
            nn.Conv2d(16, width, 1),
        )
        self.no_mask_embed = nn.Embedding(1, width)

    def forward(self, points: Tensor, means: Sequence[int], side: int) -> Tensor:
        """Embeddings (N, P, width) of P points of each of N prompts.

        points: (N, P, 2), column and row in pixels of an image of `side` pixels, 0 the middle of the first one. means:
        what each of the P points is.
        """
        if FIRST_CORNER not in means:
            points, means = nn.functional.pad(points, (0, 0, 0, 1)), (*means, PADDING)
        places = self.pe_layer((points + 0.5) / side)
        known = torch.tensor([[float(mean != PADDING)] for mean in means], device=places.device)
        weights = [kind.get_parameter("weight") for kind in (*self.point_embeddings, self.not_a_point_embed)]
        found: Tensor = places * known + torch.cat([weights[mean] for mean in means])
        return found

    def grid(self, side: int) -> Tensor:
        """Embeddings (1, width, side, side) of the places of an image's own embeddings."""
        at = (torch.arange(side, device=self.no_mask_embed.weight.device) + 0.5) / side
        rows, columns = torch.meshgrid(at, at, indexing="ij")
        found: Tensor = self.pe_layer(torch.stack((columns, rows), dim=-1)).permute(2, 0, 1)[None]
        return found


class _Places(nn.Module):
    """Places (..., 2) from 0 to 1 as sines and cosines of random frequencies: (..., 2 * frequencies)."""

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.positional_encoding_gaussian_matrix: Tensor
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, frequencies))

    def forward(self, places: Tensor) -> Tensor:
        # Sines of large numbers: not by a product of matrices, which may be in half the digits.
        turns = ((2.0 * places - 1.0)[..., None] * self.positional_encoding_gaussian_matrix).sum(-2) * (2.0 * math.pi)
        return torch.cat((turns.sin(), turns.cos()), dim=-1)


class MaskDecoder(nn.Module):
    """Embeddings of images and of prompts to logits of masks, four times as fine on each side."""

    def __init__(self, width: int, heads: int, inside: int) -> None:
        super().__init__()
        self.transformer = _TwoWay(width, heads, inside)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(_MASKS, width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, 2),
            ChannelNorm(width // 4),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(_Head(width, width // 8) for _ in range(_MASKS))
        # How good a mask is: not asked, but the checkpoint has the weights.
        self.iou_prediction_head = _Head(width, _MASKS)

    def forward(self, images: Tensor, grid: Tensor, prompts: Tensor) -> Tensor:
        """Logits (N, 4 s, 4 s) of embeddings (N, width, s, s) at places `grid`, for prompts (N, P, width)."""
        count, width, side, _ = images.shape
        tokens = torch.cat((self.iou_token.weight, self.mask_tokens.weight)).expand(count, -1, -1)
        tokens, pixels = self.transformer(
            torch.cat((tokens, prompts), dim=1), images.flatten(2).transpose(1, 2), grid.flatten(2).transpose(1, 2)
        )
        fine = self.output_upscaling(pixels.transpose(1, 2).reshape(count, width, side, side))
        weights = self.output_hypernetworks_mlps[0](tokens[:, 1])
        return torch.einsum("nc,nchw->nhw", weights, fine)


class _Head(nn.Module):
    """Three layers: (N, width) -> (N, outputs)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList((nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, outputs)))

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        found: Tensor = last(torch.relu(second(torch.relu(first(x)))))
        return found


class _TwoWay(nn.Module):
    """Two layers in which tokens look at pixels and pixels at tokens, and a last look of the tokens."""

    def __init__(self, width: int, heads: int, inside: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_TwoWayLayer(width, heads, inside, first=first) for first in (True, False))
        self.final_attn_token_to_image = _Attention(width, heads, width // 2)
        self.norm_final_attn = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, pixels: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (N, T, width) and pixels (N, P, width), each having seen the others; places: (1, P, width)."""
        asked = tokens
        for layer in self.layers:
            tokens, pixels = layer(tokens, pixels, asked, places)
        found = self.final_attn_token_to_image(tokens + asked, pixels + places, pixels)
        return self.norm_final_attn(tokens + found), pixels


class _TwoWayLayer(nn.Module):
    def __init__(self, width: int, heads: int, inside: int, *, first: bool) -> None:
        super().__init__()
        self._first = first
        self.self_attn = _Attention(width, heads, width)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = _Attention(width, heads, width // 2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _Perceptron(width, inside)
        self.norm3 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = _Attention(width, heads, width // 2)
        self.norm4 = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, pixels: Tensor, asked: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        # In the first layer the tokens are still what they asked with.
        if self._first:
            tokens = self.norm1(self.self_attn(tokens, tokens, tokens))
        else:
            tokens = self.norm1(tokens + self.self_attn(tokens + asked, tokens + asked, tokens))
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + asked, pixels + places, pixels))
        tokens = self.norm3(tokens + self.mlp(tokens))
        pixels = self.norm4(pixels + self.cross_attn_image_to_token(pixels + places, tokens + asked, tokens))
        return tokens, pixels


class _Attention(nn.Module):
    """Attention of `inside` values in several heads: queries (N, Q, width), keys and values (N, K, width)."""

    def __init__(self, width: int, heads: int, inside: int) -> None:
        super().__init__()
        self._heads = heads
        self.q_proj = nn.Linear(width, inside)
        self.k_proj = nn.Linear(width, inside)
        self.v_proj = nn.Linear(width, inside)
        self.out_proj = nn.Linear(inside, width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        q, k, v = (
            projected.unflatten(2, (self._heads, -1)).transpose(1, 2)
            for projected in (self.q_proj(queries), self.k_proj(keys), self.v_proj(values))
        )
        found: Tensor = self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found


class _Perceptron(nn.Module):
    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, inside)
        self.lin2 = nn.Linear(inside, width)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lin2(torch.relu(self.lin1(x)))
        return found
