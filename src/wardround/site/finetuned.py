"""A site's own model, fine-tuned from the release at home: made when the release is tested, and tested beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from wardround.errors import DataError, WireError
from wardround.learning.finetune import finetuned
from wardround.learning.training import Learner
from wardround.study.update import FineTune
from wardround.tasks.task import Split
from wardround.wire.tensors import TensorFile, tensors_sha256

Array = npt.NDArray[Any]
#: Of the file's metadata: the hash of the values that fine-tuning began with.
OF = "finetuned_from"


@dataclass(frozen=True)
class FineTuned:
    """Makes, keeps and tests the model; `path` is its file in the site's own folder.

    `save` writes values, with the hash of what they came of, as a model that a clinic can apply.
    """

    settings: FineTune
    path: Path
    save: Callable[[Mapping[str, Array], str], None]

    def make(self, learner: Learner, released: Mapping[str, Array]) -> None:
        """Fine-tune from a released model with the site's private part in it, unless that is done.

        Raises `OSError` where the disk is full.
        """
        of = tensors_sha256(dict(released))
        if not self.path.exists() or self._of() != of:
            self.save(finetuned(learner, released, self.settings), of)

    def __call__(
        self, learner: Learner, tensors: TensorFile | None, meta: Mapping[str, Any], split: Split
    ) -> dict[str, Array]:
        """What every patient of the split adds to each metric; the request carries no model."""
        if tensors is not None:
            raise WireError("a fine-tuned model is the site's own: a request to test it carries none")
        try:
            values = load_file(self.path)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"the model that site {learner.site} fine-tuned cannot be read; delete its file and run again: the "
                "site makes it anew when it tests the released model",
                detail=f"{self.path}: {error}",
            ) from error
        learner.load_tensors(values)
        enough = split == "test" and learner.dataset.patients("validation") > 0
        return learner.held_out.evaluate(split, learner.held_out.calibration() if enough else None)

    def _of(self) -> str | None:
        try:
            with safe_open(str(self.path), framework="numpy") as file:
                return (file.metadata() or {}).get(OF)
        except (OSError, SafetensorError):
            return None
