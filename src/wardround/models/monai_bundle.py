"""Networks of MONAI bundles that outline, built from what a study says alone; a bundle's code is never run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, model_validator
from torch import Tensor, nn

from wardround.errors import MissingExtra, StudyError
from wardround.models.bundle_config import Definition, definition_of
from wardround.study.beside import first_beside
from wardround.study.models import ModelSettings
from wardround.study.tasks import Modality

_CONFIGS = tuple(f"configs/inference.{ending}" for ending in ("json", "yaml", "yml"))
_PREFIX = "network."


class MonaiBundleSettings(ModelSettings):
    """The network of a MONAI bundle that segments: one of MONAI's own classes, by its `network_def`.

    A study names the unpacked bundle's folder below its own. The definition in `configs/inference.json` (or `.yaml`)
    takes the folder's place as the study is read, so that the study's hashes cover it.
    """

    kind: Literal["monai_bundle"]
    modalities: ClassVar[frozenset[Modality] | None] = frozenset()
    folder: str | None = Field(None, description="of the unpacked bundle; or give `network`")
    network: Definition = Field(description="the bundle's `network_def`")
    head: Literal["sigmoid", "softmax", "fresh"] = Field(
        "sigmoid",
        description="what the bundle's outputs are. `sigmoid`: a structure each, in the order of task.structures. "
        "`softmax`: the background first, then a structure each; its probabilities stay as they are. `fresh`: others; "
        "the last layer is built anew for task.structures, and `start.partial: true` begins it fresh",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_folder(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, Mapping) or not isinstance(folder := given.get("folder"), str):
            return given
        if "network" in given:
            raise ValueError("model: has a `folder` and a `network`; remove one")
        name, text = first_beside("model.folder", folder, _CONFIGS, info)
        found = definition_of(text, name, f"{folder}/{name}")
        return {**{key: value for key, value in given.items() if key != "folder"}, "network": found}

    def describe(self) -> str:
        """The class, and what its outputs are."""
        return f"{self.kind}, {self.network.target}, head {self.head}"

    def check_size(self, size: Sequence[int]) -> None:
        """Raises StudyError for a patch of another size than the network has positions for."""
        fixed = self.network.arguments.get("img_size")
        sides = tuple(fixed) if isinstance(fixed, list) else (fixed,) * len(size)
        if fixed is not None and sides != tuple(size):
            raise StudyError(
                f"task.patch: {' x '.join(map(str, size))}, and the network has positions for "
                f"{' x '.join(map(str, sides))}; take that"
            )

    def build_network(self, dimensions: int, channels: int, outputs: int) -> Any:
        """The network; raises StudyError where the bundle's is for other images or structures."""
        said = self._stated()
        for key, what, mine in (("spatial_dims", "dimensions", dimensions), ("in_channels", "channels", channels)):
            if said[key] != mine:
                raise StudyError(f"task.{what}: {mine}, and the bundle's network has {said[key]}; give as many")
        expected = outputs + (self.head == "softmax")
        if self.head != "fresh" and said["out_channels"] != expected:
            raise StudyError(
                f"task.structures: {outputs}, for which the bundle's network would have {expected} outputs with "
                f"model.head {self.head}, and it has {said['out_channels']}; correct them, set model.head to sigmoid "
                "or softmax as the bundle's postprocessing says, or to fresh"
            )
        network = self._made(expected)
        anew = self._made_anew(network, outputs) if self.head == "fresh" else frozenset()
        return BundleNetwork(network, softmax=self.head == "softmax", anew=anew)

    def _stated(self) -> Mapping[str, Any]:
        """All arguments, with MONAI's defaults."""
        from monai.networks import nets

        try:
            bound = inspect.signature(getattr(nets, self.network.target)).bind(**self.network.arguments)
        except TypeError as error:
            raise StudyError(f"model.network: {self.network.target} cannot be built: {error}") from error
        bound.apply_defaults()
        return bound.arguments

    def _made(self, outputs: int) -> nn.Module:
        from monai.networks import nets

        made = {**self.network.arguments, "out_channels": outputs}
        try:
            network: nn.Module = getattr(nets, self.network.target)(**made)
        except ImportError as error:
            raise MissingExtra(f"MONAI's {self.network.target}", "swin") from error
        except Exception as error:
            # MONAI has an error of its own kind for each wrong number.
            raise StudyError(
                f"model.network: MONAI's {self.network.target} refuses its arguments ({type(error).__name__}); get the "
                "bundle again, or one for this version of MONAI",
                detail=str(error),
            ) from error
        return network

    def _made_anew(self, network: nn.Module, outputs: int) -> frozenset[str]:
        """Names of the values whose shapes depend on how many outputs there are."""
        with torch.random.fork_rng([]):
            other = self._made(outputs + 1).state_dict()
        return frozenset(name for name, value in network.state_dict().items() if value.shape != other[name].shape)


class BundleNetwork(nn.Module):
    """Images (B, C, *shape) -> logits (B, K, *shape).

    Of a `softmax` over a background and K structures the logits are those whose sigmoids are its probabilities:
    z_k - log(sum over j != k of exp(z_j)). `anew` are values that a published file has for other outputs.
    """

    def __init__(self, network: nn.Module, *, softmax: bool = False, anew: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.network = network
        self._softmax = softmax
        self._anew = anew

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, *shape)."""
        z: Tensor = self.network(images)
        if not self._softmax:
            return z
        others = (torch.cat([z[:, :k], z[:, k + 1 :]], dim=1) for k in range(1, z.shape[1]))
        return torch.stack([z[:, k] - other.logsumexp(dim=1) for k, other in enumerate(others, 1)], dim=1)

    def name_of(self, name: str) -> str | None:
        """See `wardround.models.published.Published`."""
        if name.startswith(_PREFIX):
            return name
        return None if name in self._anew else _PREFIX + name
