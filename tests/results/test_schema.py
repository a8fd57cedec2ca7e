"""The result files: one typed form, the same bytes for the same result, and one clear error for anything else."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import ValidationError
from report_runs import TRAINING, result, rounds, write_run

from wardround.errors import JournalError
from wardround.results.files import line_of, read_result, read_rounds, write_result
from wardround.results.schema import Estimate, PrivacyStatement, Result, RoundLine, SitePrivacy
from wardround.results.tables import csv_of, numbers_of
from wardround.storage.journal import RoundReport
from wardround.tasks.estimates import Mean, estimate


def test_a_result_is_read_as_it_was_written_and_has_the_same_bytes(tmp_path: Path) -> None:
    found = read_result(write_run(tmp_path, with_pictures=False))
    written = write_result(tmp_path, found)
    first = (tmp_path / "result.json").read_bytes()
    assert read_result(tmp_path) == written == found
    assert json.loads(first) == found.values
    write_result(tmp_path, Result.model_validate(dict(reversed(found.values.items()))))
    assert (tmp_path / "result.json").read_bytes() == first


def test_a_result_has_attributes_and_cannot_be_changed(tmp_path: Path) -> None:
    found = read_result(write_run(tmp_path, with_pictures=False))
    assert (found.out, found.report) == (tmp_path, tmp_path / "report.html")
    assert found.metric("federated") == found.metric("federated", "mean", "psnr") == 33.125
    arms = "cg_sense, federated, local, pooled, tv, zero_filled"
    assert str(found) == repr(found)
    assert sorted(str(found).split("rounds: ")[1].split(";")[0].split(", ")) == arms.split(", ")
    for absent in (("local", "EZ"), ("dreaming", "CS"), ("federated", "CS", "dice")):
        with pytest.raises(KeyError, match="the run has no"):
            found.metric(*absent)
    with pytest.raises(ValidationError, match="frozen"):
        found.rounds = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"version": 2}, "another version"),
        ({"version": None}, "another version"),
        ({"invented": 1}, "damaged: invented: Extra inputs"),
        ({"rounds": "many"}, "damaged: rounds"),
        ({"traffic": {"bytes_up": 1}}, "damaged: traffic.bytes_down: Field required"),
        ({"metrics": {"federated": {"CS": {"psnr": {"value": 1.0}}}}}, "damaged: metrics.federated.CS.psnr.n"),
    ],
)
def test_anything_else_is_refused_by_its_key_with_what_to_do(tmp_path: Path, changed: dict, said: str) -> None:
    write_run(tmp_path, changed, with_pictures=False)
    with pytest.raises(JournalError) as caught:
        read_result(tmp_path)
    assert said in str(caught.value)
    assert "run the study again with the same --out" in str(caught.value)
    assert "many" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_an_estimate_holds_what_a_task_computed_to_six_decimals() -> None:
    computed = estimate(Mean(1 / 3, 0.1234567, 6))
    found = Estimate.model_validate(computed, from_attributes=True)
    assert (found.value, found.se, found.n) == (0.333333, 0.123457, 6)
    assert found.interval == (round(computed.ci_low or 0, 6), round(computed.ci_high or 0, 6))
    assert found.model_dump() == {name: getattr(found, name) for name in ("value", "n", "se", "ci_low", "ci_high")}
    assert Estimate(value=1.0, n=4, ci_low=0.0, ci_high=2.0).interval is None


def test_patients_without_a_value_are_written_where_there_are_any() -> None:
    @dataclass(frozen=True)
    class Counted:
        value: float = 0.5
        n: int = 7
        absent: int = 3

    found = Estimate.model_validate(Counted(), from_attributes=True)
    assert found.model_dump()["absent"] == 3
    assert Estimate.model_validate_json(found.model_dump_json()) == found


def test_an_epsilon_without_a_bound_is_json_and_comes_back() -> None:
    site = SitePrivacy(
        delta=0.1, epsilon=math.inf, epsilon_ledger=math.inf, noise_multiplier=0.0, sample_rate=1.0, steps=1
    )
    privacy = PrivacyStatement(secure=False, epsilon=math.inf, unit="patient", sites={"A": site})
    text = json.dumps(privacy.model_dump(mode="json"), allow_nan=False)
    assert PrivacyStatement.model_validate(json.loads(text)) == privacy


def test_a_line_of_rounds_is_what_the_journal_reports(tmp_path: Path) -> None:
    report = RoundReport(
        "local/A", 3, 1, ("A",), {"B": "away"}, None, {"psnr": 30.5}, 5, 6, 1.5, 0.1, 1.2, 1e-6, 1e-3, "0d" * 32, ("n",)
    )
    (tmp_path / "rounds.jsonl").write_text(line_of(report), encoding="utf-8")
    (line,) = read_rounds(tmp_path)
    assert line.model_dump() == report.to_json()
    assert read_rounds(tmp_path / "absent") == ()
    for damage in ({"round": 0}, {"loss": "low"}, {"invented": 1}):
        (tmp_path / "rounds.jsonl").write_text(json.dumps(line.model_dump() | damage) + "\n", encoding="utf-8")
        with pytest.raises(JournalError, match=rf"line 1 of rounds\.jsonl is no round \({next(iter(damage))}"):
            read_rounds(tmp_path)


def test_the_fields_of_a_line_are_those_of_the_journal() -> None:
    assert list(RoundLine.model_fields) == list(RoundReport.__dataclass_fields__)
    assert [RoundLine(**line).arm for line in rounds(1)][:2] == ["federated", "pooled"]


def test_a_table_of_numbers_has_each_once_and_leaves_out_what_is_withheld(tmp_path: Path) -> None:
    table = result()["metrics"]
    table["federated"]["HT"] = None
    found = read_result(write_run(tmp_path, {"metrics": table}, with_pictures=False))
    lines = csv_of(found).splitlines()
    assert lines[0] == "arm,site,metric,value,se,ci_low,ci_high,n,absent"
    assert "federated,CS,psnr,35.2,,33.8144,36.3085,3,0" in lines
    assert len(lines) == len(set(lines))
    assert not [line for line in lines if line.startswith(("federated,HT", "baseline"))]
    assert {line.split(",")[1] for line in lines[1:]} == {*TRAINING, "EZ", "mean", "unseen"}
    assert numbers_of(found)["federated.CS.psnr.ci_high"] == 36.3085
    assert "federated.CS.psnr.se" not in numbers_of(found)
