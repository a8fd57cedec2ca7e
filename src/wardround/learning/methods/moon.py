"""MOON: what a site's network makes of an image stays nearer to what the global one does than to its own of before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from wardround.errors import StudyError
from wardround.learning.methods.method import LocalRound, Method
from wardround.learning.places import pooled
from wardround.study.methods import AveragingSettings
from wardround.study.models import Layer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wardround.study.schema import Study

_PREVIOUS = "previous/"
_WATCH = "watch"


@dataclass(frozen=True)
class MOON(Method):
    """Model-contrastive learning (Li et al., CVPR 2021, equations 3 and 4).

    The loss gets mu times the mean over a batch of -log(exp(s_global) / (exp(s_global) + exp(s_previous))), with
    s = cos(z, .) / tau of what the network, the global one of the round's start, and the site's own of the end of its
    last round make of an image. z is what goes into or comes out of one layer of the network, averaged over places; the
    paper's projection head is none of its own here. In a site's first round the network of before is the global one,
    and the term is without gradient.

    Both other networks are the same module with other values, in the same mode and without gradients; their batch norm
    takes the batch's statistics and keeps none. A site's memory holds the shared values of its last round. A step costs
    two forward passes more. Nothing more is sent. A hospital that did not train gets the same model.
    """

    holds = 1
    stores = 1
    mu: float = 1.0
    tau: float = 0.5
    layer: Layer | None = None

    def within(self, study: Study, sites: int, model: nn.Module) -> MOON:
        """With the layer of the study's network. Raises `StudyError` where it has none that is known, or no such."""
        layer = self.layer or study.model.represents
        say = "name the module whose output says what the network makes of an image as method.layer"
        if layer is None:
            raise StudyError(
                f"method.kind=moon compares what networks make of an image, and model.kind={study.model.kind} does not "
                f"say where it has that; {say}"
            )
        if not any(name == layer.name for name, _ in model.named_modules()):
            raise StudyError(f"method.layer: the network has no module {layer.name!r}; {say}")
        return replace(self, layer=layer)

    @contextmanager
    def during(self, local: LocalRound) -> Iterator[None]:
        """Watches the layer while the steps are taken, and remembers what is shared as it is after them."""
        import torch

        assert self.layer is not None
        kept = {n: t.detach().clone() for n, t in local.private.items()}
        known = {n.removeprefix(_PREVIOUS): t for n, t in local.memory.items() if n.startswith(_PREVIOUS)}
        with _watching(local.model, self.layer) as watch:
            if known and self.mu:
                with torch.no_grad():
                    watch.others = tuple(_values(local.model, {**kept, **own}) for own in (local.anchor, known))
            local.scratch[_WATCH] = watch
            try:
                yield
            finally:
                del local.scratch[_WATCH]
        local.memory.update({_PREVIOUS + name: tensor.detach() for name, tensor in local.shared.items()})

    def objective(self, local: LocalRound, loss: Tensor) -> Tensor:
        """The loss with the term, for each time that it called the network."""
        watch: _Watch = local.scratch[_WATCH]
        seen, watch.seen = watch.seen, []
        if not watch.others:
            return loss
        if not seen or any(call.said is None for call in seen):
            raise StudyError(
                "method.kind=moon: the task's loss does not call the network as a whole, or the layer that is compared "
                "is not reached in it; name another module as method.layer, or choose another method"
            )
        for call in seen:
            near, far = (call.again(watch, values) for values in watch.others)
            loss = loss + self.mu / len(seen) * contrast(call.said, near, far, self.tau)
        return loss


def contrast(said: Tensor, near: Tensor, far: Tensor, tau: float) -> Tensor:
    """The mean over a batch of -log(exp(a) / (exp(a) + exp(b))), a = cos(said, near) / tau, b = cos(said, far) / tau.

    All are (B, F); scalar.
    """
    from torch.nn import functional

    a, b = (functional.cosine_similarity(said.float(), other.float(), dim=1) / tau for other in (near, far))
    return functional.softplus(b - a).mean()


def _values(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All parameters and buffers of a model by name, those in `values` as there; buffers apart from the model's."""
    parameters = {n: values[n] if n in values else p.detach() for n, p in model.named_parameters()}
    return parameters | {n: values.get(n, b).clone() for n, b in model.named_buffers()}


@dataclass
class _Call:
    """One time that the network was called with gradients: with what, where, and what its layer said.

    `precision` is the type that its layers computed in, where that is lower than theirs.
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    device: str
    precision: Any
    said: Any = None

    def again(self, watch: _Watch, values: Mapping[str, Tensor]) -> Tensor:
        """What the layer says of the same with other values, without gradient; random numbers go on where they were."""
        import torch
        from torch.func import functional_call

        devices = [torch.cuda.current_device()] if self.device == "cuda" else []
        lower = nullcontext() if self.precision is None else torch.autocast(self.device, dtype=self.precision)
        with torch.random.fork_rng(devices), torch.no_grad(), lower:
            functional_call(watch.model, dict(values), self.arguments, dict(self.keywords))
            return watch.others_said.pop()


@dataclass
class _Watch:
    """What the layer said in the calls of the network since they were last looked at."""

    model: nn.Module
    others: tuple[dict[str, Tensor], ...] = ()
    seen: list[_Call] = field(default_factory=list)
    #: What the layer said without gradients.
    others_said: list[Tensor] = field(default_factory=list)


@contextmanager
def _watching(model: nn.Module, layer: Layer) -> Iterator[_Watch]:
    """Until the context is left, calls of the model and what its layer says in them are taken note of."""
    import torch

    watch = _Watch(model)

    def called(module: nn.Module, arguments: Any, keywords: Any) -> None:
        if torch.is_grad_enabled():
            device = next(model.parameters()).device.type
            lower = device != "meta" and torch.is_autocast_enabled(device)
            watch.seen.append(_Call(arguments, keywords, device, torch.get_autocast_dtype(device) if lower else None))

    def said(found: Any) -> None:
        if not torch.is_grad_enabled():
            watch.others_said = [pooled(found, layer.name)]
        # Blocks that are computed once more for the gradient (local.checkpoint) say nothing new.
        elif watch.seen and watch.seen[-1].said is None:
            watch.seen[-1].said = pooled(found, layer.name)

    part = model.get_submodule(layer.name)
    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(called, with_kwargs=True).remove)
        if layer.side == "input":
            handle = part.register_forward_pre_hook(lambda module, arguments: said(arguments[0]))
        else:
            handle = part.register_forward_hook(lambda module, arguments, found: said(found))
        hooks.callback(handle.remove)
        yield watch


class MOONSettings(AveragingSettings):
    """What a site's network makes of an image stays near to what the global one does (Li et al., 2021).

    A step costs two forward passes more.
    """

    kind: Literal["moon"]
    mu: float = Field(1.0, ge=0.0, description="weight of the term; 0.1 to 10 in the paper")
    tau: float = Field(0.5, gt=0.0, description="temperature")
    layer: str | None = Field(
        None,
        description="the module of the network whose output, averaged over places, is compared; by default the input "
        "of a classifier's last layer, or the deepest level of a segmentation network",
    )

    def build(self, protocols: Mapping[str, Any]) -> MOON:
        """The method."""
        layer = None if self.layer is None else Layer(self.layer)
        return MOON(self.weights, mu=self.mu, tau=self.tau, layer=layer, own_norm=self.unseen_norm == "own")

    def describe(self) -> str:
        """With weight and temperature."""
        return f"{self.kind}, mu {self.mu:g}, tau {self.tau:g}"
