"""The site's own picture file: examples of its test patients under every model. It goes nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wardround.learning.training import Learner
from wardround.storage.blobs import disk_error
from wardround.tasks.task import Illustrated, Imaging, Oriented
from wardround.wire.archives import read_npz
from wardround.wire.files import written
from wardround.wire.host import on_host

Array = npt.NDArray[Any]
# In a picture file: window/NAME/UNIT is (low, high, units a value).
WINDOW = "window"
# turn/NUMBER says how an example is shown, as `Turn`.
TURN = "turn"
# legend/WORDS is a colour; caption/LABEL/NUMBER, title/NUMBER and patient/NUMBER (a place among test patients) are of
# pictures that the task drew itself.
LEGEND, CAPTION, TITLE, PATIENT = "legend", "caption", "title", "patient"
REFERENCE = "reference"
_SHOWN = 3


def write_images(path: Path, label: str, learner: Learner, reconstruct: Callable[[Any], Tensor]) -> None:
    """Add a method's example images to the file."""
    task = learner.task
    assert isinstance(task, Imaging)
    known = _known(path)
    known |= {f"{WINDOW}/{w.name}/{w.unit}": np.array([w.low, w.high, w.scale]) for w in task.windows}
    with torch.no_grad(), learner.compute.autocast():
        for number, example in enumerate(task.examples(learner.dataset)):
            batch = learner.compute.moved(example)
            known[f"{REFERENCE}/{number}"] = on_host(task.reference(batch)[0])
            known[f"{label}/{number}"] = on_host(reconstruct(batch)[0])
    if isinstance(task, Oriented):
        turns = enumerate(task.turns(learner.dataset))
        known |= {f"{TURN}/{number}": np.array(turn, np.uint8) for number, turn in turns if turn is not None}
    _write(path, known)


def write_illustrations(path: Path, label: str, learner: Learner, rows: Mapping[str, Array]) -> None:
    """Add what the task draws of the loaded model to the file.

    Of the first model the site's worst, median and best test patients are chosen, and every later one shows the same.
    """
    task = learner.task
    assert isinstance(task, Illustrated)
    known = _known(path)
    if f"{PATIENT}/0" not in known:
        for number, (title, place) in enumerate(_chosen(task.merit(rows))):
            known |= {f"{PATIENT}/{number}": np.array(place), f"{TITLE}/{number}": np.array(title)}
    known |= {f"{LEGEND}/{words}": np.array(colour, np.uint8) for words, colour in task.legend}
    places = list(_places(known))
    with torch.no_grad(), learner.compute.autocast():
        for number, example in enumerate(task.pictured(learner.dataset, places)):
            batch = learner.compute.moved(example)
            for name, model in ((REFERENCE, None), (label, learner.model)):
                found = task.illustrate(model, batch)
                known |= {
                    f"{name}/{number}": found.picture,
                    f"{CAPTION}/{name}/{number}": np.array(found.caption),
                }
    _write(path, known)


def _chosen(merit: Array) -> Iterator[tuple[str, int]]:
    """Titles and places: the worst, the median and the best, or the first ones where too few have a merit."""
    known = np.flatnonzero(~np.isnan(merit))
    ranked = [int(place) for place in known[np.argsort(merit[known], kind="stable")]]
    if len(ranked) >= _SHOWN:
        yield from zip(
            ("Worst test patient", "Median test patient", "Best test patient"),
            (ranked[0], ranked[len(ranked) // 2], ranked[-1]),
            strict=True,
        )
    else:
        yield from (("Test patient", place) for place in range(min(_SHOWN, len(merit))))


def _places(known: Mapping[str, Array]) -> Iterator[int]:
    number = 0
    while (key := f"{PATIENT}/{number}") in known:
        yield int(known[key])
        number += 1


def _known(path: Path) -> dict[str, Array]:
    return read_npz(path) if path.exists() else {}


def _write(path: Path, known: Mapping[str, Array]) -> None:
    try:
        with written(path) as file:
            np.savez_compressed(file, **known)  # type: ignore[arg-type]
    except OSError as error:
        raise disk_error(error) from error
