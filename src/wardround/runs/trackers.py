"""TensorBoard and MLflow as watchers of a run: the numbers of `rounds.jsonl`, as rounds commit, and nothing else.

No value of these is from one patient. Both are optional and imported here, when a run asks for them.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from wardround.deidentify import describe_error
from wardround.errors import MissingExtra, StudyError
from wardround.runs.watching import Shielded, Silent, Watcher
from wardround.storage.journal import RoundReport

log = logging.getLogger(__name__)
_EXPERIMENT = "wardround"
# What of a round is a number of all its sites; `validation` has one for each metric.
_NUMBERS = ("loss", "bytes_up", "bytes_down", "seconds", "training_seconds", "saturated_share", "saturated")
_GROWING = ("bytes_up", "bytes_down")


class Sink(Protocol):
    """Where numbers go: an open TensorBoard folder or MLflow run."""

    def add(self, name: str, value: float, step: int) -> None:
        """Write a number of a round."""

    def close(self) -> None:
        """Write what is left."""


def numbers_of(report: RoundReport) -> Iterator[tuple[str, float]]:
    """The finite numbers of a round with their names, such as `loss`, `validation_psnr` and `sites`."""
    found = {name: getattr(report, name) for name in _NUMBERS}
    found |= {f"validation_{name}": value for name, value in (report.validation or {}).items()}
    found["sites"] = len(report.participants)
    yield from ((name, float(value)) for name, value in found.items() if value is not None and math.isfinite(value))


class Tracker(Silent):
    """A watcher that hands every number of a round on once, under `NAME/ARM`; its sink opens with the first round."""

    def __init__(self, opened: Callable[[], Sink]) -> None:
        self._opened = opened
        self._sink: Sink | None = None
        self._lock = threading.Lock()
        self._sent: set[tuple[str, str, int]] = set()
        self._last: dict[str, RoundReport] = {}

    def round(self, report: RoundReport) -> None:
        """Hand on what is new: a round is reported again when its validation becomes known.

        The bytes of an arm's last round grow by that validation: they wait until another round comes, or the end.
        """
        with self._lock:
            self._sink = self._sink or self._opened()
            before = self._last.get(report.arm, report)
            if before.round != report.round:
                self._hand_on(before, waiting=True)
            self._last[report.arm] = report
            self._hand_on(report, waiting=False)

    def _hand_on(self, report: RoundReport, *, waiting: bool) -> None:
        assert self._sink is not None
        for name, value in numbers_of(report):
            key = (name, report.arm, report.round)
            if key not in self._sent and (waiting or name not in _GROWING):
                self._sink.add(f"{name}/{report.arm}", value, report.round)
                self._sent.add(key)

    def close(self) -> None:
        """Close the sink; an error there is logged and does not change the run."""
        try:
            if self._sink is not None:
                for report in self._last.values():
                    self._hand_on(report, waiting=True)
                self._sink.close()
        except Exception as error:
            log.warning("a tracker of the run did not close (%s)", describe_error(error))


@dataclass(frozen=True)
class Trackers:
    """The trackers of a run."""

    trackers: tuple[Tracker, ...]

    @staticmethod
    def of(places: Sequence[str], name: str) -> Trackers:
        """Trackers by their places: `tensorboard:FOLDER`, `mlflow` or `mlflow:URI`; `name` is that of the run.

        Nothing is written yet. Raises `StudyError` for another place, and `MissingExtra` where a package is absent.
        """
        return Trackers(tuple(Tracker(_opener(place, name)) for place in places))

    def beside(self, watcher: Shielded) -> Shielded:
        """A watcher that calls `watcher` and every tracker; a tracker that fails disturbs none of the others."""
        return Shielded(_Together((watcher, *map(Shielded, self.trackers)))) if self.trackers else watcher

    def close(self) -> None:
        """Close all."""
        for tracker in self.trackers:
            tracker.close()


@dataclass(frozen=True)
class _Together:
    """Several watchers as one."""

    watchers: tuple[Watcher, ...]

    def phase(self, name: str, finished: int, total: int) -> None:
        for watcher in self.watchers:
            watcher.phase(name, finished, total)

    def arms(self, names: Sequence[str], rounds: int) -> None:
        for watcher in self.watchers:
            watcher.arms(names, rounds)

    def step(self, arm: str, site: str, number: int, step: int, steps: int) -> None:
        for watcher in self.watchers:
            watcher.step(arm, site, number, step, steps)

    def round(self, report: RoundReport) -> None:
        # Trackers first: the other may stop the run, and what was committed is tracked all the same.
        for watcher in reversed(self.watchers):
            watcher.round(report)


def _opener(place: str, name: str) -> Callable[[], Sink]:
    kind, _, where = place.partition(":")
    match kind, where:
        case "tensorboard", where if where:
            return _tensorboard(Path(where), name)
        case "mlflow", where:
            return _mlflow(where, name)
    raise StudyError(f"--track {place}: unknown tracker; give tensorboard:FOLDER, mlflow or mlflow:URI")


def _tensorboard(folder: Path, name: str) -> Callable[[], Sink]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("--track tensorboard", "tensorboard") from error

    class Board:
        def __init__(self) -> None:
            self._writer = SummaryWriter(log_dir=str(folder / name))

        def add(self, name: str, value: float, step: int) -> None:
            self._writer.add_scalar(name, value, step)

        def close(self) -> None:
            self._writer.close()

    return Board


def _mlflow(uri: str, name: str) -> Callable[[], Sink]:
    # MLflow reports its use over the network unless it is asked not to, before it is imported.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    try:
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise MissingExtra("--track mlflow", "mlflow") from error

    class Flow:
        def __init__(self) -> None:
            # Said outright: the variables of MLflow could name a server.
            place = uri or _local_database()
            self._client = MlflowClient(tracking_uri=place, registry_uri=place)
            known = self._client.get_experiment_by_name(_EXPERIMENT)
            experiment = known.experiment_id if known else self._client.create_experiment(_EXPERIMENT)
            self._run = self._client.create_run(experiment, run_name=name).info.run_id

        def add(self, name: str, value: float, step: int) -> None:
            self._client.log_metric(self._run, name, value, step=step)

        def close(self) -> None:
            self._client.set_terminated(self._run)

    return Flow


def _local_database() -> str:
    """A database in the folder `mlruns` here, which is made where it is absent."""
    folder = Path("mlruns").absolute()
    folder.mkdir(exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"
