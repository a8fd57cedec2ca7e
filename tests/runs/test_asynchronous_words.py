"""What a person reads of asynchronous rounds: before a run, while it goes on, and in its report."""

from __future__ import annotations

from typing import Any

import pytest

from tests.federation.arrivals import asynchronous
from tests.results.report_runs import rounds
from tests.toys import toy_study
from wardround.hospitals.coordinator.status import StudyStatus
from wardround.hospitals.coordinator.status_lines import details
from wardround.results.figures import attendance
from wardround.results.schema import RoundLine
from wardround.runs.explain import late_lines
from wardround.runs.notes import left_out
from wardround.runs.watching import Lines


def lines() -> list[RoundLine]:
    """Two rounds: C is at work in the first, and late by one round in the second, in which B declined."""
    template = next(line for line in rounds(1) if line["arm"] == "federated")
    first: dict[str, Any] = {
        "participants": ("A", "B"),
        "staleness": {"A": 0, "B": 0},
        "at_work": {"C": 1},
        "missing": {},
    }
    second = {
        "participants": ("A", "C"), "staleness": {"A": 0, "C": 1}, "missing": {"B": "no disk"}, "at_work": {"B": 2},
    }  # fmt: skip
    return [RoundLine(**template | {"round": n, **each}) for n, each in enumerate((first, second), 1)]


def test_a_site_that_is_at_work_is_not_called_missing() -> None:
    training = {"A": 4, "B": 4, "C": 2}
    assert left_out(lines(), training) == [
        "federated: 1 update of C came late, by 1 round at most, and counted less for it; it is in 1 of 2 rounds"
    ]
    strip = str(attendance("C", lines()))
    assert "Round 1: at work on round 1" in strip
    assert "Round 2: took part, 1 round late" in strip
    assert "missing" not in strip
    assert "Round 2: missing, no disk" in str(attendance("B", lines()))
    assert "Round 1: took part<" in str(attendance("A", lines()))


def test_check_says_what_a_late_update_counts() -> None:
    said = " ".join(late_lines(asynchronous(3, asynchronous={"exponent": 0.5, "max_staleness": 7})))
    assert "the first 3 updates of 4 sites" in said
    assert "(1 + t)^-0.5 of a fresh one (public), at most 7" in said
    assert "believes in up to 7 rounds without it" in said
    assert late_lines(toy_study()) == ()


def test_a_run_that_goes_on_says_who_is_at_work(capsys: pytest.CaptureFixture[str]) -> None:
    watcher = Lines()
    watcher.arms(["federated"], 2)
    watcher.round(lines()[0])  # type: ignore[arg-type]
    assert "at work: C" in capsys.readouterr().err
    study = StudyStatus(name="s", study_sha256="0", submitted=0.0, state="running", at_work={"C": 1})
    assert "the last round did not wait for C, which was at work on round 1" in list(details(study))
