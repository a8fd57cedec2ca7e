"""Small parts that are trained beside the frozen layers of a large network; the layers' own values keep their names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from wardround.errors import StudyError
from wardround.models.low_rank import FOLDED, LORA, LORA_LOCAL, is_first_factor
from wardround.study.adapters import Adapters, Bottleneck, LoRA, NoAdapters, Partial, Prompts
from wardround.study.patterns import matched
from wardround.wire.host import on_host

Array = npt.NDArray[Any]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
# Names of the parts in the layer that has them.
BOTTLENECK, PROMPT = "bottleneck", "prompt"
# Names that an error lists.
_NEAR = 3


@dataclass(frozen=True)
class Attached:
    """Which values of a network are frozen for the sake of its adapters, and which stay at the sites."""

    frozen: frozenset[str] = frozenset()
    local: frozenset[str] = frozenset()


class LowRank(nn.Module):
    """What is added to a layer's output: scale x b(a(x)), in float32 whatever the layer computes in; zero at first.

    `layer` is linear or a convolution without groups: a convolution's `a` has its kernel, stride and padding, and `b` a
    kernel of one.
    """

    def __init__(self, layer: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a, self.b = _factors(layer, rank)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer sees -> what is added to what it gives."""
        added: Tensor = self.b(self.a(x.to(self.a.weight.dtype)))
        return self.scale * added

    def product(self) -> Tensor:
        """What it adds to the layer's weight, in the shape of that: float64."""
        a, b = self.a.weight.detach().double(), self.b.weight.detach().double()
        return self.scale * (b.flatten(1) @ a.flatten(1)).reshape(len(b), *a.shape[1:])


def _factors(layer: nn.Module, rank: int) -> tuple[_Layer, _Layer]:
    device = next(layer.parameters()).device
    if isinstance(layer, nn.Linear):
        return (
            nn.Linear(layer.in_features, rank, bias=False, device=device),
            nn.Linear(rank, layer.out_features, bias=False, device=device),
        )
    assert isinstance(layer, _CONVOLUTIONS)
    make = next(kind for kind in _CONVOLUTIONS if isinstance(layer, kind))
    return (
        make(
            layer.in_channels,
            rank,
            layer.kernel_size,  # type: ignore[arg-type]
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            padding_mode=layer.padding_mode,
            bias=False,
            device=device,
        ),
        make(rank, layer.out_channels, 1, bias=False, device=device),
    )


class Folded(nn.Module):
    """What was folded into a layer's weight, in the shape of that, before `scale`; zero at first."""

    weight: Tensor

    def __init__(self, layer: nn.Module, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("weight", torch.zeros_like(layer.get_parameter("weight"), dtype=torch.float32))

    def added(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What it adds to the output of its layer."""
        x = x.to(self.weight.dtype)
        if isinstance(layer, nn.Linear):
            return self.scale * functional.linear(x, self.weight)
        assert isinstance(layer, _CONVOLUTIONS)
        added: Tensor = layer._conv_forward(x, self.weight, None)
        return self.scale * added

    def product(self) -> Tensor:
        """What it adds to the layer's weight: float64."""
        return self.scale * self.weight.double()


class Narrow(nn.Module):
    """y -> up(gelu(down(y))), for what is added to y: (..., features); zero at first."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(features, width), nn.Linear(width, features)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, y: Tensor) -> Tensor:
        """What is added."""
        added: Tensor = self.up(functional.gelu(self.down(y.to(self.down.weight.dtype))))
        return added


class Tokens(nn.Module):
    """Learned tokens: (tokens, features)."""

    def __init__(self, tokens: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(tokens, features)))


def attach(model: nn.Module, adapters: Adapters, *, folds: bool = False) -> Attached:
    """Put adapters into a network, in place; fresh values come from torch's global generator.

    `folds`: with room for what is folded into weights.

    Raises `StudyError` for a pattern that matches nothing, and for a layer that cannot have the adapter.
    """
    if isinstance(adapters, NoAdapters):
        return Attached()
    before = tuple(model.state_dict())
    trained = _trained(adapters.trained, before)
    if isinstance(adapters, Prompts) and not getattr(model, "takes_prompts", True):
        raise StudyError(
            "adapters.kind: prompts, and the network's blocks see windows of fixed sizes, which no token can be added "
            "to; take lora or bottleneck, or prompts of the network's own (model.prompts of swin_denoiser)"
        )
    if not isinstance(adapters, Partial):
        for name, layer in _targets(model, adapters.targets):
            _put(name, layer, adapters, folds)
    known = frozenset(before)
    added = [name for name in model.state_dict() if name not in known]
    held = {name for name in before if name not in trained}
    if isinstance(adapters, LoRA) and adapters.factors == "second":
        held |= {name for name in added if is_first_factor(name)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name not in held)
    return Attached(frozenset(held), frozenset(name for name in added if LORA_LOCAL in name.split(".")))


def _put(name: str, layer: nn.Module, adapters: LoRA | Bottleneck | Prompts, folds: bool) -> None:
    match adapters:
        case LoRA():
            _check_low_rank(name, layer)
            layer.add_module(LORA, LowRank(layer, adapters.rank, adapters.scale(adapters.rank)))
            if adapters.local_rank:
                layer.add_module(LORA_LOCAL, LowRank(layer, adapters.local_rank, adapters.scale(adapters.local_rank)))
            if folds:
                layer.add_module(FOLDED, Folded(layer, adapters.scale(adapters.rank)))
            layer.register_forward_hook(_add_low_rank)
        case Bottleneck():
            layer.add_module(BOTTLENECK, Narrow(adapters.features, adapters.width))
            layer.register_forward_hook(_add_narrow)
        case Prompts():
            layer.add_module(PROMPT, Tokens(adapters.tokens, adapters.features))
            layer.register_forward_pre_hook(_prepend)
            layer.register_forward_hook(_drop)


def _check_low_rank(name: str, layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        return
    if not isinstance(layer, _CONVOLUTIONS):
        raise StudyError(
            f"adapters.targets: {name} is a {type(layer).__name__}, and LoRA is for linear and convolutional layers; "
            "name the layers in it"
        )
    if layer.groups != 1:
        raise StudyError(
            f"adapters.targets: {name} is a convolution of {layer.groups} groups, which has no LoRA; name other layers"
        )


# Hooks, which networks that use a layer's weights without calling it would pass by: `_targets` refuses those known.


def _add_low_rank(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    for part in (LORA, LORA_LOCAL):
        if (added := getattr(layer, part, None)) is not None:
            output = output + added(inputs[0]).to(output.dtype)
    if (folded := getattr(layer, FOLDED, None)) is not None:
        output = output + folded.added(layer, inputs[0]).to(output.dtype)
    return output


def _add_narrow(layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    narrow: Narrow = getattr(layer, BOTTLENECK)
    _check_tokens(layer, output, narrow.down.in_features)
    added: Tensor = narrow(output)
    return output + added.to(output.dtype)


def _prepend(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    first, *others = inputs
    tokens: Tensor = getattr(layer, PROMPT).weight
    _check_tokens(layer, first, tokens.shape[1])
    return (torch.cat([tokens.to(first.dtype).expand(len(first), -1, -1), first], dim=1), *others)


def _drop(layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output[:, len(getattr(layer, PROMPT).weight) :]


def _check_tokens(layer: nn.Module, seen: object, features: int) -> None:
    if not isinstance(seen, Tensor) or seen.shape[-1] != features:
        found = f"has {seen.shape[-1]}" if isinstance(seen, Tensor) else "is no tensor"
        raise StudyError(
            f"adapters.features: {features}, and what passes a {type(layer).__name__} of adapters.targets {found}; "
            "correct the number, or name other layers"
        )


# Names -------------------------------------------------------------------------------------------------------------


def _targets(model: nn.Module, patterns: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    layers = {name: layer for name, layer in model.named_modules() if name}
    # Attention of torch multiplies by the weights of its last layer and never calls it.
    passed = {
        f"{name}.{child}" if name else child
        for name, layer in model.named_modules()
        if isinstance(layer, nn.MultiheadAttention)
        for child, _ in layer.named_modules()
        if child
    }
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        named = matched(
            (pattern,),
            layers,
            lambda one: f"adapters.targets: {one!r} matches no layer of the network; {_near(one, layers)}",
        )
        if inside := [name for name in named if name in passed]:
            raise StudyError(
                f"adapters.targets: {inside[0]} belongs to a MultiheadAttention of torch, which does not call it; name "
                "other layers, or take a network with q, k and v of their own"
            )
        chosen |= {name: layers[name] for name in named}
    yield from chosen.items()


def _trained(patterns: Sequence[str], names: Collection[str]) -> frozenset[str]:
    def missing(one: str) -> str:
        return f"adapters.trained: {one!r} matches no value of the network; {_near(one, names)}"

    return frozenset(matched(patterns, names, missing))


def _near(pattern: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(pattern.replace("*", ""), names, n=_NEAR, cutoff=0.0)
    return f"names near it: {', '.join(near)}" if near else "it has none"


def with_folded(model: nn.Module, name: str, value: Array) -> Array:
    """The weight of a layer with something folded into it; `name` is what is folded, in a network's state."""
    weight = on_host(_folding(model, name).get_parameter("weight").detach().float())
    return np.asarray(weight + np.float32(folded_scale(model, name)) * value)


def folded_scale(model: nn.Module, name: str) -> float:
    """What is folded counts as many times in the weight of its layer."""
    folded: Folded = getattr(_folding(model, name), FOLDED)
    return folded.scale


def _folding(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.removesuffix(f"{FOLDED}.weight").removesuffix("."))


# Merging -----------------------------------------------------------------------------------------------------------


def merged(model: nn.Module) -> nn.Module:
    """The same network with its low-rank products added to the layers' weights, in place, and no such adapter left.

    Raises `StudyError` for adapters that are no part of a weight: bottlenecks and prompts.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Narrow | Tokens):
            raise StudyError(f"{name} cannot be merged into a weight; only LoRA can")
        if not (parts := products(layer)):
            continue
        weight: Tensor = layer.get_parameter("weight")
        with torch.no_grad():
            # One rounding for all of them: a base of 16 bits has few digits to lose.
            weight.copy_(weight.double() + sum(part.product() for part in parts.values()))
        for part in parts:
            delattr(layer, part)
    return model


def products(layer: nn.Module) -> dict[str, LowRank | Folded]:
    """What is added to the weight of a layer, by the names of its parts; empty for a layer without."""
    found = {name: getattr(layer, name, None) for name in (LORA, LORA_LOCAL, FOLDED)}
    return {name: part for name, part in found.items() if isinstance(part, LowRank | Folded)}


def added_values(model: nn.Module) -> frozenset[str]:
    """Names of the values that adapters added to a network."""
    return frozenset(
        f"{name}.{value}"
        for name, part in model.named_modules()
        if isinstance(part, LowRank | Folded | Narrow | Tokens)
        for value in part.state_dict()
    )
