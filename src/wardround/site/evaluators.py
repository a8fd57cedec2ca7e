"""What a site can evaluate besides the model of a round: released models, and baselines, which learned nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from wardround.errors import DataError, WireError
from wardround.federation.measuring import BASELINE, CONTINUED, FINETUNED, OWN, RELEASED
from wardround.learning.training import Learner
from wardround.site.finetuned import FineTuned
from wardround.site.pictures import write_illustrations, write_images
from wardround.site.protocol import Evaluator
from wardround.tasks.states import value_of
from wardround.tasks.task import Calibrated, ComparesUntrained, Illustrated, Imaging, ScoresBaselines, Split
from wardround.tasks.temperature import Calibration, keep_calibration
from wardround.wire.tensors import TensorFile

Array = npt.NDArray[Any]
#: The values of a site's private part of a model, by name; none where it has none.
PrivatePart = Callable[[], Mapping[str, Array]]


@dataclass(frozen=True)
class Continued:
    """What a site has of the release that the study continues: its private part, and whether it trains it further."""

    part: PrivatePart
    trains: bool


def evaluators_of(
    models: Path,
    pictures: Path,
    least: int = 1,
    *,
    labels: bool = False,
    continued: Continued | None = None,
    tuned: FineTuned | None = None,
) -> dict[str, Evaluator]:
    """The evaluators of a site; `models` holds its private parts, `pictures` is its own picture file.

    `tuned` is what it fine-tunes from the released model, where the study says so.

    What leaves depends on no fewer than `least` validation patients' labels. With `labels` those choose thresholds and
    temperature at a site that the model does not serve as its own, too. `continued` is of a study that continues a
    release: a site that does not train then completes the new model, too, with the part that it has.
    """
    carried = None if continued is None or continued.trains else continued.part
    released = Released(models, pictures, least, labels=labels, carried=carried, tuned=tuned)
    found: dict[str, Evaluator] = {RELEASED: released, BASELINE: Baseline(pictures), OWN: Own(models, released)}
    if tuned is not None:
        found[FINETUNED] = tuned
    return found if continued is None else {**found, CONTINUED: Parent(continued, released)}


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
    """The released model that the request carries, completed by the site's private part of it.

    A site that did not train it has none, or the one of the release that the model came of (`carried`).
    """

    def __init__(
        self,
        models: Path,
        pictures: Path,
        least: int,
        *,
        labels: bool = False,
        carried: PrivatePart | None = None,
        tuned: FineTuned | None = None,
    ) -> None:
        self._models, self._pictures, self._least, self._labels = models, pictures, least, labels
        self._carried = carried
        self._tuned = tuned

    def __call__(
        self, learner: Learner, tensors: Mapping[str, Array] | None, meta: Mapping[str, Any], split: Split
    ) -> dict[str, Array]:
        """What every patient of the split adds to each metric."""
        if tensors is None:
            raise WireError("an evaluation of a released model needs the model")
        own = self._models / "local.safetensors"
        unseen = bool(meta.get("unseen_site"))
        private: Mapping[str, Array] = load_file(own) if own.exists() and not unseen else {}
        if self._carried is not None:
            private = self._carried()
        learner.load_tensors({**tensors, **private})
        task = learner.task
        with self.serving(learner, private, unseen=unseen):
            calibration = self.calibration(learner, split, unseen=unseen)
            values = learner.held_out.evaluate(split, calibration)
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

    def serving(self, learner: Learner, private: Mapping[str, Array], *, unseen: bool) -> AbstractContextManager[Any]:
        """What a hospital that did not train gets; one that has a private part of the model is no stranger to it."""
        return learner.serving_unseen() if unseen and not (self._carried and private) else nullcontext()

    def calibration(self, learner: Learner, split: Split, *, unseen: bool) -> Calibration | None:
        """What the site's validation patients choose for the loaded model; nothing where there are too few."""
        # An unseen hospital labels no patient for the model.
        labels = self._labels or not unseen
        fits = split == "test" and labels and learner.dataset.patients("validation") >= self._least
        return learner.held_out.calibration() if fits else None


class Parent:
    """The release that the study continues, by the rules of the new model: no request carries it.

    Its values are those that the study starts from, completed by the site's private part of the release.
    """

    def __init__(self, continued: Continued, released: Released) -> None:
        self._continued, self._released = continued, released

    def __call__(
        self, learner: Learner, tensors: Mapping[str, Array] | None, meta: Mapping[str, Any], split: Split
    ) -> dict[str, Array]:
        """What every test patient adds to each metric. The site knows itself whether it trains: there is one answer."""
        if tensors is not None or split != "test":
            raise WireError(
                "the release that a study continues is measured on test patients, and no request carries it"
            )
        private, unseen = self._continued.part(), not self._continued.trains
        learner.load_tensors(private)
        with self._released.serving(learner, private, unseen=unseen):
            return learner.held_out.evaluate(split, self._released.calibration(learner, split, unseen=unseen))


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
        values = learner.held_out.per_patient(split, _baseline_score(task, name, weight))
        if meta.get("picture"):
            write_images(self._pictures, str(meta["picture"]), learner, reconstruct)
        return values

    @staticmethod
    def _untrained(learner: Learner, task: ComparesUntrained, name: str, split: Split) -> dict[str, Array]:
        # Nothing of what was trained: every value is that of the study's start.
        learner.load_tensors({})
        model = learner.model.eval()
        with torch.no_grad(), learner.compute.autocast():
            return learner.held_out.per_patient(split, partial(task.score_untrained, name, model))

    @staticmethod
    def _tune(learner: Learner, task: Imaging, name: str) -> float | None:
        grid = task.baseline_parameters(name)
        if len(grid) == 1 or not learner.dataset.patients("validation"):
            return grid[len(grid) // 2]

        def ranks(weight: float | None) -> tuple[float, ...]:
            rows = learner.held_out.per_patient("validation", _baseline_score(task, name, weight))
            # In the task's order: a classical image of a chain has no outline, and its first metrics no value.
            return tuple(spec.rank(value_of(spec, rows[spec.name])) for spec in learner.task.metrics)

        return max(grid, key=ranks)


def _baseline_score(task: Imaging, name: str, weight: float | None) -> Callable[[Any], dict[str, Tensor]]:
    def score(batch: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            if isinstance(task, ScoresBaselines):
                return task.score_baseline(name, weight, batch)
            return task.score_images(task.baseline(name, weight, batch), batch)

    return score
