"""Who looks on while a run goes on; nothing that happens to a watcher changes what is trained."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from wardround.data.deidentify import describe_error
from wardround.errors import Interrupted
from wardround.federation.journal import RoundReport

log = logging.getLogger(__name__)


class Watcher(Protocol):
    """Sees a run go on; every call may come from another thread.

    What it raises is logged and changes nothing, but for `Interrupted` between two rounds: that stops the run.
    """

    def arms(self, names: Sequence[str], rounds: int) -> None:
        """The run will train these arms."""

    def step(self, arm: str, site: str, number: int, step: int, steps: int) -> None:
        """A site took a step."""

    def round(self, report: RoundReport) -> None:
        """A round was committed, or its validation became known."""

    def evaluated(self, finished: int, total: int) -> None:
        """So many of the final evaluations are done."""


class Silent:
    """A watcher that says nothing."""

    def arms(self, names: Sequence[str], rounds: int) -> None:
        """Say nothing."""

    def step(self, arm: str, site: str, number: int, step: int, steps: int) -> None:
        """Say nothing."""

    def round(self, report: RoundReport) -> None:
        """Say nothing."""

    def evaluated(self, finished: int, total: int) -> None:
        """Say nothing."""


class Shielded:
    """A watcher whose failures stay its own.

    It is called from inside a site's training: what it raised there would count as the site's failure, and the round
    would go on without the site, to another model.
    """

    def __init__(self, watcher: Watcher | None) -> None:
        self._watcher: Watcher = watcher or Silent()
        self._said = False

    def arms(self, names: Sequence[str], rounds: int) -> None:
        """The run will train these arms."""
        self._try(lambda: self._watcher.arms(names, rounds))

    def step(self, arm: str, site: str, number: int, step: int, steps: int) -> None:
        """A site took a step."""
        self._try(lambda: self._watcher.step(arm, site, number, step, steps))

    def round(self, report: RoundReport) -> None:
        """A round was committed, or its validation became known; raises `Interrupted` where the watcher does."""
        self._try(lambda: self._watcher.round(report), stops=True)

    def evaluated(self, finished: int, total: int) -> None:
        """So many of the final evaluations are done."""
        self._try(lambda: self._watcher.evaluated(finished, total))

    def _try(self, call: Callable[[], None], *, stops: bool = False) -> None:
        try:
            call()
        except Exception as error:
            if stops and isinstance(error, Interrupted):
                raise
            if not self._said:
                self._said = True
                log.warning("the watcher of the run fails (%s); the run goes on", describe_error(error))
                log.debug("details", exc_info=True)
