"""What a site can evaluate besides the model of a round: a released model, and baselines, which learned nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from wardround.errors import DataError, WireError
from wardround.federation.measuring import BASELINE, FINETUNED, OWN, RELEASED
from wardround.learning.training import Learner
from wardround.site.finetuned import FineTuned
from wardround.site.pictures import write_illustrations, write_images
from wardround.site.protocol import Evaluator
from wardround.tasks.states import value_of
from wardround.tasks.task import Calibrated, ComparesUntrained, Illustrated, Imaging, Split
from wardround.tasks.temperature import keep_calibration
from wardround.wire.tensors import TensorFile

Array = npt.NDArray[Any]


def evaluators_of(
    models: Path, pictures: Path, least: int = 1, *, labels: bool = False, tuned: FineTuned | None = None
) -> dict[str, Evaluator]:
    """The evaluators of a site; `models` holds its private parts, `pictures` is its own picture file.

    `tuned` is what it fine-tunes from the released model, where the study says so.

    What leaves depends on no fewer than `least` validation patients' labels. With `labels` those choose thresholds and
    temperature at a site that the model does not serve as its own, too.
    """
    released = Released(models, pictures, least, labels=labels, tuned=tuned)
    own: dict[str, Evaluator] = {} if tuned is None else {FINETUNED: tuned}
    return {RELEASED: released, BASELINE: Baseline(pictures), OWN: Own(models, released), **own}


def own_model(models: Path) -> Path:
    """The model that a site trained by itself, among what it keeps of an arm."""
    return models / "model.safetensors"


class Own:
    """The model that the site trained by itself and that nobody else has; its request carries none."""

    def __init__(self, models: Path, released: Released) -> None:
        self._models, self._released = models, released

    def __call__(
        self, learner: Learner, tensors: TensorFile | None, meta: Mapping[str, Any], split: Split
    ) -> dict[str, Array]:
        """What every patient of the split adds to each metric."""
        try:
            tensors = load_file(own_model(self._models))
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"the model that site {learner.site} trained alone cannot be read; delete its file and run again: the "
                "site writes it anew",
                detail=f"{own_model(self._models)}: {error}",
            ) from error
        return self._released(learner, tensors, meta, split)


class Released:
    """The released model that the request carries, completed by the site's private part of it."""

    def __init__(
        self, models: Path, pictures: Path, least: int, *, labels: bool = False, tuned: FineTuned | None = None
    ) -> None:
        self._models, self._pictures, self._least, self._labels = models, pictures, least, labels
        self._tuned = tuned

    def __call__(
        self, learner: Learner, tensors: Mapping[str, Array] | None, meta: Mapping[str, Any], split: Split
    ) -> dict[str, Array]:
        """What every patient of the split adds to each metric."""
        if tensors is None:
            raise WireError("an evaluation of a released model needs the model")
        own = self._models / "local.safetensors"
        unseen = bool(meta.get("unseen_site"))
        private = load_file(own) if own.exists() and not unseen else {}
        learner.load_tensors({**tensors, **private})
        task = learner.task
        with learner.serving_unseen() if unseen else nullcontext():
            # An unseen hospital labels no patient for the model.
            labels = self._labels or not unseen
            fits = split == "test" and labels and learner.dataset.patients("validation") >= self._least
            calibration = learner.calibration() if fits else None
            values = learner.evaluate(split, calibration)
            if isinstance(task, Calibrated) and split == "test":
                keep_calibration(self._models, calibration)
            if meta.get("picture") and isinstance(task, Illustrated):
                write_illustrations(self._pictures, str(meta["picture"]), learner, values)
            if meta.get("picture") and isinstance(task, Imaging):
                model = learner.model
                write_images(self._pictures, str(meta["picture"]), learner, lambda b: task.reconstruct(model, b))
        if self._tuned is not None and split == "test" and not unseen:
            self._tuned.make(learner, {**tensors, **private})
        return values


class Baseline:
    """A classical reconstruction, its weight tuned on the site's validation patients by the metrics it has, in order.

    A site without validation patients uses the middle of the study's list. Where a task `ComparesUntrained`, what it
    compares with.
    """

    def __init__(self, pictures: Path) -> None:
        self._pictures = pictures
        self._tuned: dict[str, float | None] = {}

    def __call__(
        self, learner: Learner, tensors: TensorFile | None, meta: Mapping[str, Any], split: Split
    ) -> dict[str, Array]:
        """What every patient of the split adds to each metric."""
        task, name = learner.task, str(meta[BASELINE])
        if isinstance(task, ComparesUntrained):
            return self._untrained(learner, task, name, split)
        if not isinstance(task, Imaging):
            raise WireError("this task has no classical baselines")
        if name not in self._tuned:
            self._tuned[name] = self._tune(learner, task, name)
        weight = self._tuned[name]
        reconstruct = partial(task.baseline, name, weight)
        values = learner.per_patient(split, _image_score(task, reconstruct))
        if meta.get("picture"):
            write_images(self._pictures, str(meta["picture"]), learner, reconstruct)
        return values

    @staticmethod
    def _untrained(learner: Learner, task: ComparesUntrained, name: str, split: Split) -> dict[str, Array]:
        # Nothing of what was trained: every value is that of the study's start.
        learner.load_tensors({})
        model = learner.model.eval()
        with torch.no_grad(), learner.compute.autocast():
            return learner.per_patient(split, partial(task.score_untrained, name, model))

    @staticmethod
    def _tune(learner: Learner, task: Imaging, name: str) -> float | None:
        grid = task.baseline_parameters(name)
        if len(grid) == 1 or not learner.dataset.patients("validation"):
            return grid[len(grid) // 2]

        def ranks(weight: float | None) -> tuple[float, ...]:
            rows = learner.per_patient("validation", _image_score(task, partial(task.baseline, name, weight)))
            # In the task's order: a classical image of a chain has no outline, and its first metrics no value.
            return tuple(spec.rank(value_of(spec, rows[spec.name])) for spec in learner.task.metrics)

        return max(grid, key=ranks)


def _image_score(task: Imaging, reconstruct: Callable[[Any], Tensor]) -> Callable[[Any], dict[str, Tensor]]:
    def score(batch: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            return task.score_images(reconstruct(batch), batch)

    return score
