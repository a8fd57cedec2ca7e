"""What a MONAI bundle says of its network: the definition and what it refers to, as plain values.

A bundle's configuration can name any Python callable and hold expressions. Here a definition is data: its `_target_` is
one of a closed list, its arguments are of a closed list for each, and no expression is evaluated but a literal.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from wardround.errors import StudyError, WireError
from wardround.study.base import Config
from wardround.study.yaml_text import parse_yaml
from wardround.wire.canonical import MAX_DEPTH, parse_json

Target = Literal["AttentionUnet", "BasicUNet", "DynUNet", "SegResNet", "SwinUNETR", "UNet", "UNETR", "VNet"]
_EVERY = ("spatial_dims", "in_channels", "out_channels")
_STEPS = ("channels", "strides", "kernel_size", "up_kernel_size", "dropout")
ARGUMENTS: Mapping[str, frozenset[str]] = {
    target: frozenset((*_EVERY, *own))
    for target, own in {
        "AttentionUnet": _STEPS,
        "BasicUNet": ("features", "act", "norm", "bias", "dropout", "upsample"),
        "DynUNet": (
            "kernel_size", "strides", "upsample_kernel_size", "filters", "dropout", "norm_name", "act_name",
            "res_block", "trans_bias",
        ),
        "SegResNet": (
            "init_filters", "dropout_prob", "act", "norm", "norm_name", "num_groups", "use_conv_final", "blocks_down",
            "blocks_up", "upsample_mode",
        ),
        "SwinUNETR": (
            "patch_size", "depths", "num_heads", "window_size", "qkv_bias", "mlp_ratio", "feature_size", "norm_name",
            "drop_rate", "attn_drop_rate", "dropout_path_rate", "normalize", "patch_norm", "downsample", "use_v2",
        ),
        "UNet": (*_STEPS, "num_res_units", "act", "norm", "bias", "adn_ordering"),
        "UNETR": (
            "img_size", "feature_size", "hidden_size", "mlp_dim", "num_heads", "proj_type", "norm_name", "conv_block",
            "res_block", "dropout_rate", "qkv_bias",
        ),
        "VNet": ("act", "dropout_prob", "dropout_prob_down", "dropout_prob_up", "dropout_dim", "bias"),
    }.items()
}  # fmt: skip
# What decides no value: how memory is saved, and the size that a Swin UNETR of today takes from its image.
_IDLE = {"SwinUNETR": {"img_size", "use_checkpoint"}, "DynUNet": {"deep_supr_num"}}
# As this MONAI calls it.
_NOW = {("UNETR", "pos_embed"): "proj_type"}
# What is as served where it is off.
_OFF = {"deep_supervision", "save_attn"}
_DEFINITIONS = ("network_def", "network", "net")
_NOTE = "_desc_"
_REFERENCE = re.compile(r"@[\w.]+(?:(?:#|::)[\w.]+)*")
_PLACE = re.compile(r"(?:monai\.networks\.nets\.(?:\w+\.)?)?(\w+)")
_LONGEST = 256


def _plain(value: Any, depth: int = 0) -> Any:
    """The value, where it is numbers, short texts and lists and mappings of them; raises ValueError."""
    if depth > MAX_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list | tuple):
        return [_plain(one, depth + 1) for one in value]
    if isinstance(value, dict) and all(isinstance(key, str) and not key.startswith("_") for key in value):
        return {key: _plain(one, depth + 1) for key, one in value.items()}
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, str) and len(value) <= _LONGEST and not value.startswith(("$", "@", "%")):
        return value
    raise ValueError("must be a number, a text, or a list or mapping of them; no expression and no object")


class Definition(Config):
    """One of MONAI's networks and its arguments, as a bundle's `network_def` has them."""

    target: Target = Field(description="a class of `monai.networks.nets`")
    arguments: dict[str, Annotated[Any, AfterValidator(_plain)]] = Field(
        description="of that class: numbers, texts, lists and mappings"
    )

    @model_validator(mode="after")
    def _are_served(self) -> Self:
        if unknown := sorted(self.arguments.keys() - ARGUMENTS[self.target]):
            known = ", ".join(sorted(ARGUMENTS[self.target]))
            raise ValueError(f"argument {unknown[0]!r} of {self.target} is not served; served are {known}")
        return self


def definition_of(text: str, name: str, place: str) -> dict[str, Any]:
    """The network of a bundle's configuration, a file called `name` of that content; `place` is what errors call it.

    Raises ValueError for what is no configuration, for a network that is not served, and for an expression in it.
    """
    try:
        said = parse_json(text) if name.endswith(".json") else parse_yaml(text, place)
    except (WireError, StudyError) as error:
        raise ValueError(f"{place} cannot be read ({error})") from None
    key = next((k for k in _DEFINITIONS if isinstance(said, dict) and isinstance(said.get(k), dict)), None)
    if key is None:
        raise ValueError(f"{place} has no network_def; take a bundle that has one")
    return _Reader(said, place).definition(key)


class _Reader:
    def __init__(self, said: Mapping[str, Any], place: str) -> None:
        self._said, self._place = said, place

    def definition(self, key: str) -> dict[str, Any]:
        given = dict(self._said[key])
        named = given.pop("_target_", None)
        found = _PLACE.fullmatch(named) if isinstance(named, str) else None
        target = found.group(1) if found else None
        if target is None or target not in ARGUMENTS:
            said = named[:60] if isinstance(named, str) else "nothing"
            raise ValueError(
                f"{self._place}: {key} is a {said}, and nothing is imported for it; served of monai.networks.nets are "
                f"{', '.join(ARGUMENTS)}"
            )
        given.pop(_NOTE, None)
        arguments = {}
        for name, value in given.items():
            plain = self._value(value, f"{key}.{name}")
            if name in _IDLE.get(target, ()) or (name in _OFF and plain is False):
                continue
            arguments[name if name in ARGUMENTS[target] else _NOW.get((target, name), name)] = plain
        return {"target": target, "arguments": arguments}

    def _value(self, value: Any, key: str, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"{self._place}: {key} refers to itself, or is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, str) and value.startswith(("$", "@", "%")):
            return self._meant(value, key, depth + 1)
        if isinstance(value, list):
            return [self._value(one, key, depth + 1) for one in value]
        if isinstance(value, dict):
            if "_target_" in value:
                raise ValueError(f"{self._place}: {key} builds an object, and a network takes plain values alone")
            return {str(name): self._value(one, key, depth + 1) for name, one in value.items()}
        return value

    def _meant(self, value: str, key: str, depth: int) -> Any:
        body = value.removeprefix("$").strip()
        if _REFERENCE.fullmatch(body):
            return self._value(self._referred(body, key), key, depth)
        try:
            if not value.startswith("$") or len(body) > _LONGEST:
                raise ValueError
            return self._value(_as_list(ast.literal_eval(body)), key, depth)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(
                f"{self._place}: {key} is the expression {value[:60]!r}, and none is evaluated; write its value there"
            ) from None

    def _referred(self, reference: str, key: str) -> Any:
        found: Any = self._said
        for part in re.split("#|::", reference.removeprefix("@")):
            if isinstance(found, list) and part.isdigit() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, dict) and part in found:
                found = found[part]
            else:
                raise ValueError(f"{self._place}: {key} refers to {reference[:60]}, which is not there")
        return found


def _as_list(value: Any) -> Any:
    return [_as_list(one) for one in value] if isinstance(value, tuple | list) else value
