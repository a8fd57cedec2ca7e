"""FL-MRCM: what sites' networks make of their images becomes like what the target site's makes of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from wardround.errors import StudyError, Withheld
from wardround.learning.methods.apart import APART
from wardround.learning.methods.method import Array, Changes, Facts, LocalRound, Method, Writers, state_name
from wardround.learning.methods.server import refuse_robust
from wardround.learning.policy import Parameter
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.study.methods import AveragingSettings
from wardround.study.models import Layer
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Aggregate, Group

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wardround.learning.adversary import Adversary
    from wardround.learning.latents import Watch
    from wardround.study.schema import Study

LATENTS = "target_latents"
_STATE = state_name(APART, LATENTS)
# What the table holds before a row is told; values lie around it, so that the fixed point of the first round, which
# begins at four times a tensor's largest value, has room for them. A row's last value says whether it was told.
_EMPTY = -8.0
_BITS = 32
_WATCH, _ADVERSARY, _TARGET, _TOLD = "watch", "adversary", "target", "told"


@dataclass(frozen=True)
class FLMRCM(Method):
    """Federated learning of MR images with cross-site modelling (Guo et al., CVPR 2021, section 3.3).

    Each site but the target keeps a discriminator D of its own. In every step, with z_s of its batch and z_t of the
    target, D lowers 1/2 [BCE(D(z_s), y_s) + BCE(D(z_t), y_t)] first; then the network lowers its loss +
    `adversarial` x 1/2 [BCE(D(z_s), y_t) + BCE(D(z_t), y_s)], with D as it is. The target lowers its loss alone. The
    networks' mean is plain. D is linear - LeakyReLU(0.2) - linear with two outputs, trained by RMSprop.

    The paper's sites compute z_t with the target's images. Here the target sends z_t itself, once a round, as its
    network makes them after its steps; the sites use them in the next round. So z_t is a constant of a step, and the
    second term of the network's loss has no gradient. z is what one layer says, averaged over the places of an image
    (the paper's is not) and over `patients` examples, on both sides: each vector of the target is the mean over one
    example each of so many patients, always the same ones, and no picture. Sites without z_t, in the first round,
    take steps as the target does.

    A hospital that did not train gets the averaged network.
    """

    target: str = ""
    layer: Layer | None = None
    adversarial: float = 1.0
    vectors: int = 8
    patients: int = 4
    rate: float = 1e-3
    hidden: int = 256
    #: Features of a vector; what the layer says.
    width: int = 0
    side_channels: ClassVar[frozenset[str]] = frozenset({APART})

    @property
    def discloses(self) -> str:
        """The latents, of whom, and to whom."""
        return (
            f"of site {self.target} alone: every round {self.vectors} vectors of {self.width} numbers at most, what "
            f"layer {self.layer.name if self.layer else ''!r} of its network says (method.kind: fl_mrcm), each the "
            f"mean over all places of an image and over one image each of {self.patients} of its training patients; "
            "no image. All sites and the coordinator read them"
        )

    def within(self, study: Study, sites: int, model: nn.Module) -> FLMRCM:
        """With the layer of the study's network. Raises `StudyError` where it has none that is known, or no such."""
        from wardround.learning.latents import bottleneck_of, width_of

        layer = self.layer or study.model.represents or bottleneck_of(model)
        say = "name the module whose output is what the network makes of an image as method.layer"
        if layer is None:
            raise StudyError(
                f"method.kind=fl_mrcm compares what networks make of images, and model.kind={study.model.kind} does "
                f"not say where it has that; {say}"
            )
        if not any(name == layer.name for name, _ in model.named_modules()):
            raise StudyError(f"method.layer: the network has no module {layer.name!r}; {say}")
        width = width_of(model, layer)
        if width is None:
            raise StudyError(
                f"method.layer: {layer.name!r} does not say how many features it has; name a convolution or a linear "
                "layer"
            )
        return replace(self, layer=layer, width=width)

    # What travels -------------------------------------------------------------------------------------------------

    def groups(self, shared: tuple[Parameter, ...], ring_bits: int) -> tuple[Group, ...]:
        """The model's, and one for the target's vectors: (vectors, width + 1), in whatever bits the model is."""
        table = TensorInfo(LATENTS, "float32", (self.vectors, self.width + 1))
        return (*super().groups(shared, ring_bits), Group(APART, (table,), _BITS))

    def initial(
        self, groups: tuple[Group, ...], values: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """No row is told."""
        public, private = super().initial(tuple(g for g in groups if g.name != APART), values)
        empty = {
            state_name(APART, info.name): np.full(info.shape, _EMPTY, np.float32)
            for g in groups
            if g.name == APART
            for info in g.tensors
        }
        return public | empty, private

    def group_weights(self, facts: Facts, groups: tuple[str, ...]) -> dict[str, float]:
        """What is sent apart counts as it is, whatever its site weighs."""
        return {name: 1.0 if name == APART else weight for name, weight in super().group_weights(facts, groups).items()}

    def changes(self, local: LocalRound) -> Changes:
        """The changes of the model, and how the table changes: only at the target it does."""
        changes = super().changes(local)
        before = local.received(_STATE)
        told = local.scratch.get(_TOLD)
        changes[APART] = {LATENTS: before - before if told is None else told - before}
        return changes

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """What gradients reach is averaged, after steps that the optimiser bounds."""
        return local if self.moves_as(FLMRCM) else UNKNOWN

    def apply_group(
        self,
        group: Group,
        public: Mapping[str, Array],
        private: Mapping[str, Array],
        aggregate: Aggregate,
        write: Writers,
    ) -> None:
        """The table moves by the sum over sites, of which all but the target's part is 0.

        Where the target was away, it stays as it was.
        """
        if group.name != APART:
            super().apply_group(group, public, private, aggregate, write)
            return
        for info in group.tensors:
            name = state_name(APART, info.name)
            moved = public[name] + aggregate.contributors * aggregate.mean(APART, info.name)
            write.public(name, moved.astype(public[name].dtype))

    # At a site ----------------------------------------------------------------------------------------------------

    def begin(self, local: LocalRound) -> None:
        """Raises `Withheld` at a target whose vectors would be of too few patients."""
        if local.site != self.target or local.survey is None:
            return
        least, there = max(2, local.survey.least), len(local.survey.patients())
        if self.patients < least or there < self.patients:
            few = f"a vector is of {self.patients} patients" if there >= self.patients else f"it has {there} patients"
            raise Withheld(
                f"site {local.site} withholds what its network makes of its images (method.kind: fl_mrcm): {few}, and "
                f"the site lets out nothing of fewer than {max(least, self.patients)}; set method.patients to "
                f"{least} or more, and not above the target's training patients"
            )

    @contextmanager
    def during(self, local: LocalRound) -> Iterator[None]:
        """The layer is watched while steps are taken; after them, the target measures, and others keep D."""
        from wardround.learning.adversary import Adversary
        from wardround.learning.latents import watching

        assert self.layer is not None
        targets = self._of_target(local)
        if local.site == self.target:
            yield
            if local.survey is not None and local.loss_of is not None:
                with watching(local.model, self.layer) as watch:
                    local.scratch[_TOLD] = self._measured(local, watch)
        elif targets is None:
            yield
        else:
            adversary = Adversary.of(local, self._discriminator, self.rate)
            with watching(local.model, self.layer) as watch:
                local.scratch.update({_WATCH: watch, _ADVERSARY: adversary, _TARGET: targets})
                try:
                    yield
                finally:
                    for name in (_WATCH, _ADVERSARY, _TARGET):
                        del local.scratch[name]
            adversary.keep(local)

    def objective(self, local: LocalRound, loss: Tensor) -> Tensor:
        """A step of the discriminator; then the loss with the network's term, both as in the class."""
        if _WATCH not in local.scratch:
            return loss
        adversary: Adversary = local.scratch[_ADVERSARY]
        there: Tensor = local.scratch[_TARGET]
        here = grouped(local.scratch[_WATCH].taken(), self.patients)
        # D's own step is in full precision, and outside of what scales the gradients of the network.
        adversary.step(confusion(adversary.network(here.detach()), adversary.network(there), 0))
        return loss + self.adversarial * confusion(adversary.judged(here), adversary.judged(there), 1)

    def _discriminator(self) -> nn.Module:
        from torch import nn

        return nn.Sequential(nn.Linear(self.width, self.hidden), nn.LeakyReLU(0.2), nn.Linear(self.hidden, 2))

    def _of_target(self, local: LocalRound) -> Tensor | None:
        """The vectors that the target told last: (n, width); `None` where there are none."""
        import torch

        table = np.asarray(local.public[_STATE])
        rows = table[table[:, -1] > 0.5 * _EMPTY, :-1] - np.float32(_EMPTY)
        return torch.from_numpy(rows).to(next(iter(local.shared.values())).device) if len(rows) else None

    def _measured(self, local: LocalRound, watch: Watch) -> Tensor:
        """The table with what the network, as it is, says of the target's images."""
        import torch

        from wardround.learning.latents import buffers_kept

        assert local.survey is not None
        assert local.loss_of is not None
        table = torch.full_like(local.received(_STATE), _EMPTY)
        with torch.no_grad(), buffers_kept(local.model):
            for row, examples in enumerate(local.survey.across_patients(self.patients, self.vectors)):
                local.loss_of(local.survey.batch_of(examples))
                table[row, :-1] += watch.taken().mean(0)
                table[row, -1] = 0.0
        return table


def grouped(said: Tensor, size: int) -> Tensor:
    """(B, F) -> (B // size, F): means of `size` examples each, in their order; what is left over counts for none."""
    count = len(said) // size
    return said[: count * size].reshape(count, size, -1).mean(1)


def confusion(here: Tensor, there: Tensor, flipped: int) -> Tensor:
    """1/2 [BCE(D(z_s), y) + BCE(D(z_t), y')] of a discriminator's outputs (n, 2), y = (1, 0) and y' = (0, 1).

    `flipped` is 1 for the labels of the network's step: y and y' change places.
    """
    import torch
    from torch.nn import functional

    labels = torch.eye(2, device=here.device)
    one = functional.binary_cross_entropy_with_logits(here, labels[flipped].expand_as(here))
    other = functional.binary_cross_entropy_with_logits(there, labels[1 - flipped].expand_as(there))
    return 0.5 * (one + other)


class FLMRCMSettings(AveragingSettings):
    """What networks make of images becomes like at the target site (FL-MRCM, Guo et al., 2021).

    The target's averaged latents are a side channel, in every round; images never travel.
    """

    kind: Literal["fl_mrcm"]
    weights: Literal["samples", "equal", "validation"] = Field(
        "equal", description="`validation` is exp(-validation loss), clamped"
    )
    target: str = Field(description="the training site whose images the others' shall look like to the network")
    layer: str | None = Field(
        None,
        description="the module of the network whose output, averaged over places, is compared; by default the middle "
        "convolution of a denoiser, the deepest level of a U-Net, or the input of a classifier's last layer",
    )
    adversarial: float = Field(1.0, ge=0.0, description="weight of the network's term; 1 in the paper")
    vectors: int = Field(8, ge=1, le=256, description="vectors that the target sends in a round, at most")
    patients: int = Field(
        4, ge=2, description="patients that a vector is the mean of, one image of each; `local.batch` must be as many"
    )
    lr: float = Field(1e-3, gt=0.0, description="rate of the sites' discriminators")
    hidden: int = Field(256, ge=1, le=4096, description="hidden units of the sites' discriminators")

    def check(self, study: Study) -> None:
        """Raises `ValueError` for a target that does not train, and for what would not cover the side channel."""
        if self.target not in study.training_sites:
            raise ValueError(
                f"method.target: {self.target!r} is no training site; choose from {', '.join(study.training_sites)}"
            )
        if study.protection.secure:
            raise ValueError(
                "method.kind=fl_mrcm cannot be combined with protection.secure: the target's latents are of one site "
                "and read by all, and no sum hides them; leave out protection.secure, or choose another method"
            )
        refuse_robust(self.kind, study)
        if study.local.batch < self.patients:
            raise ValueError(
                f"method.patients: the target's vectors are means over {self.patients} images, and so are those of a "
                f"batch, which has {study.local.batch}; set local.batch to {self.patients} or a multiple, or lower "
                "method.patients"
            )
        if study.local.accumulate > 1:
            raise ValueError(
                "local.accumulate: with method.kind=fl_mrcm a discriminator takes one step a batch, and would take one "
                "for each piece; leave it out"
            )

    def build(self, protocols: Mapping[str, Any]) -> FLMRCM:
        """The method."""
        return FLMRCM(
            self.weights,
            own_norm=self.unseen_norm == "own",
            target=self.target,
            layer=None if self.layer is None else Layer(self.layer),
            adversarial=self.adversarial,
            vectors=self.vectors,
            patients=self.patients,
            rate=self.lr,
            hidden=self.hidden,
        )

    def describe(self) -> str:
        """With the target, and what it sends."""
        return (
            f"{self.kind}, target {self.target}, weight {self.adversarial:g}, {self.vectors} latents a round of "
            f"{self.patients} patients each"
        )
