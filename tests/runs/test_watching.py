"""What a person sees of a run that goes on: lines in a log, bars on a terminal, and rounds.jsonl as it grows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.toys import toy_sites, toy_study
from wardround import Result, evaluate, run
from wardround.errors import Interrupted
from wardround.progress import LiveProgress
from wardround.runs.watching import OPERATORS, READING, TESTING, Lines, Silent, duration
from wardround.storage.journal import RoundReport

ROUNDS = 3


def _go(folder: Path, name: str = "out", **options: Any) -> Result:
    study = toy_study(schedule={"rounds": ROUNDS})
    sites = toy_sites(folder / "data", tuple(study.sites))
    return run(study, sites, folder / name, engine="local", compare=["local"], **options)


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def _rounds(lines: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(line["arm"], line["round"]) for line in lines]


class Peeking(Silent):
    """Looks into rounds.jsonl whenever a round was committed; stops the run after so many."""

    def __init__(self, out: Path, stop: int = 1000) -> None:
        self.out, self.stop = out, stop
        self.seen: list[list[dict[str, Any]]] = []

    def round(self, report: RoundReport) -> None:
        self.seen.append(_lines(self.out))
        if len(self.seen) == self.stop:
            raise Interrupted("stop")


def test_the_record_of_rounds_grows_as_they_commit_and_validation_comes_after(tmp_path: Path) -> None:
    peeking = Peeking(tmp_path / "out")
    _go(tmp_path, watcher=peeking)
    first = peeking.seen[0]
    assert _rounds(first) == [("federated", 1)]
    assert first[0]["validation"] is None
    # Each call tells of one change: a round, or the validation of the one before.
    assert [len(lines) for lines in peeking.seen[:5]] == [1, 2, 2, 3, 3]
    assert all(line["validation"] for line in peeking.seen[3][:2])
    for lines in peeking.seen:
        assert len(set(_rounds(lines))) == len(lines)
    arms = ("federated", "local/A", "local/B", "local/C")
    assert _rounds(_lines(tmp_path / "out")) == [(arm, n) for arm in arms for n in (1, 2, 3)]
    assert all(line["validation"] for line in _lines(tmp_path / "out"))


@pytest.mark.slow
def test_a_resumed_run_makes_the_record_again_from_what_was_committed(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        _go(tmp_path, watcher=Peeking(tmp_path / "out", stop=4))
    record = tmp_path / "out" / "rounds.jsonl"
    before = _lines(tmp_path / "out")
    # A machine that loses power may keep half of a file.
    record.write_text(record.read_text()[:-40])
    peeking = Peeking(tmp_path / "out")
    result = _go(tmp_path, watcher=peeking)
    assert _rounds(peeking.seen[0])[: len(before)] == _rounds(before)
    plain = _go(tmp_path, "plain", quiet=True)
    kept = ("arm", "round", "participants", "loss", "validation", "state_sha256")
    assert [[line[key] for key in kept] for line in _lines(result.out)] == [
        [line[key] for key in kept] for line in _lines(plain.out)
    ]


@pytest.mark.slow
def test_from_python_a_run_says_a_line_for_each_phase_and_round_unless_it_is_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _go(tmp_path)
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[:2] == ["reading: 3 sites", f"training: 4 arms, {ROUNDS} rounds each"]
    assert lines[-1] == "testing: 12 models at sites"
    assert sum(line.startswith("federated, round ") for line in lines) == ROUNDS
    assert ", r -0." in next(line for line in lines if line.startswith("federated, round 2"))
    # What was done before takes one line an arm.
    _go(tmp_path)
    again = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("federated, round ") for line in again) == 1
    _go(tmp_path, quiet=True)
    sites = toy_sites(tmp_path / "data", ("A", "B", "C"))
    evaluate(result.out, sites, engine="local", quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_result_is_said_in_a_line(tmp_path: Path) -> None:
    said = repr(_go(tmp_path, quiet=True))
    assert said == f"<Result of toy, {ROUNDS} rounds: federated, local; {tmp_path / 'out' / 'report.html'}>"


def _report(arm: str, number: int, **changes: Any) -> RoundReport:
    values: dict[str, Any] = {
        "attempt": 0,
        "participants": ("A",),
        "missing": {},
        "loss": 0.5,
        "validation": None,
        "bytes_up": 0,
        "bytes_down": 0,
        "seconds": 0.0,
        "coordinator_seconds": 0.0,
        "training_seconds": 0.0,
        "saturated_share": 0.0,
        "saturated": 0.0,
        "state_sha256": "",
    }
    return RoundReport(arm=arm, round=number, **{**values, **changes})


def test_the_time_left_counts_this_run_alone(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    lines = Lines(lambda: now[0])
    lines.arms(["federated", "pooled"], 10)
    lines.round(_report("federated", 6))  # of an earlier run
    now[0] = 60.0
    lines.round(_report("federated", 7))
    lines.round(_report("federated", 7, validation={"psnr": 31.0}))
    now[0] = 120.0
    lines.round(_report("federated", 8))
    said = capsys.readouterr().err.splitlines()[1:]
    assert "left" not in said[0]
    assert said[1].endswith("13 min left")  # 13 rounds of a minute
    assert said[2].endswith("psnr 31 after round 7, 12 min left")
    assert [duration(seconds) for seconds in (5, 200, 7500)] == ["5 s", "3 min", "2 h 05 min"]


def test_the_last_rounds_validation_is_said_when_it_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _go(tmp_path)
    (measured,) = (
        line["validation"] for line in _lines(result.out) if (line["arm"], line["round"]) == ("local/B", ROUNDS)
    )
    lines = capsys.readouterr().err.splitlines()
    said = f"local/B, validated: r {measured['r']:.4g} after round {ROUNDS}"
    assert lines.count(said) == 1
    assert lines.index(said) > next(n for n, line in enumerate(lines) if line.startswith(f"local/B, round {ROUNDS} "))
    assert sum(", validated: " in line for line in lines) == 4


def test_lines_stay_within_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    lines, name = Lines(), "without/" + "N" * 32
    lines.arms([name], 1000)
    lines.round(_report(name, 1, missing={"M" * 32: "x", "O" * 32: "y"}))
    assert max(map(len, capsys.readouterr().err.splitlines())) <= 80


def _drawn(width: int, act: Callable[[LiveProgress], None]) -> list[str]:
    """What stands on a terminal of `width` columns at the end of what is done."""
    live, drawn = LiveProgress(Console(file=io.StringIO(), force_terminal=True, width=width)), io.StringIO()
    with live:
        act(live)
        Console(file=drawn, width=width).print(live._progress.get_renderable())
    return drawn.getvalue().splitlines()


def test_bars_name_their_phase_and_fit_into_80_columns() -> None:
    long = "N" * 32

    def act(live: LiveProgress) -> None:
        live.phase(READING, 0, 4)
        live.phase(READING, 4, 4)
        live.phase(OPERATORS, 4, 4)
        live.arms(["federated", f"without/{long}"], 20)
        live.step("federated", long, 1, 5, 20)
        live.round(_report("federated", 1, validation={"psnr": 31.0}, missing={long: "x"}))
        live.step("federated", long, 2, 10, 20)
        live.phase(TESTING, 3, 12)

    lines = _drawn(80, act)
    assert max(len(line.replace("\x1b[?25l", "")) for line in lines) <= 80
    for phase, share in (
        ("reading", "4/4"),
        ("building operators", "4/4"),
        ("training", " 1/40"),
        ("testing", " 3/12"),
    ):
        assert any(line.strip().startswith(phase) and share in line for line in lines), (phase, lines)
    assert any("0:00:" in line or "-:--:--" in line for line in lines)
