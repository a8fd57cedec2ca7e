"""A released model that low-rank adapters made, as one file of weights with the base's own names."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn

from wardround.errors import DataError, StudyError
from wardround.federation.release import model_path, personal_part
from wardround.models.adapters import merged, products
from wardround.plan.arms import FEDERATED
from wardround.plan.checkpoints import Imported, check_free, write_weights
from wardround.runs.releases import ReleasedModel
from wardround.study.adapters import LoRA
from wardround.tasks.build import build_task
from wardround.tasks.task import Predicts, PredictsScans

_CHECKED = 3  # Examples of the comparison.
_ROOM = 2  # Places of a convolution's kernel on each axis, beside the first.


@dataclass(frozen=True)
class Merged:
    """The file that was written, and how far it is from the model with its adapters.

    `layers` counts those whose weight changed. `difference` is the largest of the outputs on random inputs, as a share
    of the largest output: of the whole network where `whole`, else of each of those layers.
    """

    file: Imported
    layers: int
    difference: float
    whole: bool

    @property
    def said(self) -> str:
        """For people."""
        what = "the network" if self.whole else f"the {self.layers} layers"
        return (
            f"{self.layers} layers have their products in their weights; on random inputs {what} of the file and of "
            f"the model differ by at most {self.difference:.1e} of the largest output"
        )


def opened(model: Path, plugins: Collection[str] = ()) -> ReleasedModel:
    """A released model by its file or by the folder of its run; raises what `ReleasedModel.opened` raises."""
    return ReleasedModel.opened(model_path(model, FEDERATED) if model.is_dir() else model, plugins)


def low_rank(released: ReleasedModel, site: str | None, weights: Path | None) -> nn.Module:
    """The network of a released model with its low-rank adapters and everything in them.

    Raises `StudyError` for a model without them, for one whose products are all zero, since sites keep factors, and for
    a site that keeps nothing; `DataError` for values that are not there or do not fit.
    """
    adapters = released.study.adapters
    if not isinstance(adapters, LoRA):
        what = adapters.describe() or "no adapters"
        raise StudyError(f"only low-rank adapters (adapters.kind: lora) become part of weights; this model has {what}")
    if site in released.study.sites and not personal_part(released.path, site):
        raise StudyError(
            f"--site {site}: no private part of that site lies beside the model (models/{site}/ARM/local.safetensors), "
            "or the method keeps none; leave --site out for the shared model"
        )
    network = released.loaded(released.build, site, weights)
    if not any(bool(part.product().any()) for layer in network.modules() for part in products(layer).values()):
        raise StudyError(
            "the products of this model are all zero, so it is its base: the study's method keeps factors at the "
            "sites; name one with --site, at that site"
        )
    return network


def merge(
    model: Path,
    out: Path,
    *,
    site: str | None = None,
    plugins: Collection[str] = (),
    weights: Path | None = None,
    overwrite: bool = False,
) -> Merged:
    """Write a released model of a study with `adapters.kind: lora` to `out`, its products added to the weights.

    Names, shapes and dtypes are the base's. What is written is read back and compared with the adapted model on random
    inputs, to half of the digits of the dtype; a file that differs more is not left behind. `site` merges what that
    site keeps. `weights` is the file with the frozen part, where it does not lie where the run put it. Raises
    `StudyError` for adapters that are no part of a weight, and `DataError` for a file that is not there or not fit.
    """
    check_free(out, overwrite=overwrite)
    released = opened(model, plugins)
    adapted = low_rank(released, site, weights)
    layers = sum(1 for layer in adapted.modules() if products(layer))
    whole = merged(deepcopy(adapted))
    shape = _input_shape(released)
    found: list[float] = []

    def check(data: bytes) -> None:
        again = released.build()
        again.load_state_dict(load(data))
        found.append(_network_difference(adapted, again.eval(), shape) if shape else _largest(adapted, again))
        tolerance = max(math.sqrt(torch.finfo(p.dtype).eps) for p in adapted.parameters() if p.is_floating_point())
        if not found[-1] <= tolerance:
            raise DataError(
                f"the merged weights give other outputs than the model with its adapters (by {found[-1]:.1e} of the "
                f"largest, and {tolerance:.0e} is the most); nothing was written. Use the model with its adapters"
            )

    written = write_weights(out, whole.state_dict(), check)
    return Merged(written, layers, found[-1], shape is not None)


def _input_shape(released: ReleasedModel) -> tuple[int, ...] | None:
    """Of a batch of random inputs; `None` where the network takes more than an image."""
    if released.study.task.kind == "reconstruction":
        return None
    task = build_task(released.study, plugins=released.plugins)
    if not isinstance(task, Predicts) or isinstance(task, PredictsScans):
        return None
    try:
        return (_CHECKED, *task.input_shape())
    except StudyError:
        # It takes a prompt, too.
        return None


@torch.no_grad()
def _network_difference(one: nn.Module, other: nn.Module, shape: tuple[int, ...]) -> float:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return _share(one(images), other(images))


@torch.no_grad()
def _largest(one: nn.Module, other: nn.Module) -> float:
    """Of all adapted layers, each on an input of its own."""
    return max(_share(layer(x), other.get_submodule(name)(x)) for name, layer, x in _inputs(one))


def _inputs(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The adapted layers of a network, and random inputs that they can see."""
    random = torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        if not products(layer):
            continue
        weight = layer.get_parameter("weight")
        if isinstance(layer, nn.Linear):
            shape: tuple[int, ...] = (_CHECKED, layer.in_features)
        else:
            assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            sizes = zip(layer.kernel_size, layer.dilation, strict=True)
            shape = (_CHECKED, layer.in_channels, *(d * (k - 1) + 1 + _ROOM for k, d in sizes))
        yield name, layer, torch.randn(shape, generator=random).to(weight.dtype)


def _share(one: Tensor, other: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    largest = float(one.float().abs().max())
    return float((one.float() - other.float()).abs().max()) / (largest or 1.0)
