"""Prompted segmentation whose boxes a small network finds: it learns in the same study, as the first of two stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from wardround.imaging.readers.cases import Patterns
from wardround.imaging.readers.labelled import LabelledImage
from wardround.models.lead import Embedding, Lead
from wardround.models.outliner import build_outliner
from wardround.study.prompts import AutomaticPrompt
from wardround.study.registry import MODELS, builtin
from wardround.tasks.images import resampled
from wardround.tasks.predictions import Masks
from wardround.tasks.prompted import PromptedSegmentation, shape_of
from wardround.tasks.prompts import CORNERS, PromptedBatch, box_of
from wardround.tasks.reconstruction import evaluating
from wardround.tasks.segmentation import overlap_loss
from wardround.tasks.stages import weighted_sum
from wardround.wire.host import on_host

LOCALISER, PROMPTED = "localiser", "prompted"


class Located(nn.Module):
    """A prompted network, and before it one that finds what is to be outlined in an image of `size` pixels."""

    def __init__(self, localiser: nn.Module, prompted: Any, size: int) -> None:
        super().__init__()
        self.localiser = localiser
        self.prompted = prompted
        self._size = size

    def forward(self, images: Tensor, points: Tensor, means: Any) -> Tensor:
        """The second stage alone: logits (B, K, S, S) by prompts."""
        logits: Tensor = self.prompted(images, points, means)
        return logits

    def find(self, images: Tensor) -> Tensor:
        """The first stage alone: logits (B, K, size, size)."""
        logits: Tensor = self.localiser(resampled(images, (self._size, self._size)))
        return logits

    # See `wardround.models.lead.Embedding`: the prompted network's.

    @property
    def lead(self) -> Lead | None:
        """What stands for the frozen encoder."""
        found: Lead | None = self.prompted.lead
        return found

    @lead.setter
    def lead(self, lead: Lead | None) -> None:
        self.prompted.lead = lead

    def layers(self) -> tuple[nn.Module, ...]:
        """The encoder."""
        found: tuple[nn.Module, ...] = self.prompted.layers()
        return found

    @property
    def given_shape(self) -> tuple[int, ...]:
        """Of what the encoder gives."""
        assert isinstance(self.prompted, Embedding)
        return self.prompted.given_shape


class LocatedSegmentation(PromptedSegmentation):
    """The task of a study with `prompt: {kind: automatic}`; see `wardround.tasks.task.Staged`.

    In training the second stage gets boxes of the masks, moved; after it those around the largest thing that the first
    stage finds. Slices without a structure are seen too.
    """

    @property
    def stages(self) -> tuple[str, ...]:
        """What finds, and what outlines."""
        return (LOCALISER, PROMPTED)

    @property
    def _prompt(self) -> AutomaticPrompt:
        prompt = self.config.prompt
        assert isinstance(prompt, AutomaticPrompt)
        return prompt

    def build_model(self) -> nn.Module:
        """Both networks, the localiser first."""
        kind = MODELS["segmentation"]
        settings = builtin("model", kind).model_validate({"kind": kind, "preset": self._prompt.preset})
        localiser = build_outliner(settings, 2, self.config.channels, len(self.structures))
        return Located(localiser, super().build_model(), self._prompt.size)

    def losses(self, model: nn.Module, batch: PromptedBatch) -> dict[str, Tensor]:
        """Dice and cross-entropy of what is found and of what is outlined."""
        assert isinstance(model, Located)
        weights, size = self.config.loss, self._prompt.size
        coarse = resampled(batch.masks, (size, size))
        found = overlap_loss(model.find(batch.images).float(), coarse, batch.known, weights.dice, weights.cross_entropy)
        return {LOCALISER: found, PROMPTED: super().loss(model, batch)}

    def loss(self, model: nn.Module, batch: PromptedBatch) -> Tensor:
        """Their sum, without weights: see `schedule.phases`."""
        return weighted_sum(self.losses(model, batch))

    def marked(self, model: nn.Module, batch: PromptedBatch) -> Tensor:
        """What the second network outlines in the boxes around what the first one finds."""
        boxes, there = self._boxes(model, batch.images)
        # The encoder sees no slice in which nothing was found.
        rows = np.flatnonzero(there.any(axis=1)).tolist()
        marked = torch.zeros(batch.masks.shape, dtype=torch.bool, device=batch.masks.device)
        if rows:
            device = batch.images.device
            given = torch.from_numpy(boxes[rows]).to(device)
            logits = self.logits(model, batch.images[rows], given, CORNERS, shape_of(batch))
            marked[rows] = (logits > 0) & torch.from_numpy(there[rows]).to(device)[..., None, None]
        return marked

    def _boxes(self, model: nn.Module, images: Tensor) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Boxes (B, K, 2, 2) around the largest thing found of each structure, and whether there is any: (B, K)."""
        assert isinstance(model, Located)
        with evaluating(model), torch.no_grad():
            found = on_host(model.find(images).float() > 0).astype(bool)
        scale, size = self._prompting.size / self._prompt.size, self._prompting.size
        boxes = [[box_of(_largest(mask), scale, size) for mask in masks] for masks in found]
        return np.array(boxes, np.float32), np.asarray(found.any(axis=(2, 3)))

    # A clinic's images -----------------------------------------------------------------------------------------------

    def patterns(self) -> Patterns:
        """See `wardround.tasks.task.Predicts`: images alone."""
        return replace(super().patterns(), mask=None)

    def predict(self, model: nn.Module, image: LabelledImage) -> Masks:
        """What is found and outlined. Raises DataError for an image that the networks cannot see."""

        def prompt(picture: Tensor, part: int | None) -> tuple[Any, Any]:
            boxes, there = self._boxes(model, picture[None])
            return boxes[0], there[0]

        return self._predicted(model, image, prompt)


def _largest(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest connected part of a mask."""
    parts, count = ndimage.label(mask)
    if count < 2:
        return mask
    sizes = np.bincount(parts.ravel())[1:]
    return np.asarray(parts == 1 + int(np.argmax(sizes)))
