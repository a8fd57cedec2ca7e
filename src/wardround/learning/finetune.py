"""A site goes on from a released model by itself, on its own patients; what comes of it stays there."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
from torch import nn

from wardround.learning.device import Placed
from wardround.learning.frozen import train_mode
from wardround.learning.optimizer import build_optimizer
from wardround.study.update import FineTune
from wardround.tasks.states import value_of
from wardround.wire.host import on_host
from wardround.wire.random import public_generator, public_seed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wardround.learning.training import Learner

Array = npt.NDArray[Any]
_NAME = "finetune"


def finetuned(learner: Learner, begun: Mapping[str, Array], settings: FineTune) -> dict[str, Array]:
    """The values, by model name, of the better of two models: `begun`, and what a site's own steps from it come to.

    The steps lower the task's loss alone, with the study's optimiser, batches and clipping, over all that gradients
    reach, and normalisation learns the site's statistics. Which model is better the site's validation patients say, by
    the task's metrics in order; where they do not say that the second is, it is the first. The same bits each time.
    """
    before = _ranks(learner, begun)
    learner.load_tensors(begun)
    last = _walk(learner, settings)
    after = {name: on_host(tensor).copy() for name, tensor in learner.model.state_dict().items()}
    # Steps that led nowhere are no model.
    if math.isfinite(last) and _ranks(learner, after) > before:
        return after
    return dict(begun)


def _walk(learner: Learner, settings: FineTune) -> float:
    """Take the steps; the last loss."""
    model, local, site = learner.model, learner.local, learner.site
    torch.set_num_threads(learner.compute.threads)
    torch.manual_seed(public_seed(learner.seed, site, _NAME, "torch") % 2**63)
    train_mode(model)
    optimizer = build_optimizer([model], local.model_copy(update={"lr": settings.lr}))
    losses, scaler = Placed(learner.task, learner.compute), learner.compute.scaler()
    indices = learner.examples.of_round(1, settings.steps * local.batch)
    last = math.nan
    for step in range(settings.steps):
        random = public_generator(learner.seed, site, step, _NAME)
        optimizer.zero_grad(set_to_none=True)
        start = step * local.batch
        for size in local.pieces:
            loss = losses.loss(model, learner.dataset.batch(indices[start : start + size], random))
            scaler.scale(loss * (size / local.batch)).backward()  # type: ignore[no-untyped-call]
            start += size
        scaler.unscale_(optimizer)
        if local.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), local.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        last = float(on_host(loss))
    return last


def _ranks(learner: Learner, values: Mapping[str, Array]) -> tuple[float, ...]:
    """How good a model is at the site's validation patients: larger is better, metric by metric; () without any."""
    if not learner.dataset.patients("validation"):
        return ()
    learner.load_tensors(values)
    rows = learner.held_out.evaluate("validation")
    return tuple(spec.rank(value_of(spec, rows[spec.name])) for spec in learner.task.metrics)
