"""What happens at a site with torch: load the global model, take steps. It sends nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from wardround.errors import WardroundError
from wardround.learning.device import Compute, Losses, Placed, as_arrays
from wardround.learning.elastic import Pull
from wardround.learning.episodes import learned
from wardround.learning.examples import Examples
from wardround.learning.flat_step import stepped
from wardround.learning.frozen import train_mode
from wardround.learning.held_out import HeldOut
from wardround.learning.known_model import KnownModel
from wardround.learning.methods.method import (
    WEIGHT_BY_VALIDATION,
    Episode,
    Facts,
    LocalRound,
    Measured,
    Method,
)
from wardround.learning.model_context import ModelContext
from wardround.learning.momentum import averaged
from wardround.learning.optimizer import (
    OPTIMIZER,
    build_optimizer,
    learning_rate,
    restore_optimizer,
    saved_optimizer,
)
from wardround.learning.own_passes import take_own
from wardround.learning.passes import RECEIVED, Pass, held, parted, steps_in
from wardround.learning.policy import Policy
from wardround.learning.private_training import PrivateTraining
from wardround.learning.survey import Survey
from wardround.models.lead import Keeping, Layered
from wardround.storage.store import Memory
from wardround.study.schema import Local
from wardround.tasks.stages import WHOLE, Curriculum
from wardround.tasks.task import Batch, Dataset, Split
from wardround.wire.host import on_host
from wardround.wire.random import public_generator, public_seed

Array = npt.NDArray[Any]
LOCAL = "local/"
METHOD = "method/"


class TrainingFailed(WardroundError):
    """A site's training produced something that must not be sent."""


@dataclass(frozen=True)
class Trained:
    """What a round of training leaves: changes by group, their weights, what the site keeps, and numbers to sum."""

    changes: dict[str, dict[str, Array]]
    weights: dict[str, float]
    memory: dict[str, Array]
    loss: float
    seconds: float


class Learner:
    """Trains at one site; `held_out` says what the model comes to on patients who do not train."""

    def __init__(
        self,
        site: str,
        model_context: ModelContext,
        dataset: Dataset,
        examples: Examples,
        method: Method,
        policy: Policy,
        local: Local,
        rounds: int,
        seed: int,
        groups: tuple[str, ...],
        progress: Callable[[int, int, int], None] | None = None,
        momentum: float = 0.0,
        private: PrivateTraining | None = None,
        curriculum: Curriculum = WHOLE,
        shelf: Keeping | None = None,
        least: int = 1,
        pull: Pull | None = None,
        samples: int | None = None,
    ) -> None:
        # A run goes on by the number of examples that it began with: its weight tells of no withdrawal.
        self._samples = len(dataset) if samples is None else samples
        self.site = site
        self.dataset = dataset
        self.task = model_context.task
        self._model_context = model_context
        self._examples = examples
        self._method = method
        self._policy = policy
        self._local = local
        self._rounds = rounds
        self._seed = seed
        self._groups = groups
        self._progress = progress
        self._momentum = momentum
        self._private = private
        self._curriculum = curriculum
        self._shelf = shelf
        self._steps_taken = 0
        self._least = least
        self._pull = pull
        self.held_out = HeldOut(model_context, dataset)
        self.known = KnownModel(site, model_context, method, policy, local, self._samples, groups)

    @property
    def model(self) -> nn.Module:
        """The network, with whatever was loaded last."""
        return self._model_context.model

    @property
    def local(self) -> Local:
        """What the site does in a round."""
        return self._local

    @property
    def examples(self) -> Examples:
        """Which training examples it takes, in order."""
        return self._examples

    @property
    def seed(self) -> int:
        """Of what is random and public."""
        return self._seed

    @property
    def compute(self) -> Compute:
        """Where the site computes."""
        return self._model_context.compute

    def load(self, public: Mapping[str, Array], memory: Memory) -> None:
        """Put the shared, local and frozen tensors into the model: what the site uses itself, its own values first."""
        shared = self.known.released(public)
        # They are needed once more at most.
        self.known.forget()
        self.load_tensors({name: shared[name] for name in self._policy.names("shared")} | self.local_tensors(memory))

    @property
    def measures_validation(self) -> bool:
        """Whether what the site sends is made from its loss on validation patients, of whom there are some."""
        return self._method.measures is not None and self.dataset.patients("validation") > 0

    @property
    def measured(self) -> Measured:
        """What of that leaves, and what to choose for a study without."""
        return self._method.measures or WEIGHT_BY_VALIDATION

    def load_tensors(self, tensors: Mapping[str, Array]) -> None:
        """Put tensors into the model by name; all others get their initial values, and what is frozen has them."""
        model = self._model_context.model
        if isinstance(model, Layered) and model.lead is not None:
            # The model is the process's, the images that it sees from now on are the site's.
            model.lead.shelf = self._shelf
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if name in self._model_context.frozen:
                    continue
                tensor.copy_(torch.from_numpy(tensors[name]) if name in tensors else self._model_context.initial[name])

    def begins_with(self, tensors: Mapping[str, Array]) -> bool:
        """Whether tensors by model name are the values that the study starts from, bit for bit."""
        initial = self._model_context.initial
        return all(name in initial and _same(tensors[name], initial[name]) for name in tensors)

    def serving_unseen(self) -> AbstractContextManager[Any]:
        """From now until the context is left, the loaded model is what a hospital that did not train gets."""
        return self._method.serving_unseen(self._model_context.model)

    def local_tensors(self, memory: Memory) -> dict[str, Array]:
        """What the site has of its own, by model name: the private part, and own values of what is shared."""
        return self._kept(("shared", "local"), memory)

    def _kept(self, roles: Collection[str], memory: Memory, prefix: str = LOCAL) -> dict[str, Array]:
        names = (name for name, role in self._policy.roles.items() if role in roles)
        return {name: memory.tensors[prefix + name] for name in names if prefix + name in memory.tensors}

    def train(self, number: int, public: Mapping[str, Array], memory: Memory, heard: int | None = None) -> Trained:
        """One round of training from a loaded model; raises `TrainingFailed` when the loss is not finite.

        `heard` is the last round of which the coordinator says that the site's update is in the sum, where it says so.

        Stages that do not learn in the round are held still: no gradient, no step, no new running statistics.
        """
        began = time.perf_counter()
        local, model = self._local, self._model_context.model
        steps = self._examples.steps(local)
        torch.set_num_threads(self.compute.threads)
        stint, losses = self._curriculum.at(number), Placed(self._curriculum.task(number, self.task), self.compute)
        # Of the model as it came; it stays in the round.
        asked = self._method.asks_held_out(self.site) and self.dataset.patients("validation") > 0
        before = self.held_out.loss(losses) if asked else None
        torch.manual_seed(public_seed(self._seed, self.site, number, "torch") % 2**63)
        train_mode(model)
        state = model.state_dict(keep_vars=True)
        sent, own = parted(self._method.passes())
        if own:
            # What is loaded is the site's own model, with which it validates.
            received = self.known.released(public)
            self.known.forget()
            self.load_tensors(
                {n: received[n] for n in self._policy.names("shared")} | self._kept(("local",), memory, RECEIVED)
            )
        shared = {name: state[name] for name in self._policy.names("shared")}
        context = LocalRound(
            site=self.site,
            model=model,
            shared=shared,
            anchor={name: tensor.detach().clone() for name, tensor in shared.items()},
            public=public,
            memory={
                name.removeprefix(METHOD): self.compute.tensor(tensor)
                for name, tensor in memory.tensors.items()
                if name.startswith(METHOD)
            },
            number=number,
            steps=steps,
            learning_rate=local.lr,
            facts=Facts(self._samples, before),
            private={name: state[name] for name in self._policy.names("local")},
            initial=self._model_context.initial,
            seed=self._seed,
            heard=heard,
            survey=Survey(self.site, self.dataset, self._examples, local, self._seed, self._least),
            loss_of=partial(losses.loss, model),
        )
        self._method.begin(context)
        episode = self._method.episode(context)
        optimizer = build_optimizer(self._curriculum.rated_parts(model), local)
        if local.optimizer_state == "keep":
            restore_optimizer(optimizer, memory.tensors)
        self._steps_taken = 0
        mean, told = 0.0, None
        for taken in sent:
            mean, told = self._walk(context, taken, state, optimizer, losses, memory, episode) or (mean, told)
        validated = self.held_out.loss(losses) if self.measures_validation else None
        context.facts = Facts(self._samples, validated, mean)
        # Beside its own values, a site keeps what stays there of the received model apart.
        prefix = RECEIVED if own else LOCAL
        kept = {prefix + name: on_host(state[name]).copy() for name in self._policy.names("local")}
        live = list(state.values())
        changes = (
            {group: as_arrays(part, live) for group, part in self._method.changes(context).items()}
            if told is None
            else told
        )
        weights = self._method.round_weights(context, self._groups)
        if own:
            kept |= self._walk_own(context, own, state, losses, memory)
        kept |= {METHOD + name: array for name, array in as_arrays(context.memory, live).items()}
        if self._momentum > 0.0:
            changes, running = averaged(changes, memory.tensors, self._momentum)
            kept |= running
        if stint is not None:
            changes = stint.unmoved(changes, shared)
        if local.optimizer_state == "keep":
            kept |= saved_optimizer(optimizer)
        return Trained(
            changes=changes,
            weights=weights,
            memory=kept,
            loss=mean,
            seconds=time.perf_counter() - began,
        )

    def _walk(
        self,
        context: LocalRound,
        taken: Pass,
        state: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        losses: Losses,
        memory: Memory,
        episode: Episode | None = None,
    ) -> tuple[float, dict[str, dict[str, Array]] | None] | None:
        """A pass: the mean loss of its steps, and what a site with privacy tells in whole numbers.

        `None` for a pass of a part in which nothing learns in this round.
        """
        local, model, number = self._local, self._model_context.model, context.number
        steps = self._examples.steps(local)
        context.taken, context.steps = taken, taken.steps_of(steps)
        scaler = self.compute.scaler()
        total = torch.zeros((), device=self.compute.device)
        indices = self._examples.of_round(number, context.steps * local.batch)
        private, stint = self._private, self._curriculum.at(number)
        # The optimiser knows all parameters, so that what it keeps has its place whichever of them learn.
        with (
            nullcontext() if stint is None else stint.holding(model),
            held(state, taken.held(self._policy)),
            nullcontext() if private is None else private.round(context, self._added, memory.tensors, losses) as paid,
            self._method.during(context),
        ):
            if taken.trains != "all" and not any(p.requires_grad for p in model.parameters()):
                return None
            self._method.begin_pass(context)
            for step in range(context.steps):
                context.rate = self._set_rates(optimizer, number, step, context.steps)
                optimizer.zero_grad(set_to_none=True)
                context.step = step
                self._method.begin_step(context)
                if paid is None:
                    part = indices[step * local.batch : (step + 1) * local.batch]
                    backward = partial(self._backward, context, part, step, scaler, losses)
                    if episode is None:
                        total += stepped(model, self._method.flat_step, backward, self.compute)
                    else:
                        again = partial(backward, changed=episode.changed)
                        total += learned(model, episode.rate, backward, again, scaler.get_scale())
                    scaler.unscale_(optimizer)
                else:
                    paid.backward(step)
                self._method.gradients(context)
                if stint is not None:
                    stint.forget_gradients(model)
                if local.clip_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), local.clip_norm)
                scaler.step(optimizer)
                scaler.update()
                self._method.end_step(context)
                self._steps_taken += 1
                if self._progress is not None:
                    self._progress(number, self._steps_taken, steps_in(self._method.passes(), steps))
            self._method.end_pass(context)
        mean = float(on_host(total)) / context.steps
        if not math.isfinite(mean):
            raise TrainingFailed(
                f"site {self.site}: the training loss of round {number} is not finite; lower local.lr or set "
                "local.clip_norm"
            )
        return mean, None if paid is None else paid.told

    def _walk_own(
        self,
        context: LocalRound,
        passes: Sequence[Pass],
        state: Mapping[str, Tensor],
        losses: Losses,
        memory: Memory,
    ) -> dict[str, Array]:
        """Take the passes of the site's own values; what it keeps of them."""
        local, model = self._local, self._model_context.model

        def take(taken: Pass) -> dict[str, Array]:
            torch.manual_seed(public_seed(self._seed, self.site, context.number, "torch", taken.name) % 2**63)
            train_mode(model)
            optimizer, prefix = build_optimizer(self._curriculum.rated_parts(model), local), f"{taken.name}/{OPTIMIZER}"
            if local.optimizer_state == "keep":
                restore_optimizer(optimizer, memory.tensors, prefix)
            self._walk(context, taken, state, optimizer, losses, memory)
            return saved_optimizer(optimizer, prefix) if local.optimizer_state == "keep" else {}

        # Where it has none yet, the values of the model that it received.
        values = context.anchor | {n: self._model_context.initial[n] for n in self._policy.names("local")}
        values |= {name: self.compute.tensor(array) for name, array in self.local_tensors(memory).items()}
        loss = partial(self.held_out.loss, losses) if self.dataset.patients("validation") else None
        own, kept = take_own(context, passes, state, values, take, loss)
        return kept | {LOCAL + name: on_host(tensor) for name, tensor in own.items()}

    def kept(self, trained: Trained, limits: Mapping[str, float]) -> dict[str, Array]:
        """What the site keeps of a round whose update loses what lies beyond `limits` (`Method.heard`)."""
        own = {n.removeprefix(METHOD): t for n, t in trained.memory.items() if n.startswith(METHOD)}
        heard = self._method.heard(own, trained.changes, limits)
        return {**trained.memory, **{METHOD + name: array for name, array in heard.items()}}

    def _backward(
        self,
        context: LocalRound,
        indices: Sequence[int],
        step: int,
        scaler: torch.amp.GradScaler,
        losses: Losses,
        changed: Callable[[Batch, int], Batch] = lambda batch, _: batch,
    ) -> Tensor:
        """The gradients of one batch, in place; its loss. Pieces of it go through the network one after another."""
        random = public_generator(self._seed, self.site, context.number, step, "augmentation")
        total, start = torch.zeros((), device=self.compute.device), 0
        for size in self._local.pieces:
            batch = changed(self.dataset.batch(indices[start : start + size], random), start)
            loss = self._added(context, losses.loss(context.model, batch))
            if size != len(indices):
                loss = loss * (size / len(indices))
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
            start += size
        return total

    def _added(self, context: LocalRound, loss: Tensor) -> Tensor:
        """The loss of a step with what the method and the study add to it."""
        loss = self._method.objective(context, loss)
        return loss if self._pull is None else self._pull.on(context, loss)

    def _set_rates(self, optimizer: torch.optim.Optimizer, number: int, step: int, steps: int) -> float:
        rate = learning_rate(self._local, (number - 1) * steps + step, self._rounds * steps)
        for group, share in zip(optimizer.param_groups, self._curriculum.rates(number), strict=True):
            group["lr"] = share * rate
        return rate


def patients_in(dataset: Dataset, splits: Sequence[Split] = ("train", "validation", "test")) -> dict[str, int]:
    """How many patients each split has."""
    return {split: dataset.patients(split) for split in splits}


def _same(one: Array, other: Tensor) -> bool:
    """Whether values are the same bits of the same type and shape."""
    mine = on_host(other)
    return (one.dtype, one.shape) == (mine.dtype, mine.shape) and one.tobytes() == mine.tobytes()
