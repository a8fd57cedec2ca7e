"""A site's own rules on what may leave it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.federation.rig import Rig
from tests.toys import toy_sites, toy_study
from wardround.errors import StudyError, Withheld
from wardround.runs.session import Result, run
from wardround.site.egress import ACROSS_HOSPITALS, OPEN, EgressRules, check_egress, strictest
from wardround.site.protocol import SiteReply
from wardround.storage.verify import verify
from wardround.study.sites import Egress, SitesFile, load_sites
from wardround.wire.message import FileBody, Header, Message


def ruled(folder: Path, **rules: dict[str, Any]) -> SitesFile:
    sites = toy_sites(folder, ("A", "B", "C"))
    return SitesFile(
        sites={
            name: entry.model_copy(update={"egress": Egress.model_validate(rules.get(name, {}))})
            for name, entry in sites.sites.items()
        }
    ).with_code()


def go(tmp_path: Path, **rules: dict[str, Any]) -> Result:
    return run(toy_study(), ruled(tmp_path / "data", **rules), tmp_path / "out", engine="local")


def blocked(out: Path, site: str) -> set[str]:
    logs = [log for log in verify(out).logs if log.site == site]
    return {str(entry.payload["reason"]) for log in logs for entry in log.told("blocked")}


# A toy site has 4 training, 2 validation and 2 test patients.


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        ({"minimum_cohort": 3}, "fewer patients than egress.minimum_cohort"),
        ({"metrics": ["r"]}, "mse not in egress.metrics"),
    ],
)
def test_small_cohorts_and_unlisted_metrics_stay(tmp_path: Path, rules: dict[str, Any], why: str) -> None:
    values = go(tmp_path, B=rules)
    assert values.metrics["federated"]["B"] is None
    assert why in values.withheld["B"]
    assert values.metrics["federated"]["A"] is not None
    assert values.participants == ("A", "B", "C")
    assert why in blocked(tmp_path / "out", "B")
    assert not blocked(tmp_path / "out", "A")
    # The model is that of a run without rules, and validation is the mean over the others.
    bare = go(tmp_path / "bare")
    assert values.model_sha256 == bare.model_sha256
    rows = [json.loads(line) for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]
    plain = [json.loads(line) for line in (tmp_path / "bare" / "out" / "rounds.jsonl").read_text().splitlines()]
    assert all(row["validation"] for row in rows)
    assert [row["validation"] for row in rows] != [row["validation"] for row in plain]


def test_a_cohort_of_just_enough_leaves(tmp_path: Path) -> None:
    values = go(tmp_path, B={"minimum_cohort": 2, "metrics": ["r", "mse"]})
    assert values.metrics["federated"]["B"] is not None
    assert not blocked(tmp_path / "out", "B")


def test_a_handful_of_patients_is_not_even_counted(tmp_path: Path) -> None:
    patients = go(tmp_path, B={"minimum_cohort": 3}).patients
    assert patients["A"] == {"train": 4, "validation": 2, "test": 2}
    assert patients["B"] == {"train": 4, "validation": None, "test": None}
    assert EgressRules(minimum_cohort=11).counts({"train": 11, "test": 0}) == {"train": 11, "test": 0}


def test_without_any_sites_validation_the_last_round_is_released(tmp_path: Path) -> None:
    few = {"minimum_cohort": 11}
    values = go(tmp_path, A=few, B=few, C=few)
    assert values.selected_round["federated"] == 4
    assert all(values.metrics["federated"][site] is None for site in "ABC")


def test_an_answer_that_says_more_is_blocked_at_the_last_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(toy_study(schedule={"rounds": 1}), tmp_path)
    site = rig.sites["B"]
    honest = site._answer

    def chatty(request: Message) -> SiteReply:
        answer = honest(request)
        header = answer.reply.header
        return replace(
            answer, reply=Message(replace(header, meta={**header.meta, "ages": [61, 70]}), answer.reply.body)
        )

    monkeypatch.setattr(site, "_answer", chatty)
    rig.train()
    (report,) = rig.journal.reports()
    assert report.participants == ("A", "C")
    assert "Withheld: site B lets out no such answer" in report.missing["B"]
    assert any("lets out no such answer" in reason for reason in blocked(tmp_path, "B"))
    assert not any(b"ages" in sent.data for sent in rig.engine.sent)


@pytest.mark.parametrize("kind", ["pictures", "update", "sum/advert"])
def test_unknown_kinds_do_not_leave(kind: str) -> None:
    with pytest.raises(Withheld):
        check_egress(Message(Header(kind, "s", "A")), {"known": 0}, frozenset())


def test_an_update_is_as_long_as_its_layout_says(tmp_path: Path) -> None:
    body = FileBody(tmp_path / "body", 8)
    fits = Header("update", "s", "A", meta={"layout": "known"}, body_nbytes=8)
    check_egress(Message(fits, body), {"known": 8}, frozenset())
    longer, hidden = replace(fits, body_nbytes=9), FileBody(tmp_path / "body", 9)
    for reply in (Message(longer, hidden), Message(fits, hidden), Message(Header("done", "s", "A"), body)):
        with pytest.raises(Withheld):
            check_egress(reply, {"known": 8}, frozenset())


def test_rules_are_checked_when_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "A").mkdir()
    path = tmp_path / "sites.yaml"
    path.write_text("sites: {A: {data: A, egress: {minimum_cohort: 11, metrics: [psnr]}}}")
    egress = load_sites(path).of("A").egress
    assert (egress.minimum_cohort, egress.metrics) == (11, ("psnr",))
    path.write_text("sites: {A: {data: A, egress: {minimum_cohort: 0}}}")
    with pytest.raises(StudyError, match="minimum_cohort"):
        load_sites(path)
    assert EgressRules().refusal({"psnr": [1.0]}) is None


def test_the_strictest_rules_keep_all() -> None:
    closed, some, few = (
        EgressRules(False),
        EgressRules(True, frozenset({"r", "mse"}), 5),
        EgressRules(True, frozenset({"r"})),
    )
    assert strictest([]) == OPEN
    assert strictest([closed, some, few]) == EgressRules(False, frozenset({"r"}), 5)
    assert strictest([EgressRules(floor=ACROSS_HOSPITALS), few]).least == ACROSS_HOSPITALS


def test_across_hospitals_no_file_of_a_site_goes_below_the_floor() -> None:
    agent = EgressRules(minimum_cohort=1, floor=ACROSS_HOSPITALS)
    assert agent.refusal({"psnr": [1.0] * 4}) == "fewer than 5 patients"
    assert agent.refusal({"psnr": [1.0] * 5}) is None
    strict = replace(agent, minimum_cohort=11)
    assert strict.refusal({"psnr": [1.0] * 10}) == "fewer patients than egress.minimum_cohort"
    assert agent.counts({"test": 4, "train": 5}) == {"test": None, "train": 5}
