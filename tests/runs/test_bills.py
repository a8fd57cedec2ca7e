"""The bill of a run: every byte over the seam, once, whatever protects it and however often the run was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.federation.rig import assert_billed, recorded_sessions
from tests.toys import toy_sites, toy_study
from wardround.errors import Interrupted
from wardround.results.bill import LABELS, bill_of, bill_on_terminal
from wardround.results.files import read_result, read_rounds
from wardround.runs.session import run
from wardround.runs.watching import Silent
from wardround.storage.journal import RoundReport

NORM = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}}
QUICK = {"rounds": 2}
TOLD = {"kind": "fedbn", "unseen": "mean"}


@pytest.mark.parametrize(
    ("role", "changes", "side_channel"),
    [
        ("unseen", {"protection": {"secure": True}}, False),
        ("evaluate", {"protection": {"compression": {"kind": "top_k", "ratio": 0.25}}, "method": TOLD}, True),
    ],
)
def test_every_byte_is_on_the_bill_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, changes: dict[str, Any], side_channel: bool
) -> None:
    roles: dict[str, Any] = {"A": {}, "B": {}, "C": {}, "D": {"role": role}}
    sites, sent = toy_sites(tmp_path / "data", tuple(roles)), recorded_sessions(monkeypatch)
    study = toy_study(roles, schedule=QUICK, task=NORM, **changes)
    result = run(study, sites, tmp_path / "out", compare=("local",), engine="local", quiet=True)
    assert_billed(result, sent)
    federated = result.traffic.arms["federated"]
    assert federated.rounds.up.total == result.traffic.bytes_up
    assert federated.rounds.down.total == result.traffic.bytes_down
    assert (federated.rounds.up.side_channels > 0) == side_channel
    assert federated.rounds.down.side_channels == federated.rounds.up.base == 0
    assert all(bill.up.model >= 0 and bill.up.metrics > 0 for _, bill in federated)
    for line in read_rounds(result.out):
        assert (line.bill.up.total, line.bill.down.total) == (line.bytes_up, line.bytes_down)
    # What a site trains inside of itself is asked for, and answered, in headers and results alone.
    alone = [arm for name, arm in result.traffic.arms.items() if name.startswith("local/")]
    assert all((arm.rounds.up.model == 0) == study.protection.secure for arm in alone)
    assert read_result(result.out).traffic == result.traffic
    shown = bill_of(result)
    assert shown is not None
    assert shown.columns == ("Together, rounds", "Together, tests", "Alone, all sites", "The study as a whole")
    assert ("Side channels" in dict(shown.rows)) == side_channel
    assert "Frozen base" not in dict(shown.rows)
    assert shown.rows[-1][0] == "Total"
    report = result.report.read_text()
    assert all(name in report for name in (*shown.columns, *dict(shown.rows)))
    printed = bill_on_terminal(result)
    assert printed is not None
    assert printed.row_count <= len(LABELS) + 1


class Stopping(Silent):
    """Stops a run after its first round."""

    def round(self, report: RoundReport) -> None:
        raise Interrupted("stopped")


def test_a_run_that_was_stopped_bills_the_rounds_of_all_its_processes(tmp_path: Path) -> None:
    sites, study = toy_sites(tmp_path / "data"), toy_study(schedule={"rounds": 3})
    whole = run(study, sites, tmp_path / "whole", engine="local", quiet=True)
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        run(study, sites, out, engine="local", watcher=Stopping())
    again = run(study, sites, out, engine="local", quiet=True)
    ours, theirs = (found.traffic.arms["federated"].rounds for found in (again, whole))
    for way in ("up", "down"):
        found, plain = getattr(ours, way), getattr(theirs, way)
        assert (found.model, found.metrics) == (plain.model, plain.metrics)
    # A run that is repeated when it is done bills its rounds once.
    once = run(study, sites, out, engine="local", quiet=True)
    assert once.traffic.arms["federated"].rounds == ours
