"""What a model's kind calls its head: the last layers, by names that the network has."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from wardround.learning.model_context import parameters_of
from wardround.study.models import ModelSettings
from wardround.study.registry import builtins

HEADED = [settings for settings in builtins("model") if issubclass(settings, ModelSettings) and settings.head_parts]


def built(settings: type[ModelSettings]) -> nn.Module:
    (kind,) = settings.kinds()
    made: Any = settings.model_validate({"kind": kind, "preset": "tiny"})
    for build, arguments in (
        ("build_classifier", (2, 3, 4)),
        ("build_network", (2, 1, 2)),
        ("build_prompted", (2, 1)),
        ("build", ("mri",)),
    ):
        if build in dir(made) and (build != "build" or made.modalities is None):
            network: nn.Module = getattr(made, build)(*arguments)
            return network
    raise AssertionError(kind)


@pytest.mark.parametrize("settings", HEADED, ids=lambda settings: settings.kinds()[0])
def test_the_head_is_the_end_of_the_network(settings: type[ModelSettings]) -> None:
    if settings.kinds() == ("transformers",):
        pytest.skip("built from a configuration; its classifier is `head`, as its file says")
    if settings.kinds() == ("swin_unetr",):
        pytest.importorskip("einops")
    parameters = parameters_of(built(settings), settings.head_parts)
    # What a DynUNet's recursion names once more.
    parameters = tuple(p for p in parameters if not p.name.startswith("skip_layers."))
    head = [p.name for p in parameters if p.head]
    assert 0 < len(head) < len(parameters)
    # A prompt decoder stands before the encoder of prompts.
    if settings.kinds() != ("lite_medsam",):
        assert [p.name for p in parameters][-len(head) :] == head
