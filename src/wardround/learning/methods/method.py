"""What a method is. The base class is FedAvg: it shares everything that can be averaged and changes nothing else.

Importing this needs no torch: hooks of the site get their tensors handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from wardround.errors import StudyError
from wardround.learning.passes import WHOLE_ROUND, Pass
from wardround.learning.policy import Parameter, Policy, Role
from wardround.protection.drift import UNKNOWN, UpdateBound
from wardround.wire.tensors import Chosen, TensorInfo
from wardround.wire.update import Aggregate, Group

if TYPE_CHECKING:
    from torch import Tensor, nn

    from wardround.learning.survey import Survey
    from wardround.study.schema import Study

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Weights = Literal["samples", "equal", "validation"]
#: By group and name: what `Method.changes` gives. The learner brings it to the host.
Changes: TypeAlias = "dict[str, dict[str, Tensor]]"
MODEL = "model"
BUFFERS = "buffers"
# exp(-loss) is clamped to this, so that one site can neither vanish nor outweigh the others a thousandfold.
SMALLEST_VALIDATION_WEIGHT = 1e-3


@dataclass(frozen=True)
class Measured:
    """What leaves a site that is made from the loss of its validation patients, and what to choose for a study without.

    Both are parts of sentences for people.
    """

    what: str
    instead: str


WEIGHT_BY_VALIDATION = Measured(
    "its weight, which method.weights=validation makes from the loss of its validation patients",
    "Give the study method.weights=samples or equal",
)
# Hooks that decide how far a round moves the model; what happens before a site's optimiser is bounded by the optimiser.
_MOVING = ("changes", "apply", "apply_group", "server_step", "passes")


def state_name(group: str, tensor: str) -> str:
    """The name of a tensor of a group in the global state."""
    return f"{group}/{tensor}"


@dataclass(frozen=True)
class Facts:
    """What a site knows of itself when it is weighed; only the weight leaves, inside the update.

    `loss` is the mean training loss of the round, once it is trained.
    """

    samples: int
    validation_loss: float | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Episode:
    """How far the inner step goes, and what a piece of a batch, which begins at a place of it, is changed to."""

    rate: float
    changed: Callable[[Any, int], Any]


@dataclass
class LocalRound:
    """One round at a site, as hooks see it.

    Tensors are on the device on which the site computes, and hooks give tensors back: the learner alone moves them.
    `shared` are the live tensors of the model that are shared, `anchor` their values at the round's start, `public`
    everything the coordinator broadcast, as arrays that `received` makes tensors of, `memory` the site's private
    tensors of this method: what a hook leaves there is kept for the next round and never sent. `private` are the live
    tensors that stay at the site, `initial` the initial values of the whole model; `step` counts from 0, and with
    `seed` names public randomness. `rate` is the learning rate of the step; what a hook puts into `scratch` is gone
    after the round. `heard` is the last round of which the coordinator says that the site's update is in the sum, 0 for
    none so far, and `None` where it says nothing of it. `survey` shows the site's training
    images, and `loss_of` is the task's loss of a batch of them with the model as it is. `taken` is the pass under way
    (`Method.passes`), `choice` which of its choices.
    """

    site: str
    model: nn.Module
    shared: dict[str, Tensor]
    anchor: dict[str, Tensor]
    public: Mapping[str, Array]
    memory: dict[str, Tensor]
    number: int
    steps: int
    learning_rate: float
    facts: Facts = field(default_factory=lambda: Facts(0))
    private: Mapping[str, Tensor] = field(default_factory=dict)
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    step: int = 0
    rate: float = 0.0
    heard: int | None = None
    scratch: dict[str, Any] = field(default_factory=dict)
    survey: Survey | None = None
    loss_of: Callable[[Any], Tensor] | None = None
    taken: Pass = WHOLE_ROUND[0]
    choice: float | None = None

    def received(self, name: str) -> Tensor:
        """A tensor of `public` on the device of the model, to be read and not changed."""
        import torch

        return torch.from_numpy(np.array(self.public[name])).to(next(iter(self.shared.values())).device)

    def trainable(self) -> dict[str, Tensor]:
        """The shared tensors that gradients reach."""
        return {name: tensor for name, tensor in self.shared.items() if tensor.requires_grad}


@runtime_checkable
class Updates(Protocol):
    """A sum that also gives each site's change, in one order of the sites."""

    def parts(self, group: str) -> Floats:
        """Each site's weight over the sum of all: (n,)."""
        ...

    def each(self, group: str, tensor: str) -> Floats:
        """The change of a tensor at each site: (n, *shape)."""
        ...


@dataclass(frozen=True)
class Writers:
    """Where `apply` writes the next state, one tensor at a time: what sites get, and what the coordinator keeps."""

    public: Callable[[str, Array], None]
    private: Callable[[str, Array], None]


@dataclass(frozen=True)
class Method:
    """Weighted averaging (McMahan et al., AISTATS 2017), and the base of every other method."""

    weights: Weights = "samples"
    #: Whether batch norm at a hospital that did not train normalises by the hospital's own images.
    own_norm: bool = field(default=False, kw_only=True)
    #: `sum`: works on the sum of updates. `updates`: `apply` gets an aggregate that is `Updates` as well, so
    #: `protection.secure`, `compression` and `robust` are refused.
    needs: ClassVar[Literal["sum", "updates"]] = "sum"
    #: Copies of the shared values that a round at a site holds beside those that every method does, and how many of
    #: them its store keeps for the next one.
    holds: ClassVar[int] = 0
    stores: ClassVar[int] = 0
    #: Groups of shared tensors that tell of data, and not of what was learned: billed as a side channel.
    side_channels: ClassVar[frozenset[str]] = frozenset()

    @property
    def copies(self) -> int:
        """`holds`, unless it depends on the arm."""
        return self.holds

    @property
    def discloses(self) -> str:
        """What leaves a site beside its change of the model, for people to read; empty when nothing does."""
        return ""

    def within(self, study: Study, sites: int, model: nn.Module) -> Method:
        """The method as it works in an arm of a study with `sites` training sites; the same unless it depends on them.

        Raises `StudyError` for a model that it cannot work with.
        """
        return self

    # What belongs to whom ------------------------------------------------------------------------------------------

    def role(self, parameter: Parameter) -> Role:
        """The role of one parameter or buffer: shared, unless it is frozen or cannot be averaged."""
        if not parameter.is_float:
            return "local"
        return "shared" if parameter.trainable or parameter.buffer else "frozen"

    def policy(self, parameters: tuple[Parameter, ...]) -> Policy:
        """The roles of all parameters and buffers; raises `StudyError` when nothing would be shared."""
        policy = Policy({p.name: self.role(p) for p in parameters})
        if not policy.names("shared"):
            raise StudyError("the method shares no parameter of this model; choose another method or model")
        return policy

    def groups(self, shared: tuple[Parameter, ...], ring_bits: int) -> tuple[Group, ...]:
        """The groups of an update: what gradients reach, and the buffers, which are only ever averaged."""
        trainable = tuple(p.info for p in shared if p.trainable)
        buffers = tuple(p.info for p in shared if not p.trainable)
        groups = (Group(MODEL, trainable, ring_bits), Group(BUFFERS, buffers, ring_bits))
        return tuple(group for group in groups if group.tensors)

    def side_channel(self, private: tuple[Parameter, ...], ring_bits: int) -> tuple[Group, ...]:
        """Groups that tell of what stays at the sites; none, unless the study declares it (see `Personal`)."""
        return ()

    def initial(
        self, groups: tuple[Group, ...], values: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """The public and the private state before round 1, from the model's initial values."""
        return {state_name(g.name, info.name): values[info.name] for g in groups for info in g.tensors}, {}

    def lasting(self, names: Sequence[str]) -> tuple[str, ...]:
        """The tensors of a public state that stay as they are once they are sent, the one of the last round first.

        Sites keep them, so that each is sent once; `names` are those of the state. Others may come and go.
        """
        return ()

    def added(self, public: Mapping[str, Array], sites: int) -> tuple[TensorInfo, ...]:
        """What a round of that number of sites adds to the public state, beside what that begins with (`lasting`)."""
        return ()

    def asks_held_out(self, site: str) -> bool:
        """Whether a site needs the loss of its validation patients before its first step (`LocalRound.facts`)."""
        return False

    @property
    def measures(self) -> Measured | None:
        """What a site says of the loss of its validation patients; `None` where it says nothing of it.

        It leaves by the rules of such losses, once a round. The loss is that of the model that the site trained.
        """
        return WEIGHT_BY_VALIDATION if self.weights == "validation" else None

    # At the site ---------------------------------------------------------------------------------------------------

    def passes(self) -> tuple[Pass, ...]:
        """What a site's round is made of: one pass over everything, unless a method says otherwise."""
        return WHOLE_ROUND

    @property
    def keeps_model(self) -> bool:
        """Whether each site has values of its own for what is shared, with which it validates and tests."""
        return any(one.own for one in self.passes())

    def begin(self, local: LocalRound) -> None:
        """Called once the model is loaded and before the first step."""

    def during(self, local: LocalRound) -> AbstractContextManager[Any]:
        """A context that all steps of the round are taken in: hooks on layers, say, that are gone afterwards."""
        return nullcontext()

    def episode(self, local: LocalRound) -> Episode | None:
        """What a step lowers beside the loss of its batch (`learning.episodes`); `None`: nothing."""
        return None

    @property
    def flat_step(self) -> float:
        """How far along its gradient a step looks for the gradient that it follows (`learning.flat_step`); 0: not."""
        return 0.0

    def begin_pass(self, local: LocalRound) -> None:
        """Called before the first step of each of several `passes`, with the values that it begins with loaded."""

    def begin_step(self, local: LocalRound) -> None:
        """Called before the gradient of a step is taken; may put other values into the model."""

    def end_step(self, local: LocalRound) -> None:
        """Called after the optimiser took a step; may put other values into the model."""

    def end_pass(self, local: LocalRound) -> None:
        """Called after the last step of each of several `passes`; of an own one, what is in the model then is kept."""

    def objective(self, local: LocalRound, loss: Tensor) -> Tensor:
        """The loss of a step, with whatever the method adds."""
        return loss

    def gradients(self, local: LocalRound) -> None:
        """Called after backward and before clipping; may change gradients in place."""

    def changes(self, local: LocalRound) -> Changes:
        """What the site sends: for every group its tensors' changes, not yet weighted, on whichever device."""
        groups: Changes = {MODEL: {}, BUFFERS: {}}
        for name, tensor in local.shared.items():
            groups[MODEL if tensor.requires_grad else BUFFERS][name] = tensor.detach() - local.anchor[name]
        return groups

    def weight(self, facts: Facts) -> float:
        """The site's weight."""
        match self.weights:
            case "samples":
                return float(facts.samples)
            case "equal":
                return 1.0
            case "validation":
                if facts.validation_loss is None:
                    raise StudyError("weights by validation loss need a validation patient at every site")
                # Adaptive weights as a sum: each site sends its own exp(-loss) and the coordinator divides, so no
                # softmax over sites is needed (after ModFed, Wu et al., 2024, which weighs by losses in the clear).
                return min(1.0, max(SMALLEST_VALIDATION_WEIGHT, math.exp(-facts.validation_loss)))

    def group_weights(self, facts: Facts, groups: tuple[str, ...]) -> dict[str, float]:
        """The weight of every group; one and the same unless a method says otherwise."""
        return dict.fromkeys(groups, self.weight(facts))

    def least_weights(self, samples: int, groups: tuple[str, ...]) -> dict[str, float]:
        """The smallest weights that a site with that number of examples can have, known before it trains."""
        worst = math.inf if self.weights == "validation" else None
        return self.group_weights(Facts(samples, worst), groups)

    def round_weights(self, local: LocalRound, groups: tuple[str, ...]) -> dict[str, float]:
        """The weights of a round that was trained, of which `local.facts` now say the losses."""
        return self.group_weights(local.facts, groups)

    def heard(
        self, memory: Mapping[str, Array], changes: Mapping[str, Mapping[str, Array]], limits: Mapping[str, float]
    ) -> Mapping[str, Array]:
        """What the site keeps of `memory`, once it is known what its update says of its `changes`.

        What lies beyond `limits`, by group and tensor, is lost; of tensors without one nothing is (`Codec.lost`).
        """
        return memory

    # What a site may expect ----------------------------------------------------------------------------------------

    def update_bound(self, local: UpdateBound) -> UpdateBound:
        """How far one round can move what gradients reach, when no site's own steps go further than `local`.

        A mean goes no further than the furthest. `UNKNOWN` for a method with an update or a server step of its own,
        until it says more here: a site then cannot tell an honest move from another.
        """
        return local if self.moves_as(Method) else UNKNOWN

    def other_moves(self, ranks: Mapping[str, int], reach: Callable[[str], float]) -> dict[str, float]:
        """How far, in length, a round moves the tensors that it does not average; none unless a method says so.

        `ranks` are those of the model's first factors, by name; `reach(name)` is how far a site's own steps go.
        """
        return {}

    def moves_as(self, known: type[Method]) -> bool:
        """Whether a round moves the model as in the class `known`: nothing derived from it changes how.

        For `update_bound` of a class that has hooks of its own: a class derived from it may have others, and inherits
        `update_bound`.
        """
        return all(getattr(type(self), hook) is getattr(known, hook) for hook in _MOVING)

    # At the coordinator --------------------------------------------------------------------------------------------

    def apply(
        self, public: Mapping[str, Array], private: Mapping[str, Array], aggregate: Aggregate, write: Writers
    ) -> None:
        """Write the next state from the old one and the sum, a tensor at a time."""
        for group in aggregate.layout.groups:
            self.apply_group(group, public, private, aggregate, write)

    def apply_group(
        self,
        group: Group,
        public: Mapping[str, Array],
        private: Mapping[str, Array],
        aggregate: Aggregate,
        write: Writers,
    ) -> None:
        """Write the next state of one group."""
        for info in group.tensors:
            name = state_name(group.name, info.name)
            if type(self).server_step is Method.server_step:
                write.public(name, aggregate.moved(group.name, info.name, public[name]))
                continue
            old = public[name]
            step = self.server_step(name, aggregate.mean(group.name, info.name), private, write.private)
            # The step is applied in double precision and rounded once.
            step += old
            write.public(name, step.astype(old.dtype))

    def server_step(
        self,
        name: str,
        mean: npt.NDArray[np.float64],
        private: Mapping[str, Array],
        keep: Callable[[str, Array], None],
    ) -> npt.NDArray[np.float64]:
        """What is added to a tensor of the global model, given the mean change; may be changed in place."""
        return mean

    def release_for(
        self, site: str | None, public: Mapping[str, Array], private: Mapping[str, Array]
    ) -> Mapping[str, Array]:
        """The shared tensors released for a site, or for an unknown one (`None`), by model name.

        Each is read when it is asked for, so that memory holds one tensor and not the model.
        """
        return Chosen(
            {
                name.removeprefix(state_name(group, "")): (public, name)
                for name in public
                for group in (MODEL, BUFFERS)
                if name.startswith(state_name(group, ""))
            }
        )

    def also_released(self, public: Mapping[str, Array]) -> Mapping[str, Mapping[str, Array]]:
        """What else a run releases of its last state: the tensors of each further file of `models`, by its name."""
        return {}

    # At a hospital that did not train ------------------------------------------------------------------------------

    def serving_unseen(self, model: nn.Module) -> AbstractContextManager[Any]:
        """From now until the context is left, the released model serves a hospital that did not train."""
        if not self.own_norm:
            return nullcontext()
        # Late: a coordinator reads methods without torch.
        from wardround.learning.methods.own_statistics import own_statistics

        return own_statistics(model)
