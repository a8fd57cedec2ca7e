"""What a site's model comes to on patients who are held out of training. It stays at the site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from wardround.learning.device import Losses, Placed
from wardround.learning.divergence import watched
from wardround.learning.model_context import ModelContext
from wardround.tasks.states import patient_rows
from wardround.tasks.task import Batch, Calibrated, Dataset, Split
from wardround.tasks.temperature import Calibration
from wardround.wire.host import on_host

Array = npt.NDArray[Any]


class HeldOut:
    """Scores, calibration and loss of the model that is loaded, over a site's validation or test patients."""

    def __init__(self, model_context: ModelContext, dataset: Dataset) -> None:
        self._model_context = model_context
        self._dataset = dataset

    @torch.no_grad()
    def evaluate(self, split: Split, calibration: Calibration | None = None) -> dict[str, Array]:
        """What every patient of a split adds to each metric, in patient order: (n, *shape).

        `calibration` is what the method of that name found, for a task that has one.
        """
        model, task = self._model_context.model, self._model_context.task
        if calibration is not None and isinstance(task, Calibrated):
            placed = Placed(task.calibrated(calibration), self._model_context.compute)
        else:
            placed = Placed(task, self._model_context.compute)
        torch.set_num_threads(self._model_context.compute.threads)
        model.eval()
        with watched(model) as diverged:
            return self.per_patient(split, lambda batch: placed.score(model, batch), diverged)

    def per_patient(
        self, split: Split, score: Callable[[Batch], dict[str, Tensor]], diverged: Callable[[], bool] = lambda: False
    ) -> dict[str, Array]:
        """The same of other scores than the task's, as `patient_rows` takes them; batches are on the site's device."""
        moved = self._model_context.compute.moved
        batches = ((patient, moved(batch)) for patient, batch in self._dataset.evaluation(split))
        return patient_rows(self._model_context.task.metrics, batches, score, diverged)

    @torch.no_grad()
    def calibration(self) -> Calibration | None:
        """What fits the model's probabilities to the validation patients; None for tasks without any."""
        task, compute, model = self._model_context.task, self._model_context.compute, self._model_context.model
        if not isinstance(task, Calibrated):
            return None
        torch.set_num_threads(compute.threads)
        model.eval()
        batches = ((patient, compute.moved(batch)) for patient, batch in self._dataset.evaluation("validation"))
        with compute.autocast():
            return task.calibration(model, batches)

    @torch.no_grad()
    def loss(self, task: Losses) -> float:
        """The mean of `task`'s loss over the validation patients, of whom there are some."""
        self._model_context.model.eval()
        batches = self._dataset.evaluation("validation")
        losses = [float(on_host(task.loss(self._model_context.model, batch))) for _, batch in batches]
        return sum(losses) / len(losses)
