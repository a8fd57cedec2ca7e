"""Encoders of Hugging Face transformers (ViT, DINOv2, Swin) that classify, built from what a study says alone.

Nothing is fetched and no code of a model is run: the library's own classes are made of numbers of the study, and values
come from a file that it names by hash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, model_validator
from torch import Tensor, nn

from wardround.errors import MissingExtra, StudyError
from wardround.models.lead import Lead
from wardround.models.transformers_config import AnyArchitecture, Architecture, SwinConfig, deciding
from wardround.study.beside import first_beside
from wardround.study.models import Layer, ModelSettings
from wardround.study.tasks import Modality

_CONFIG = "config.json"
# Values of published files that have no use here: a pooler, a token of their pretraining, and places that are computed.
_UNUSED = ("pooler.", "embeddings.mask_token")
_COMPUTED = "relative_position_index"


class TransformersSettings(ModelSettings):
    """An encoder of Hugging Face transformers: ViT, DINOv2 with and without registers, Swin. Needs the extra
    `foundation`.

    A study names a folder below its own that holds the model's `config.json`. What of it decides the network takes the
    folder's place as the study is read, so that the study's hashes cover it.
    """

    kind: Literal["transformers"]
    head_parts: ClassVar[tuple[str, ...]] = ("head.*",)
    modalities: ClassVar[frozenset[Modality] | None] = frozenset()
    folder: str | None = Field(None, description="with the model's `config.json`; or give `config`")
    config: AnyArchitecture = Field(description="what of a `config.json` decides the network")

    @model_validator(mode="before")
    @classmethod
    def _from_folder(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, Mapping) or not isinstance(folder := given.get("folder"), str):
            return given
        if "config" in given:
            raise ValueError("model: has a `folder` and a `config`; remove one")
        name, text = first_beside("model.folder", folder, (_CONFIG,), info)
        rest = {key: value for key, value in given.items() if key != "folder"}
        return {**rest, "config": deciding(text, f"{folder}/{name}")}

    def describe(self) -> str:
        """What the network is."""
        return f"{self.kind}, {self.config.describe()}"

    def check_size(self, size: Sequence[int]) -> None:
        """Raises StudyError for images that the network cannot see."""
        self.config.check_size(size)

    def build_classifier(self, dimensions: int, channels: int, classes: int) -> Any:
        """The network; raises `MissingExtra` without the library."""
        config = self.config
        if dimensions != 2:
            raise StudyError(f"model.kind: {self.kind} is for pictures and slices; give task.dimensions 2")
        if channels != config.num_channels and channels != 1:
            raise StudyError(
                f"task.channels: {channels}, and the network sees {config.num_channels}; give as many, or 1"
            )
        return TransformersClassifier(config, classes)

    @property
    def represents(self) -> Layer:
        """What the head makes classes of."""
        return Layer("head", "input")


class TransformersClassifier(nn.Module):
    """Images (B, C, H, W) -> logits (B, K). Of an image of one channel each channel of the encoder sees the same."""

    def __init__(self, config: Architecture, classes: int) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.head = nn.Linear(config.features, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.lead: Lead | None = None
        #: See `wardround.models.adapters.attach`: windows have a size that no token can be added to.
        self.takes_prompts = not isinstance(config, SwinConfig)

    def layers(self) -> tuple[nn.Module, ...]:
        """The encoder; see `wardround.models.lead.Layered`."""
        return (self.encoder,)

    @property
    def given_shape(self) -> tuple[int, ...]:
        """See `wardround.models.lead.Embedding`."""
        return (self.head.in_features,)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K)."""
        found: Tensor = self.head(self.encoder(images) if self.lead is None else self.lead(images))
        return found

    def name_of(self, name: str) -> str | None:
        """See `wardround.models.published.Published`: by the library's own table of the names it gave them before."""
        if name.startswith((_NETWORK, _HEAD)):
            return name
        for rename in self.encoder.renames:
            name, _ = rename.rename_source_key(name)
        name = name.removeprefix(f"{self.encoder.network.base_model_prefix}.")
        if name.startswith(_UNUSED) or name.endswith(_COMPUTED):
            return None
        return _HEAD + name.removeprefix(_PUBLISHED_HEAD) if name.startswith(_PUBLISHED_HEAD) else _NETWORK + name


_NETWORK, _HEAD, _PUBLISHED_HEAD = "encoder.network.", "head.", "classifier."


class Encoder(nn.Module):
    """Images (B, C, H, W) -> features (B, F), as the library's own classifiers make them for their heads."""

    def __init__(self, config: Architecture) -> None:
        super().__init__()
        self._config = config
        self.network = _network(config)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, F)."""
        if images.shape[1] == 1:
            images = images.expand(-1, self._config.num_channels, -1, -1)
        tokens = self.network(images, **self._interpolated).last_hidden_state
        patches = tokens[:, self._config.extra_tokens :].mean(dim=1) if self._config.pooled != "first" else None
        if patches is None or self._config.pooled == "mean":
            found: Tensor = tokens[:, 0] if patches is None else patches
            return found
        return torch.cat([tokens[:, 0], patches], dim=1)

    @property
    def _interpolated(self) -> dict[str, bool]:
        # DINOv2 interpolates its positions without being asked.
        return {} if self._config.pooled == "both" else {"interpolate_pos_encoding": True}

    @cached_property
    def renames(self) -> Sequence[Any]:
        """What the library's names of values were before, as it reads published files itself."""
        from transformers.conversion_mapping import extract_weight_conversions_for_model

        return tuple(extract_weight_conversions_for_model(self.network) or ())


def _network(config: Architecture) -> Any:
    try:
        import transformers
        from huggingface_hub import constants
    except ImportError as error:
        raise MissingExtra(f"a network of {config.library}", "foundation") from error
    # No line here asks the hub for anything. Should one of the library's own do so, it is refused there. The variable
    # of this name does the same, but is read once, and MONAI may have imported the library before.
    constants.HF_HUB_OFFLINE = True
    values = config.model_dump(exclude={"model_type"})
    made = getattr(transformers, f"{config.library}Config")(**values, attn_implementation=config.attention)
    network = getattr(transformers, f"{config.library}Model")(made, **config.options)
    if getattr(network.embeddings, "mask_token", None) is not None:
        # A value that nothing reads after the pretraining would travel in every round.
        network.embeddings.mask_token = None
    return network
