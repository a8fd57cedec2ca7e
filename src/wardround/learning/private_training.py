"""DP-SGD with the patient as the unit (after Abadi et al., CCS 2016; McMahan et al., ICLR 2018, for groups).

A step draws every training patient independently, takes the mean gradient over a few of each one's examples, clips
it to `clip`, adds up, adds Gaussian noise of `noise x clip`, and divides by the expected number of patients. Which
patients were drawn, which of their examples, and the noise come from the site's secret root. An empty draw is a step
of noise alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wardround.errors import StudyError
from wardround.learning.device import CPU, Compute, Losses
from wardround.learning.frozen import is_frozen
from wardround.learning.gradients import BatchedGradients, Drawn, ExactGradients, Gradients, autograd
from wardround.learning.methods.method import MODEL, LocalRound
from wardround.protection.compression import Codec
from wardround.protection.discrete_gaussian import discrete_gaussians, rounded
from wardround.protection.lattice import Lattice
from wardround.protection.privacy import PrivacyBudget, SecretRound, Terms
from wardround.protection.rotation import rotate
from wardround.protection.secret import SecretStream
from wardround.tasks.task import Dataset
from wardround.wire.host import on_host
from wardround.wire.random import public_generator
from wardround.wire.tensors import tensors_sha256

Array = npt.NDArray[Any]
Objective = Callable[[LocalRound, Tensor], Tensor]
# Float32 sums of squares may round a norm down: nobody's contribution exceeds the bound by that much.
_ROUNDING = 1.0 - 1e-6


def owners_of(dataset: Dataset) -> tuple[int, ...]:
    """Whose each training example is; raises `StudyError` where a data set does not say."""
    if not hasattr(dataset, "owners"):
        raise StudyError(
            "protection.privacy protects patients, and the task's data set does not say whose its training examples "
            "are; give it a method `owners()` with a patient's number for each"
        )
    return tuple(int(owner) for owner in dataset.owners())


def training_patients(dataset: Dataset) -> int:
    """How many patients have training examples."""
    return len(set(owners_of(dataset)))


def clipped(gradient: Tensor, bound: float) -> Tensor:
    """A gradient in double precision with a norm of at most `bound`; one that is not finite counts as zero.

    Nothing may be raised for it: that there was one would be known of its patient.
    """
    # In double precision, and with the bits of one order of adding, on the host alone.
    gradient = torch.from_numpy(on_host(gradient)).double()
    norm = float(gradient.norm())
    if not np.isfinite(norm):
        return torch.zeros_like(gradient)
    return gradient * (bound * _ROUNDING / max(norm, bound))


class PrivateTraining:
    """Takes the place of loss and backward pass at a site with privacy; `task` gives its losses on `compute`."""

    def __init__(
        self, task: Losses, dataset: Dataset, budget: PrivacyBudget, study: str, arm: str, compute: Compute = CPU
    ) -> None:
        self._task = task
        self._compute = compute
        self._dataset = dataset
        self._budget = budget
        self._named = (study, arm)
        owners = owners_of(dataset)
        self._fingerprint = dataset.fingerprint()
        of_patient: dict[int, list[int]] = {}
        for index, owner in enumerate(owners):
            of_patient.setdefault(owner, []).append(index)
        self._patients = {owner: tuple(of_patient[owner]) for owner in sorted(of_patient)}
        # What learned when gradients were looked at: with phases it differs by round.
        self._tested: set[frozenset[str]] = set()
        self._tried: set[frozenset[str]] = set()

    @property
    def terms(self) -> Terms:
        """What the site agreed to."""
        return self._budget.terms

    @contextmanager
    def round(
        self, context: LocalRound, added: Objective, memory: Mapping[str, Array], task: Losses | None = None
    ) -> Iterator[PrivateRound]:
        """Charge a round to the ledger, then make its steps possible; `task` where the round has losses of its own.

        `added` is what the method and the study add to a loss.
        Clip and noise are those of the parameters that learn in the round.
        Raises `BudgetSpent`, `JournalError` for a lost ledger, and `StudyError` for a model whose gradients cannot be
        told apart by patient.
        """
        task = task or self._task
        refuse_shared_statistics(context.model)
        self._compute.fit_for_privacy()
        with self._compute.deterministic():
            self._try(task, context.model)
            inputs = _inputs(context, memory, self._compute)
            secret = self._budget.pay(*self._named, context.number, context.steps, self._fingerprint, inputs)
            gradients: Gradients = ExactGradients(task, context.model)
            if self.terms.gradients == "exact":
                yield PrivateRound(self, context, added, gradients, secret)
                return
            with BatchedGradients.attached(task, context.model) as batched:
                if (learning := _learning(context.model)) not in self._tested:
                    batched.self_test(self._dataset)
                    self._tested.add(learning)
                yield PrivateRound(self, context, added, batched, secret)

    def _try(self, task: Losses, model: nn.Module) -> None:
        """One gradient before anything is paid: an operation that a repeated round may not have is refused for free."""
        learning = _learning(model)
        if self._compute.on_cpu or learning in self._tried:
            return
        with self._compute.forked_random():
            autograd(task, model, self._dataset.batch([0], public_generator(0, "self-test")))
        self._tried.add(learning)

    def draw(self, secret: SecretRound, step: int) -> tuple[Drawn, ...]:
        """Poisson sampling of patients, then of examples of each without replacement.

        All that is random about a patient is a function of the secret and of the patient's number: what the sum holds
        of the others is the same, bit for bit, whether or not one patient more is there.
        """
        return tuple(
            self._drawn(secret.patient(step, patient), own)
            for patient, own in self._patients.items()
            if secret.draws(step, patient, self.terms.rate)
        )

    def _drawn(self, stream: SecretStream, own: tuple[int, ...]) -> Drawn:
        count = min(self.terms.examples_per_patient, len(own))
        return Drawn(tuple(own[int(i)] for i in stream.generator().choice(len(own), count, replace=False)), stream)

    def clipped_sum(self, gradients: Gradients, draw: Sequence[Drawn], size: int) -> Tensor:
        """The sum over drawn patients of their clipped gradients, without noise: (size,), double precision."""
        total = torch.zeros(size, dtype=torch.float64)
        for gradient in gradients.per_patient(self._dataset, draw):
            total += clipped(gradient, self.terms.clip)
        return total

    def whole_sums(
        self, context: LocalRound, gradients: Gradients, secret: SecretRound, step: int, lattice: Lattice
    ) -> dict[str, Array]:
        """The sum over drawn patients in steps of the lattice, with this site's share of the noise, by tensor.

        Every patient is rounded alone: after any other order, nobody's largest influence on the sum would be known.
        """
        codec, named = Codec(context.seed), dict(context.model.named_parameters())
        infos = {name: named[name] for name in named if named[name].requires_grad}
        sizes = [p.numel() for p in infos.values()]
        total = discrete_gaussians(secret.noise(step), lattice.deviation, sum(sizes))
        draw = self.draw(secret, step)
        for own, gradient in zip(draw, gradients.per_patient(self._dataset, draw), strict=True):
            parts = torch.split(clipped(gradient, self.terms.clip), sizes)
            turned = [
                rotate(on_host(part), codec.signs(context.number, MODEL, name))
                for name, part in zip(infos, parts, strict=True)
            ]
            total += rounded(np.concatenate(turned) / lattice.step, lattice.bound, own.stream)
        ends = np.cumsum(sizes)[:-1]
        # What does not learn in this round is not moved, which says nothing of a patient.
        idle = {n: np.zeros(tuple(t.shape), total.dtype) for n, t in context.shared.items() if n not in infos}
        return idle | {
            name: part.reshape(tuple(info.shape))
            for (name, info), part in zip(infos.items(), np.split(total, ends), strict=True)
        }

    def noisy_mean(self, gradients: Gradients, secret: SecretRound, step: int, size: int) -> Tensor:
        """What a step follows: (size,), double precision."""
        terms = self.terms
        total = self.clipped_sum(gradients, self.draw(secret, step), size)
        noise = torch.from_numpy(secret.noise(step).normals(size))
        return (total + terms.noise * terms.clip * noise) / terms.patients_per_step


@dataclass
class PrivateRound:
    """The steps of one paid round; `told` is what the site tells in whole numbers, where sites share the noise."""

    training: PrivateTraining
    context: LocalRound
    added: Objective
    gradients: Gradients
    secret: SecretRound
    told: dict[str, dict[str, Array]] | None = None

    def backward(self, step: int) -> None:
        """Put the noisy gradient of a step where the optimiser looks for it.

        Where sites share the noise the model stays as it is: no single site's sum is fit to be followed.
        """
        lattice = self.training.terms.lattice
        if lattice is not None:
            sums = self.training.whole_sums(self.context, self.gradients, self.secret, step, lattice)
            self.told = {MODEL: sums}
            return
        parameters = trainable(self.context.model)
        size = sum(p.numel() for p in parameters)
        mean = self.training.noisy_mean(self.gradients, self.secret, step, size)
        for parameter, part in zip(parameters, torch.split(mean, [p.numel() for p in parameters]), strict=True):
            parameter.grad = part.reshape(parameter.shape).to(parameter)
        # What a method adds to the loss (a proximal term, say) knows no data: it comes on top, without noise.
        extra = self.added(self.context, torch.zeros((), device=parameters[0].device))
        if extra.requires_grad:
            extra.backward()  # type: ignore[no-untyped-call]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that gradients reach, each once."""
    return [p for p in model.parameters() if p.requires_grad]


def _learning(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def refuse_shared_statistics(model: nn.Module) -> None:
    """Raise `StudyError` for layers that mix patients or remember them outside the gradients."""
    for name, module in model.named_modules():
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        instance = isinstance(module, nn.modules.instancenorm._InstanceNorm)
        if is_frozen(module):
            continue
        if (norm and not instance) or (instance and module.track_running_stats):
            raise StudyError(
                f"protection.privacy: layer {name} ({type(module).__name__}) keeps statistics over patients, which no "
                "clipping bounds; use `model.norm: instance`, or group normalisation, instead"
            )


def _inputs(context: LocalRound, memory: Mapping[str, Array], compute: Compute) -> Sequence[Any]:
    """All that decides a round's sums beside data and terms; versions too, as their arithmetic may differ."""
    return (
        tensors_sha256({name: np.asarray(context.public[name]) for name in context.public}),
        tensors_sha256({name: np.asarray(memory[name]) for name in memory}),
        version("wardround"),
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
        *(() if compute == CPU else compute.facts().values()),
    )
