"""What a `config.json` of Hugging Face transformers says of a network: the keys that decide it, and no others.

Defaults are the library's (5.24): such files may leave out what is as by default.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError

from wardround.errors import StudyError, WireError
from wardround.study.base import Config
from wardround.wire.canonical import parse_json

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Activation = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish"]


def _side(value: Any) -> Any:
    """One number for both sides: positions are interpolated from a square."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(set(value)) != 1 or len(value) != 2:
            raise ValueError(f"{list(value)} is no square, and positions are interpolated from one")
        return value[0]
    return value


Side = Annotated[int, Field(ge=1), BeforeValidator(_side)]


class Architecture(Config):
    """What all have. `library` is what their classes' names begin with, `options` are those of the encoder's class."""

    library: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}
    #: What goes to the head: the first token, the mean of those of patches, or both.
    pooled: ClassVar[Literal["first", "mean", "both"]]
    #: How the library multiplies.
    attention: ClassVar[Literal["sdpa", "eager"]] = "sdpa"

    model_type: str
    image_size: Side = Field(224, description="side of the images of the pretraining; positions are interpolated")
    num_channels: int = Field(3, ge=1, description="of an image; one channel is given to all of three")
    qkv_bias: bool = True
    hidden_act: Activation = "gelu"
    hidden_dropout_prob: Share = 0.0
    attention_probs_dropout_prob: Share = 0.0
    initializer_range: float = Field(0.02, gt=0.0, description="of values that begin fresh")

    @property
    def extra_tokens(self) -> int:
        """Tokens before those of patches."""
        return 1

    @property
    def features(self) -> int:
        """Values of an image that go to the head."""
        raise NotImplementedError

    @property
    def divisor(self) -> int:
        """What sides of images are multiples of."""
        raise NotImplementedError

    def describe(self) -> str:
        """Kind and size, in words."""
        raise NotImplementedError

    def check_size(self, size: Sequence[int]) -> None:
        """Raise `StudyError` for images of no whole number of patches."""
        if any(side % self.divisor for side in size):
            raise StudyError(
                f"task.size: {' x '.join(map(str, size))} is no whole number of patches of {self.divisor}; take "
                "multiples of it"
            )


class _Plain(Architecture):
    """Blocks of one width."""

    hidden_size: int = Field(768, ge=1)
    num_hidden_layers: int = Field(12, ge=1)
    num_attention_heads: int = Field(12, ge=1)
    patch_size: Side = 16
    layer_norm_eps: float = Field(1e-6, gt=0.0)

    @property
    def features(self) -> int:
        """See `Architecture.features`."""
        return self.hidden_size * (2 if self.pooled == "both" else 1)

    @property
    def divisor(self) -> int:
        """A patch's side."""
        return self.patch_size

    def describe(self) -> str:
        """Blocks, width and patch."""
        return (
            f"{self.model_type}, {self.num_hidden_layers} blocks of width {self.hidden_size}, patch {self.patch_size}"
        )


class ViTConfig(_Plain):
    """Vision transformer (Dosovitskiy et al., ICLR 2021)."""

    library = "ViT"
    options: ClassVar[Mapping[str, Any]] = {"add_pooling_layer": False}
    pooled = "first"

    model_type: Literal["vit"]
    intermediate_size: int = Field(3072, ge=1)
    layer_norm_eps: float = Field(1e-12, gt=0.0)


class DINOv2Config(_Plain):
    """DINOv2 (Oquab et al., TMLR 2024)."""

    library = "Dinov2"
    pooled = "both"

    model_type: Literal["dinov2"]
    patch_size: Side = 14
    mlp_ratio: int = Field(4, ge=1)
    layerscale_value: float = 1.0
    drop_path_rate: Share = 0.0
    use_swiglu_ffn: Literal[False] = Field(False, description="gated perceptrons, as DINOv2-giant has, are not served")


class DINOv2WithRegistersConfig(DINOv2Config):
    """DINOv2 with register tokens (Darcet et al., ICLR 2024)."""

    library = "Dinov2WithRegisters"

    model_type: Literal["dinov2_with_registers"]  # type: ignore[assignment]
    patch_size: Side = 16
    num_register_tokens: int = Field(4, ge=0)

    @property
    def extra_tokens(self) -> int:
        """The class token and the registers."""
        return 1 + self.num_register_tokens


class SwinConfig(Architecture):
    """Swin transformer (Liu et al., ICCV 2021)."""

    library = "Swin"
    options: ClassVar[Mapping[str, Any]] = {"add_pooling_layer": False}
    pooled = "mean"
    # torch's own attention takes another way where a bias is trained, and cannot be exported with windows.
    attention = "eager"

    model_type: Literal["swin"]
    patch_size: Side = 4
    embed_dim: int = Field(96, ge=1)
    depths: tuple[Annotated[int, Field(ge=1)], ...] = Field((2, 2, 6, 2), min_length=1)
    num_heads: tuple[Annotated[int, Field(ge=1)], ...] = Field((3, 6, 12, 24), min_length=1)
    window_size: int = Field(7, ge=1)
    mlp_ratio: float = Field(4.0, gt=0.0)
    drop_path_rate: Share = 0.1
    use_absolute_embeddings: bool = False
    layer_norm_eps: float = Field(1e-5, gt=0.0)

    @property
    def extra_tokens(self) -> int:
        """None."""
        return 0

    @property
    def features(self) -> int:
        """See `Architecture.features`."""
        return self.embed_dim << (len(self.depths) - 1)

    @property
    def divisor(self) -> int:
        """Of a patch of the last stage."""
        return self.patch_size << (len(self.depths) - 1)

    def describe(self) -> str:
        """Stages, width and window."""
        return f"swin, stages of {', '.join(map(str, self.depths))} blocks, window {self.window_size}"

    def check_size(self, size: Sequence[int]) -> None:
        """Raise `StudyError` for images that a window does not fit into, in the last stage."""
        super().check_size(size)
        least = self.divisor * self.window_size
        if min(size) < least:
            raise StudyError(
                f"task.size: {' x '.join(map(str, size))} is smaller than a window of the last stage, {least} x {least}"
                "; take at least that"
            )


AnyArchitecture = Annotated[
    ViTConfig | DINOv2Config | DINOv2WithRegistersConfig | SwinConfig, Field(discriminator="model_type")
]
_KNOWN: Mapping[str, type[Architecture]] = {
    name: found
    for found in (ViTConfig, DINOv2Config, DINOv2WithRegistersConfig, SwinConfig)
    for name in typing.get_args(found.model_fields["model_type"].annotation)
}


def deciding(text: str, place: str) -> dict[str, Any]:
    """Of a `config.json` the keys that decide the network; `place` is what errors call it.

    Raises ValueError for what is no such file, names a network of another kind, or code of its own.
    """
    try:
        said = parse_json(text)
    except WireError:
        said = None
    if not isinstance(said, dict):
        raise ValueError(f"{place} is no JSON of a network; get it again")
    if "auto_map" in said:
        raise ValueError(f"{place} names code of its own (auto_map), which is never run; take a model without")
    kind = said.get("model_type")
    if not isinstance(kind, str) or kind not in _KNOWN:
        raise ValueError(f"{place} is of {json.dumps(kind)[:40]}; served are {', '.join(_KNOWN)}")
    found = {key: said[key] for key in _KNOWN[kind].model_fields if key in said}
    try:
        _KNOWN[kind].model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        key, why = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{place}: {key}: {why.replace('Input should', 'must')}; take another model") from None
    return found
