"""SCAN-PhysFed, the level of scanners: a shared hypernetwork gives every scanner a code, and codes keep apart."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from wardround.errors import StudyError
from wardround.learning.methods.method import LocalRound
from wardround.learning.methods.personal import Personal, PersonalSettings
from wardround.learning.policy import Parameter, Policy
from wardround.wire.random import public_generator

if TYPE_CHECKING:
    from torch import Tensor, nn

Features = tuple[float, ...]


@dataclass(frozen=True)
class ScanPhysFed(Personal):
    """Encoder and hypernetworks are shared, the decoder stays at the site (Yang et al., CVPR 2025).

    The model's `anatomy`, which turns what a site knows of a patient into a map, is shared as the rest is.

    loss + repulsion x |cos(e(g), e(g'))|, where e(g) is the code that the hypernetwork makes of the site's protocol g,
    and g' the protocol of another training site, drawn anew for every step from public randomness. The authors' code
    may draw g' = g, where the term is a constant; here g' always differs. The code of an untrained hypernetwork is
    zero, and so are the term and its gradient: the loss has to move it first.

    A hospital that did not train is served with the nearest code of the code book, which holds the codes of the
    training sites' protocols (the paper's PVQS): a hypernetwork knows only the scanners that it has seen. The code book
    is no part of the model's file: the released hypernetwork and the study's protocols are all it depends on.

    `scanners`: name and protocol features of every training site.
    """

    repulsion: float = 1e-4
    scanners: tuple[tuple[str, Features], ...] = ()
    parts = ("encoder.", "decoder.", "hypernetwork.")
    remedy = "model: {kind: redcnn, conditioning: bottleneck}"

    def is_private(self, parameter: Parameter) -> bool:
        """The decoder."""
        return parameter.name.startswith("decoder.")

    def policy(self, parameters: tuple[Parameter, ...]) -> Policy:
        """Raises `StudyError` also where no two training sites have scanners that differ."""
        if len({features for _, features in self.scanners}) < 2:
            raise StudyError(
                "method.kind=scan_physfed needs training sites with different CT scanners; give them an acquisition of "
                "their own (sites.NAME.acquisition), or choose method.kind: hyperfed"
            )
        return super().policy(parameters)

    def another_scanner(self, local: LocalRound) -> Features:
        """The protocol g' of a step: of another training site, and never the site's own."""
        own = dict(self.scanners)[local.site]
        others = [features for _, features in self.scanners if features != own]
        random = public_generator(local.seed, local.site, local.number, local.step, "another scanner")
        return others[random.integers(len(others))]

    def objective(self, local: LocalRound, loss: Tensor) -> Tensor:
        """The loss plus the repulsion of two scanners' codes."""
        from torch.nn.functional import cosine_similarity

        own, other = (
            scanner_code(local.model, self._tensor(g, loss))
            for g in (dict(self.scanners)[local.site], self.another_scanner(local))
        )
        return loss + self.repulsion * cosine_similarity(own, other, dim=-1).abs()

    def serving_unseen(self, model: nn.Module) -> AbstractContextManager[Any]:
        """From now until the context is left, the model sees the training scanner with the nearest code."""
        return _nearest_code(model, tuple(features for _, features in self.scanners))

    @staticmethod
    def _tensor(features: Features, like: Tensor) -> Tensor:
        return like.new_tensor(features)


def scanner_code(model: nn.Module, protocol: Tensor) -> Tensor:
    """The code e(g) of protocols (..., 7): every scale and shift that the model's hypernetwork makes of them, in a row.

    Shape (..., D). Hooks of the hypernetwork are not run.
    """
    import torch

    hypernetwork: Any = model.hypernetwork
    films = hypernetwork.forward(protocol).values()
    return torch.cat([part for film in films for part in (film.gamma, film.beta)], dim=-1)


def _nearest_code(model: nn.Module, known: tuple[Features, ...]) -> AbstractContextManager[Any]:
    import torch

    hypernetwork: Any = model.hypernetwork
    like = next(hypernetwork.parameters())
    protocols = torch.tensor(known, dtype=like.dtype, device=like.device)
    with torch.no_grad():
        book = scanner_code(model, protocols)

    def replace(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            distance = (scanner_code(model, arguments[0]).unsqueeze(-2) - book).norm(dim=-1)
        nearest = distance.argmin(dim=-1)
        # An index of no axis would be read on the host.
        return (protocols.index_select(0, nearest.flatten()).reshape(*nearest.shape, -1), *arguments[1:])

    # The handle of a hook is a context manager that removes it.
    handle: AbstractContextManager[Any] = hypernetwork.register_forward_pre_hook(replace)
    return handle


class ScanPhysFedSettings(PersonalSettings):
    """Encoder and hypernetwork are shared, the decoder stays at the site (SCAN-PhysFed, Yang et al., 2025).

    The level of scanners; anatomy prompts are the model's: `model: {kind: redcnn, anatomy: {...}}`.
    """

    kind: Literal["scan_physfed"]
    repulsion: float = Field(1e-4, ge=0.0, description="weight of |cos| between the codes of two sites' scanners")

    def build(self, protocols: Mapping[str, Any]) -> ScanPhysFed:
        """The method, which knows the training sites' scanners."""
        scanners = tuple((site, tuple(float(v) for v in g)) for site, g in protocols.items())
        return ScanPhysFed(self.weights, self.unseen, repulsion=self.repulsion, scanners=scanners)

    def describe(self) -> str:
        """With how much of the term."""
        return f"{self.kind}, repulsion {self.repulsion:g}"
