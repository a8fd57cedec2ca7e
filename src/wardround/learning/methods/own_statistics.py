"""Batch norm at a hospital that did not train: statistics of its own images, which need no label. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wardround.learning.frozen import is_frozen


def own_statistics(model: nn.Module) -> AbstractContextManager[Any]:
    """From now until the context is left, batch-norm layers in evaluation normalise by what they are given.

    Mean and (biased) variance of each channel over the batch and all its places stand for the running ones: batch
    normalisation at prediction time (Nado et al., 2020), as AdaBN with the batch as target domain (Li et al., 2016).
    A layer that is given one value a channel keeps its running statistics, as one value has no variance; so does a
    frozen layer.
    """
    undo = ExitStack()
    for layer in model.modules():
        if isinstance(layer, _BatchNorm) and not is_frozen(layer):
            undo.callback(_restore, layer, {name: b.detach().clone() for name, b in layer.named_buffers()})
            undo.callback(layer.register_forward_pre_hook(_estimate).remove)
    return undo


def _estimate(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    assert isinstance(layer, _BatchNorm)
    given: Tensor = inputs[0]
    mean, variance = layer.running_mean, layer.running_var
    if layer.training or mean is None or variance is None or given.numel() == given.shape[1]:
        return
    values = given.detach().transpose(0, 1).flatten(1)
    mean.copy_(values.mean(1))
    variance.copy_(values.var(1, correction=0))


def _restore(layer: nn.Module, before: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in layer.named_buffers():
            buffer.copy_(before[name])
