"""A released model's low-rank adapters in a folder that Hugging Face's peft reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from wardround.errors import DataError, StudyError
from wardround.models.adapters import LowRank, products
from wardround.models.low_rank import FOLDED, LORA, LORA_LOCAL
from wardround.plan.checkpoints import write_weights
from wardround.plan.peft import BY_HASH, CONFIG, MODEL, Settings, key_of, keys_of
from wardround.plan.weights import FROZEN_SHA256
from wardround.runs.merging import low_rank, opened
from wardround.runs.releases import ReleasedModel
from wardround.study.adapters import LoRA
from wardround.study.patterns import matched
from wardround.study.start import Fresh
from wardround.wire.files import reason, written


@dataclass(frozen=True)
class Written:
    """What was written: the folder, the hash of its factors' file, their rank, and how many layers have some.

    `whole` are the layers that are in it as a whole, since they were trained beside the factors.
    """

    folder: Path
    sha256: str
    rank: int
    layers: int
    whole: tuple[str, ...]

    @property
    def study(self) -> str:
        """The lines of a study's `start` that begin with it."""
        return f"  adapter:\n    file: {self.folder.name}\n    sha256: {self.sha256}"


def write_adapter(
    model: Path,
    folder: Path,
    *,
    site: str | None = None,
    plugins: Collection[str] = (),
    weights: Path | None = None,
    overwrite: bool = False,
) -> Written:
    """Write the factors of a released model of a study with `adapters.kind: lora` to `folder`, as peft reads them.

    With `site`, its own product and the shared one become one of both ranks. Layers of which `adapters.trained` names
    values are in it as a whole. Raises `StudyError` for a model that peft has no settings for, and `DataError` for
    files that are not there or not fit, and for a folder that holds an adapter already, unless `overwrite`.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out {folder.name} is a file; name a folder", detail=str(folder))
    if not overwrite and any((folder / name).exists() for name in (MODEL, CONFIG)):
        raise DataError(f"{folder.name} holds an adapter already; add --force to replace it, or name another folder")
    released = opened(model, plugins)
    network = low_rank(released, site, weights)
    adapters = released.study.adapters
    assert isinstance(adapters, LoRA)
    layers = {name: layer for name, layer in network.named_modules() if products(layer)}
    for name, layer in layers.items():
        _check(name, layer)
    # A second product that begins as nothing is nothing: only its own site has another.
    own = any(bool(_part(layer, LORA_LOCAL).product().any()) for layer in layers.values() if hasattr(layer, LORA_LOCAL))
    rank = adapters.rank + adapters.local_rank * own
    settings = Settings(
        rank, float(rank) if own else adapters.alpha, adapters.rank_stabilised and not own, _base(released)
    )
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        first, second = _factors(layer, own)
        tensors |= {key: (first if which == "a" else second) for key, which in keys_of(name).items()}
    whole = _whole(network, adapters, layers)
    state = network.state_dict()
    for layer_name in whole:
        tensors |= {key_of(name): state[name] for name in state if name.rpartition(".")[0] == layer_name}
    try:
        with written(folder / CONFIG) as file:
            file.write(settings.to_json(tuple(layers), whole).encode())
            found = write_weights(folder / MODEL, tensors)
    except OSError as error:
        raise DataError(f"{folder.name} cannot be written ({reason(error)})", detail=str(folder)) from error
    return Written(folder, found.sha256, rank, len(layers), whole)


def _base(released: ReleasedModel) -> str:
    """How the settings name the base: by the hash that the study fixes."""
    start = released.study.start
    if isinstance(start, Fresh):
        return f"values of sha256 {released.metadata.get(FROZEN_SHA256, 'unknown')}"
    return BY_HASH + start.sha256


def _part(layer: nn.Module, name: str) -> LowRank:
    part = getattr(layer, name)
    assert isinstance(part, LowRank)
    return part


def _check(name: str, layer: nn.Module) -> None:
    """Raise `StudyError` for a layer whose adapter peft would compute otherwise."""
    folded = products(layer).get(FOLDED)
    if folded is not None and bool(folded.product().any()):
        raise StudyError(
            f"this model's method folded products into the weight of {name}, which a peft adapter does not hold; write "
            "the whole model with `wardround weights merge`"
        )
    if isinstance(layer, nn.Linear):
        return
    assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    # peft gives its first factor kernel, stride and padding of the layer, and nothing else.
    if layer.padding_mode != "zeros" or any(step != 1 for step in layer.dilation):
        raise StudyError(
            f"{name} is a convolution with dilation or padding other than zeros, whose adapter peft computes without "
            "them; write the whole model with `wardround weights merge`"
        )


def _factors(layer: nn.Module, own: bool) -> tuple[Tensor, Tensor]:
    """Both factors of a layer; with its site's own, of one product that counts once."""
    shared = _part(layer, LORA)
    if not own:
        return shared.a.weight, shared.b.weight
    parts = (shared, _part(layer, LORA_LOCAL))
    return torch.cat([p.a.weight for p in parts]), torch.cat([p.scale * p.b.weight for p in parts], dim=1)


def _whole(network: nn.Module, adapters: LoRA, adapted: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """The layers that own what was trained beside the factors: peft keeps layers, not values."""
    names = network.state_dict()
    trained = matched(adapters.trained, names, lambda one: f"adapters.trained: {one!r} matches no value of the network")
    whole = tuple(dict.fromkeys(name.rpartition(".")[0] for name in trained))
    for name in whole:
        # peft takes every layer whose name ends so.
        if not name or (near := next((other for other in adapted if other.endswith(name)), None)):
            why = f"and its name is the end of {near}" if name else "and belongs to no layer"
            raise StudyError(
                f"{name or trained[0]} was trained beside the adapters, {why}, which peft cannot hold; write the whole "
                "model with `wardround weights merge`"
            )
    return whole
