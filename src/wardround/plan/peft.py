"""Low-rank adapters as Hugging Face's peft writes them: a folder with `adapter_model.safetensors` and its settings.

A layer's factors are `base_model.model.LAYER.lora_A.weight` (rank, ...) and `lora_B.weight` (outputs, rank, ...); what
was trained beside them has its own name behind the same prefix
(https://huggingface.co/docs/peft/developer_guides/checkpoint). Nothing of peft is imported, and no pickle is opened.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wardround.errors import StudyError, WireError
from wardround.learning.policy import listed
from wardround.models.adapters import LowRank
from wardround.models.low_rank import LORA
from wardround.plan.found import file_sha256
from wardround.study.adapters import Adapters, LoRA
from wardround.study.start import FromAdapter
from wardround.wire.canonical import parse_json
from wardround.wire.files import reason

MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: How an adapter's settings name a base that is known by its hash.
BY_HASH = "sha256:"
_PREFIX = "base_model.model."
_FACTORS = {"lora_A": "a", "lora_B": "b"}
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.(?P<factor>lora_[AB])\.weight")
_MOST = 2**20  # bytes of settings
# Settings that change nothing of what the factors mean; any other that says something is one that this does not read.
_HARMLESS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_type", "peft_version"}
    | {"r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save"}
    | {"layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"}
)
# Ways to begin that leave the base as it is. Others, such as `pissa`, take their part out of its weights.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Settings:
    """What the settings of a peft adapter say of its factors. `base` names the network that they were trained on."""

    rank: int
    alpha: float
    rank_stabilised: bool
    base: str

    @property
    def scale(self) -> float:
        """How often the product counts."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def to_json(self, layers: Sequence[str], whole: Sequence[str]) -> str:
        """The file of settings, for factors of some layers and other layers as a whole."""
        # A list would match by the ends of names.
        exact = "|".join(re.escape(name) for name in sorted(layers))
        said = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": self.base,
            "revision": None,
            "inference_mode": True,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.rank_stabilised,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "target_modules": f"({exact})",
            "modules_to_save": sorted(whole) or None,
        }
        return json.dumps(said, indent=2, sort_keys=True) + "\n"


def keys_of(layer: str) -> dict[str, str]:
    """The names of a layer's factors in a file -> which factor each is."""
    return {f"{_PREFIX}{layer}.{theirs}.weight": ours for theirs, ours in _FACTORS.items()}


def key_of(name: str) -> str:
    """The name in a file of a value of the base."""
    return _PREFIX + name


def begin_with_adapter(
    start: FromAdapter, folder: Path, base: str, adapters: Adapters, model: nn.Module
) -> frozenset[str]:
    """Put the factors of a peft folder into a model with LoRA, and the whole layers that come with them.

    Returns the names of the values that it put in. `base` is the hash of what the study starts from. Raises
    `StudyError` for another file than the study's, for settings that are not the study's or that are not read, and for
    layers, ranks and shapes that do not fit.
    """
    with _reading(start.file, folder):
        if not (folder / MODEL).is_file():
            raise StudyError(
                f"start.adapter.file: {start.file} has no {MODEL}; get the folder again, as peft's `save_pretrained` "
                "wrote it. An adapter_model.bin is a pickle, which is not opened"
            )
        _check_hash(start, file_sha256(folder / MODEL))
        _check_settings(start, read_settings(start.file, folder / CONFIG), base, adapters)
        with safe_open(str(folder / MODEL), framework="pt") as file:
            return _fill(start, {name: file.get_tensor(name) for name in file.keys()}, model)  # noqa: SIM118


def read_settings(named: str, path: Path) -> Settings:
    """The settings of a peft adapter of plain LoRA; raises `StudyError` for any other, and `OSError`."""
    key = f"start.adapter.file: {named}"
    if not path.is_file():
        raise StudyError(f"{key} has no {CONFIG}; get the folder again, as peft's `save_pretrained` wrote it")
    with path.open("rb") as file:
        data = file.read(_MOST + 1)
    try:
        said = parse_json(data) if len(data) <= _MOST else None
    except WireError:
        said = None
    if not isinstance(said, dict):
        raise StudyError(f"{key}: {CONFIG} is no JSON of settings; get it again")
    kind = said.get("peft_type")
    if kind != "LORA":
        raise StudyError(f"{key} is of type {str(kind)[:40]!r}, and a study begins with LORA alone")
    for name, value in said.items():
        known = name in _HARMLESS or (name == "bias" and value == "none")
        if not (known or not value or (name == "init_lora_weights" and value in _BEGINNINGS)):
            raise StudyError(
                f"{key}: {CONFIG} has {name[:40]}: {json.dumps(value)[:60]}, which is not read here, so its factors "
                "would mean something else; take an adapter of plain LoRA, or merge it where it was made"
            )
    rank, alpha = said.get("r"), said.get("lora_alpha")
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise StudyError(f"{key}: {CONFIG} has no numbers `r` and `lora_alpha`; get it again")
    return Settings(rank, float(alpha), bool(said.get("use_rslora")), str(said.get("base_model_name_or_path") or ""))


def _check_hash(start: FromAdapter, found: str) -> None:
    if not start.sha256:
        raise StudyError(
            f"start.adapter.sha256: is missing, and the hash fixes what a study is; write `sha256: {found}`"
        )
    if found != start.sha256:
        raise StudyError(
            f"start.adapter.file: {start.file} holds another {MODEL} than the study's: its sha256 is {found}, and the "
            f"study says {start.sha256}; restore it, or start a new run with the new hash"
        )


def _check_settings(start: FromAdapter, found: Settings, base: str, adapters: Adapters) -> None:
    key = f"start.adapter.file: {start.file}"
    if found.base.startswith(BY_HASH) and found.base != BY_HASH + base:
        raise StudyError(
            f"{key} is of the base {found.base}, and the study starts from {BY_HASH}{base}; start from its own base"
        )
    if not isinstance(adapters, LoRA):
        raise StudyError(f"{key} is LoRA, and the study's adapters are not; set adapters.kind: lora")
    if found.rank != adapters.rank:
        raise StudyError(f"{key} has rank {found.rank}, and adapters.rank is {adapters.rank}; set it to {found.rank}")
    if not math.isclose(found.scale, adapters.scale(adapters.rank), rel_tol=1e-12):
        raise StudyError(
            f"{key} counts its product {found.scale:g} times, and the study {adapters.scale(adapters.rank):g} times; "
            f"set adapters.alpha: {found.alpha:g} and adapters.rank_stabilised: {str(found.rank_stabilised).lower()}"
        )


def _fill(start: FromAdapter, tensors: Mapping[str, Tensor], model: nn.Module) -> frozenset[str]:
    key = f"start.adapter.file: {start.file}"
    parts = {n: part for n, layer in model.named_modules() if isinstance(part := getattr(layer, LORA, None), LowRank)}
    theirs = {found["layer"] for name in tensors if (found := _KEY.fullmatch(name))}
    if missing := sorted(parts.keys() - theirs):
        raise StudyError(f"{key} has no factors for {listed(missing)}, which adapters.targets names; leave them out")
    if extra := sorted(theirs - parts.keys()):
        raise StudyError(f"{key} has factors for {listed(extra)}, which adapters.targets does not name; add them")
    state = model.state_dict()
    ours = {k: f"{layer}.{LORA}.{factor}.weight" for layer in parts for k, factor in keys_of(layer).items()}
    ours |= {name: name.removeprefix(_PREFIX) for name in tensors if name not in ours}
    if unknown := sorted(name for name, own in ours.items() if name not in tensors or own not in state):
        raise StudyError(f"{key}: {listed(unknown)} has no place in the network, or is missing; get the folder again")
    with torch.no_grad():
        for name, own in ours.items():
            if tensors[name].shape != state[own].shape:
                raise StudyError(
                    f"{key} has {name} of shape {list(tensors[name].shape)}, and the network "
                    f"{list(state[own].shape)}; take the network that it is of"
                )
            if torch.promote_types(tensors[name].dtype, state[own].dtype) != state[own].dtype:
                raise StudyError(
                    f"{key} has {name} as {tensors[name].dtype}, which the network's cannot hold; convert it"
                )
        for name, own in ours.items():
            state[own].copy_(tensors[name])
    return frozenset(ours.values())


@contextmanager
def _reading(file: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StudyError(f"start.adapter.file: {file} cannot be read ({reason(error)})", detail=str(path)) from error
    except SafetensorError as error:
        raise StudyError(
            f"start.adapter.file: {MODEL} of {file} is damaged; get it again", detail=str(error)
        ) from error
