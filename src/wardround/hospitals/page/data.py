"""What the page shows, as JSON values: read from `status.json` and the runs' files, and nothing of a patient."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from wardround.errors import WardroundError
from wardround.federation.release import model_path
from wardround.hospitals.coordinator.status import read_status
from wardround.hospitals.coordinator.submission import study_folder
from wardround.hospitals.folders import CoordinatorFolder
from wardround.plan.arms import FEDERATED
from wardround.results.files import RESULT_FILE, read_result, read_rounds
from wardround.results.schema import Result

# Points of a curve that a page draws; of more rounds every n-th is taken, and the last.
_POINTS = 400
REPORT = "report.html"


class PageData:
    """Reads a federation's folder for its page; `now` is unix time."""

    def __init__(self, folder: CoordinatorFolder, now: Callable[[], float] = time.time) -> None:
        self._folder, self._now = folder, now

    def overview(self) -> dict[str, Any]:
        """The status, and whether the process that wrote it is at work; without one, that there was none yet."""
        status, now = read_status(self._folder.status), self._now()
        if status is None:
            return {"now": now, "alive": False, "status": None}
        return {"now": now, "alive": status.alive(now), "status": status.model_dump(mode="json")}

    def curves(self, name: str) -> dict[str, Any]:
        """By arm the rounds of a study with loss and validation. Raises `WardroundError` for an unknown study."""
        arms: dict[str, list[dict[str, Any]]] = {}
        for line in read_rounds(study_folder(self._folder, name).out):
            arms.setdefault(line.arm, []).append(
                {"round": line.round, "loss": line.loss, "validation": line.validation, "sites": len(line.participants)}
            )
        return {"arms": {arm: _thinned(lines) for arm, lines in arms.items()}}

    def tests(self, name: str) -> dict[str, Any]:
        """The results of a finished study on test patients, with intervals; raises `WardroundError` for others."""
        return _tests(read_result(study_folder(self._folder, name).out))

    def file(self, name: str, what: str) -> Path:
        """The report or the released model of a finished study.

        Raises `WardroundError` where there is none, and for what lies outside the folder of the study.
        """
        out = study_folder(self._folder, name).out
        path = {"report": out / REPORT, "model": model_path(out, FEDERATED)}[what]
        inside = path.resolve().is_relative_to(self._folder.studies.resolve() / name)
        if not (out / RESULT_FILE).is_file() or not path.is_file() or not inside:
            raise WardroundError(f"the study has no {what} yet: it is there when the study is finished")
        return path


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    step = -(-len(lines) // _POINTS)
    return [line for number, line in enumerate(lines) if number % step == 0 or number == len(lines) - 1]


def _tests(result: Result) -> dict[str, Any]:
    labels = {arm: baseline.label for arm, baseline in result.baselines.items()}
    return {
        "metrics": [
            {"name": m.name, "label": m.label, "unit": m.unit, "larger": m.larger_is_better} for m in result.measured
        ],
        "labels": labels,
        "estimates": [
            {
                "arm": arm,
                "site": site,
                "metric": metric,
                "value": found.value,
                "n": found.n,
                "interval": found.interval,
            }
            for arm, site, metric, found in result.estimates()
        ],
        "lacking": {**result.withheld, **result.failed},
        "notes": list(result.notes),
        "selected": result.selected_round.get(FEDERATED),
    }
