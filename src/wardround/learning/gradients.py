"""Gradients of single patients: exactly, one after another, or all at once through Opacus, which is tested first."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from wardround.errors import StudyError, WardroundError
from wardround.learning.device import Compute, Losses
from wardround.protection.opacus import from_opacus
from wardround.protection.secret import SecretStream
from wardround.tasks.task import Batch, Dataset
from wardround.wire.host import on_host
from wardround.wire.random import public_generator

# Examples that go through the network at once.
CHUNK = 16
LARGEST_ERROR = 1e-3


@dataclass(frozen=True)
class Drawn:
    """A patient of a step: the examples taken of it, and the secret stream of all that is random about it."""

    examples: tuple[int, ...]
    stream: SecretStream


class Gradients(Protocol):
    """How a patient's gradient is found."""

    def per_patient(self, dataset: Dataset, patients: Sequence[Drawn]) -> Iterator[Tensor]:
        """For each patient the mean gradient over its examples, all trainable parameters behind one another."""
        ...


@dataclass(frozen=True)
class ExactGradients:
    """A backward pass for each patient: right for every model whose loss is right."""

    task: Losses
    model: nn.Module

    def per_patient(self, dataset: Dataset, patients: Sequence[Drawn]) -> Iterator[Tensor]:
        """See `Gradients`. The mean over examples is the task's, as its loss is of a batch.

        Augmentation and dropout come from each patient's own stream: one patient more changes no other's gradient.
        """
        for own in patients:
            batch = dataset.batch(own.examples, own.stream.generator())
            with _seeded(own.stream, self.model):
                gradient = autograd(self.task, self.model, batch)
            yield gradient


def autograd(task: Losses, model: nn.Module, batch: Batch) -> Tensor:
    """The gradient of a batch's loss: (parameters,)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(task.loss(model, batch), parameters, allow_unused=True)
    whole = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True))
    return torch.cat([g.flatten() for g in whole])


class BatchedGradients:
    """Per-example gradients of a whole batch by Opacus (Yousefpour et al., 2021), averaged by patient.

    Some models make them wrong without a word, such as convolutions on `channels_last` input: see `self_test`.
    """

    def __init__(self, task: Losses, model: nn.Module, hooks: Any) -> None:
        self._task = task
        self._model = model
        self._hooks = hooks
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    @classmethod
    @contextmanager
    def attached(cls, task: Losses, model: nn.Module) -> Iterator[BatchedGradients]:
        """Hooks on the model's layers, gone again afterwards.

        Raises `MissingExtra` without Opacus, `StudyError` for a model that it refuses.
        """
        grad_sample_module = from_opacus("opacus", "GradSampleModule", "protection.privacy.gradients: opacus")
        with _quiet():
            try:
                hooked = grad_sample_module(model, batch_first=True, loss_reduction="mean", strict=False)
            except Exception as error:
                raise _refused(f"Opacus does not take this model ({type(error).__name__})") from error
        try:
            with _quiet():
                yield cls(task, model, hooked)
        finally:
            hooked.remove_hooks()
            _detach(model)

    def per_patient(self, dataset: Dataset, patients: Sequence[Drawn]) -> Iterator[Tensor]:
        """See `Gradients`; whole patients go through the network together, about `CHUNK` examples at once.

        A batch is augmented from the stream of its first patient. A network that draws random numbers itself is none
        that `self_test` lets pass.
        """
        for chunk in _chunks(patients):
            batch = dataset.batch([i for own in chunk for i in own.examples], chunk[0].stream.generator())
            with _seeded(chunk[0].stream, self._model):
                of_example = self.per_example(batch)
            for rows in torch.split(of_example, [len(own.examples) for own in chunk]):
                yield rows.mean(dim=0)

    def per_example(self, batch: Batch) -> Tensor:
        """Each example's own gradient: (examples, parameters)."""
        self._task.loss(self._model, batch).backward()  # type: ignore[no-untyped-call]
        rows = [self._sample(p) for p in self._parameters]
        _forget(self._model)
        count = max((len(r) for r in rows if r is not None), default=0)
        return torch.cat(
            [p.new_zeros(count, p.numel()) if r is None else r for r, p in zip(rows, self._parameters, strict=True)], 1
        )

    def _sample(self, parameter: nn.Parameter) -> Tensor | None:
        found: Any = getattr(parameter, "grad_sample", None)
        if isinstance(found, list):
            found = torch.stack(found).sum(dim=0)
        return None if found is None else found.detach().flatten(1)

    def self_test(self, dataset: Dataset) -> None:
        """Compare with autograd on two examples, each first in a batch of both; raises `StudyError` where they differ.

        A model that draws random numbers, as dropout does, is refused: in a batch, which ones an example gets depends
        on the patients before it.
        The weights are moved a little meanwhile: a layer that starts at zero would hide what lies before it.
        """
        if len(dataset) < 2:
            raise _refused("two training examples are needed to test Opacus on this model")
        first, last = 0, len(dataset) - 1
        if self._draws(dataset.batch([first, last], public_generator(0, "self-test"))):
            raise _refused(
                "this model draws random numbers in training (dropout), in a batch not for each patient alone"
            )
        with _moved(self._model):
            worst = max(self._error(dataset, pair) for pair in ((first, last), (last, first)))
        if not worst <= LARGEST_ERROR:
            raise _refused(f"Opacus's gradients of single examples are wrong by {worst:.1e} on this model")

    def _draws(self, batch: Batch) -> bool:
        """Whether the loss of a batch takes from torch's random numbers."""
        compute = _compute(self._model)
        with compute.forked_random(), torch.no_grad():
            before = compute.random_states()
            self._hooks.disable_hooks()
            try:
                self._task.loss(self._model, batch)
            finally:
                self._hooks.enable_hooks()
            return any(not torch.equal(*pair) for pair in zip(before, compute.random_states(), strict=True))

    def _error(self, dataset: Dataset, pair: tuple[int, int]) -> float:
        def draws() -> np.random.Generator:
            return public_generator(0, "self-test", *pair)

        try:
            found = self.per_example(dataset.batch(list(pair), draws()))
        except WardroundError:
            raise
        except Exception as error:
            raise _refused(f"Opacus fails on this model ({type(error).__name__})") from error
        self._hooks.disable_hooks()
        try:
            _forget(self._model)
            true = autograd(self._task, self._model, dataset.batch([pair[0]], draws()))
        finally:
            self._hooks.enable_hooks()
            _forget(self._model)
        if len(found) != 2:
            return float("inf")
        sizes = [p.numel() for p in self._parameters]
        whole = _norm(true) or 1.0
        return max(
            _norm(f - t) / max(_norm(t), LARGEST_ERROR * whole)
            for f, t in zip(torch.split(found[0], sizes), torch.split(true, sizes), strict=True)
        )


def _norm(gradient: Tensor) -> float:
    return float(on_host(gradient.norm()))


def _compute(model: nn.Module) -> Compute:
    return Compute(next(model.parameters()).device)


@contextmanager
def _seeded(stream: SecretStream, model: nn.Module) -> Iterator[None]:
    """Torch draws from a secret stream until the context is left, and goes on afterwards where it was."""
    with _compute(model).forked_random():
        torch.manual_seed(int(stream.words(1)[0] >> np.uint64(1)))
        yield


def _chunks(patients: Sequence[Drawn]) -> Iterator[list[Drawn]]:
    chunk: list[Drawn] = []
    for own in patients:
        if chunk and sum(len(known.examples) for known in chunk) + len(own.examples) > CHUNK:
            yield chunk
            chunk = []
        chunk.append(own)
    if chunk:
        yield chunk


def _refused(why: str) -> StudyError:
    return StudyError(f"protection.privacy: {why}, so clipping would bound nothing; set `gradients: exact`")


def _forget(model: nn.Module) -> None:
    """Put everything that Opacus keeps on parameters and layers back to where a batch begins."""
    for parameter in model.parameters():
        parameter.grad = None
        parameter.__dict__.pop("_current_grad_sample", None)
        parameter.__dict__.update(grad_sample=None, _forward_counter=0)
    for module in model.modules():
        module.__dict__.pop("activations", None)
        module.__dict__.pop("max_batch_len", None)


def _detach(model: nn.Module) -> None:
    """Leave nothing of Opacus on the model."""
    _forget(model)
    for parameter in model.parameters():
        for name in ("grad_sample", "_forward_counter"):
            parameter.__dict__.pop(name, None)


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    kept = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    try:
        with _compute(model).forked_random():
            torch.manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    scale = 0.1 * float(on_host(parameter.square().mean().sqrt())) + 0.01
                    parameter.add_(scale * torch.randn_like(parameter))
            yield
    finally:
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(kept[name])


@contextmanager
def _quiet() -> Iterator[None]:
    """Opacus uses hooks in ways that torch warns about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
