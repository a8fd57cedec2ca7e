"""LiteMedSAM: Segment Anything for medical images, small enough for a CPU, which outlines what a prompt marks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.models.lead import Lead
from wardround.models.prompts import MaskDecoder, PromptEncoder
from wardround.models.tiny_vit import TinyViT, TinyViTShape
from wardround.study.models import Preset, PresetSettings
from wardround.study.tasks import Modality

# Of each preset: the encoder; heads and inner width of the decoder; pixels of a side.
_PUBLISHED = (TinyViTShape((64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7), 256), 8, 2048, 256)
_PRESETS: dict[Preset, tuple[TinyViTShape, int, int, int]] = {
    "small": _PUBLISHED,
    "paper": _PUBLISHED,
    "tiny": (TinyViTShape((8, 16, 16, 16), (1, 1, 1, 1), (1, 2, 2, 2), (7, 7, 7, 7), 16), 2, 32, 64),
}


class LiteMedSAMSettings(PresetSettings):
    """LiteMedSAM (Ma et al., Nature Communications 15, 2024), 9.8 million weights: TinyViT and SAM's mask decoder.

    `tiny` has weights of its own, for tests.
    """

    modalities: ClassVar[frozenset[Modality] | None] = frozenset()

    kind: Literal["lite_medsam"]
    head_parts: ClassVar[tuple[str, ...]] = ("mask_decoder.*",)
    size: int | None = Field(
        None,
        ge=32,
        le=2048,
        multiple_of=4,
        description="pixels of a side of what it sees; default 256, the size it was trained at (tiny: 64). 1024 takes "
        "3.9 GB and 20 times as long",
    )

    @model_validator(mode="after")
    def _has_a_size(self) -> LiteMedSAMSettings:
        if self.size is None:
            object.__setattr__(self, "size", _PRESETS[self.preset][3])
            self.model_fields_set.discard("size")
        return self

    def describe(self) -> str:
        """Kind, preset and size."""
        return f"{self.kind}, preset {self.preset}, {self.size} x {self.size} pixels"

    def build_prompted(self, dimensions: int, channels: int) -> Any:
        """The network, without pretrained weights: those come from a file of the study's `start`."""
        if dimensions != 2 or channels not in (1, 3):
            raise StudyError(
                "model.kind: lite_medsam sees grey or colour pictures and slices; give task.dimensions 2 and "
                "task.channels 1 or 3"
            )
        shape, heads, inside, _ = _PRESETS[self.preset]
        assert self.size is not None
        return LiteMedSAM(shape, heads, inside, self.size)


class LiteMedSAM(nn.Module):
    """The network; its tensors have the names of the published checkpoint."""

    def __init__(self, shape: TinyViTShape, heads: int, inside: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.image_encoder = TinyViT(shape)
        self.mask_decoder = MaskDecoder(shape.neck, heads, inside)
        self.prompt_encoder = PromptEncoder(shape.neck)
        self.lead: Lead | None = None

    def layers(self) -> tuple[nn.Module, ...]:
        """The image encoder; see `wardround.models.lead.Layered`."""
        return (self.image_encoder,)

    @property
    def given_shape(self) -> tuple[int, ...]:
        """See `wardround.models.lead.Shelved`: of the encoder's embedding of an image."""
        return (self.prompt_encoder.no_mask_embed.embedding_dim, self.size // 4, self.size // 4)

    def forward(self, images: Tensor, points: Tensor, means: Sequence[int]) -> Tensor:
        """Logits (B, K, S, S) of what each of K prompts marks in images (B, 1 or 3, S, S) with values from 0 to 1.

        points: (B, K, P, 2), the points of each prompt, column and row in pixels; `means` says what each of the P is.
        """
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        found = self.image_encoder(images) if self.lead is None else self.lead(images)
        count = points.shape[1]
        prompts = self.prompt_encoder(points.flatten(0, 1), means, self.size)
        found = found.repeat_interleave(count, dim=0) if count > 1 else found
        found = found + self.prompt_encoder.no_mask_embed.weight[:, :, None, None]
        logits = self.mask_decoder(found, self.prompt_encoder.grid(self.size // 4), prompts)
        masks: Tensor = logits.unflatten(0, (-1, count))
        return masks
