"""From a study's model section to a network."""

from __future__ import annotations

from torch import nn

from wardround.errors import StudyError
from wardround.study.models import ModelSettings
from wardround.study.registry import check_modality
from wardround.study.tasks import Modality


def build_model(settings: ModelSettings, modality: Modality = "mri") -> nn.Module:
    """The network of a study, freshly initialised from torch's global generator: seed it first.

    Raises StudyError where the network does not work on images of this modality.
    """
    check_modality(settings, modality)
    network = settings.build(modality)
    if not isinstance(network, nn.Module):
        raise StudyError(f"model.kind={settings.kind!r} does not make a torch module")
    return network
