"""Sites of `role: evaluate`: they do not train, and their validation patients count in the choice of the round."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.federation.rig import recorded_sessions
from tests.toys import Points, Regression, toy_sites, toy_study
from wardround.errors import Interrupted
from wardround.federation.exchange import ERROR, EVALUATE, TRAIN, UPDATE, Call
from wardround.federation.measuring import RELEASED
from wardround.federation.release import as_tensor_file
from wardround.plan.arms import every_arm
from wardround.results.schema import Result
from wardround.runs.explain import explain
from wardround.runs.machine import Machine
from wardround.runs.session import run
from wardround.site.agent import Agent
from wardround.storage.hash_log import LOG
from wardround.storage.journal import Journal, RoundReport
from wardround.study.schema import Study
from wardround.wire.message import FileBody, Message

ROLES = {"A": {}, "B": {}, "D": {"role": "evaluate"}}


class Contrary(Regression):
    """Site D has targets of the other sign: each step towards the others' leads away from its own."""

    def dataset(self, site: str, source: Any) -> Points:
        points = super().dataset(site, source)
        return replace(points, y=-8.0 * points.y) if site == "D" else points


def contrary(**options: Any) -> Contrary:
    return Contrary(**options)


CONTRARY = {"kind": "custom", "factory": "tests.federation.test_evaluating_sites:contrary", "options": {}}


def study_of(role: str = "evaluate", **changes: Any) -> Study:
    return toy_study({**ROLES, "D": {"role": role}}, **{"task": CONTRARY, **changes})


def go(study: Study, folder: Path, **how: Any) -> Result:
    sites = toy_sites(folder / "data", tuple(study.sites))
    return run(study, sites, folder / "out", engine="local", quiet=True, **how)


def lines_of(folder: Path, arm: str = "federated") -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "out" / "rounds.jsonl").read_text().splitlines())
    return [line for line in lines if line["arm"] == arm]


def test_contrary_patients_choose_another_round_and_train_nothing(tmp_path: Path) -> None:
    seen, evaluating = go(study_of("unseen"), tmp_path / "seen"), go(study_of(), tmp_path / "evaluating")
    assert (seen.selected_round["federated"], evaluating.selected_round["federated"]) == (3, 1)
    one, other = lines_of(tmp_path / "seen"), lines_of(tmp_path / "evaluating")
    assert [line["loss"] for line in one] == [line["loss"] for line in other]
    assert [line["participants"] for line in other] == [["A", "B"]] * 4
    assert [line["validated"] for line in one] == [["A", "B"]] * 4
    assert [line["validated"] for line in other] == [["A", "B", "D"]] * 4
    # Tested as an unseen site is, and in no mean of the training sites.
    row = evaluating.metrics["federated"]
    assert row["D"] is not None
    mean = [row[site]["mse"].value for site in "AB"]  # type: ignore[index,union-attr]
    assert row["mean"]["mse"].value == pytest.approx(np.mean(mean))  # type: ignore[index,union-attr]
    card = (tmp_path / "evaluating" / "out" / "model_card.md").read_text()
    assert "does not train; its validation patients count in the choice of the round" in card
    assert "its validation patients count" in (tmp_path / "evaluating" / "out" / "report.html").read_text()


def test_a_value_is_that_of_all_patients_by_hand(tmp_path: Path) -> None:
    """Two validation patients at each of three sites, two points each: the mean over patients of one model."""
    go(study_of(schedule={"rounds": 2, "release": "last"}), tmp_path)
    machine = Machine(study_of(schedule={"rounds": 2, "release": "last"}),
                      toy_sites(tmp_path / "data", tuple("ABD")), tmp_path / "out", ())  # fmt: skip
    arm = machine.arm_spec("federated")
    with closing(Journal(tmp_path / "out" / "work" / "arms" / "federated", arm.identity)) as journal:
        for line in lines_of(tmp_path):
            state = journal.state(line["round"])
            model = machine.task.build_model()
            tensors = arm.method.release_for(None, state.public, state.private)
            model.load_state_dict({name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()})
            errors: list[Tensor] = []
            for site in "ABD":
                for _, batch in machine.dataset(site).evaluation("validation"):
                    errors.append(machine.task.score(model, batch)["mse"].detach().mean())
            assert len(errors) == 6
            # A site's sum is of steps of 1e-6, rounded once.
            assert line["validation"]["mse"] == pytest.approx(float(torch.stack(errors).mean()), abs=3 * 1e-6)
    machine.close()


def test_a_resumed_run_has_the_same_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = ("round", "validation", "validated", "state_sha256", "notes", "bytes_up")
    whole = go(study_of(), tmp_path / "whole")
    commit = Journal.commit
    died: list[int] = []

    def dying(self: Journal, state: Any, report: RoundReport | None, receipts: Any) -> None:
        # Validated, and not committed: sites are asked again what they have answered.
        if report is not None and report.round == 3 and not died:
            died.append(report.round)
            raise Interrupted("power cut")
        commit(self, state, report, receipts)

    monkeypatch.setattr(Journal, "commit", dying)
    with pytest.raises(Interrupted):
        go(study_of(), tmp_path / "cut")
    assert died
    again = go(study_of(), tmp_path / "cut", resume=True)
    assert again.model_sha256 == whole.model_sha256
    first, second = lines_of(tmp_path / "whole"), lines_of(tmp_path / "cut")
    assert [{key: line[key] for key in kept} for line in first] == [{key: line[key] for key in kept} for line in second]


def test_an_evaluator_that_is_away_is_left_out_of_that_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        def handle(self, request: Message) -> Message:
            return request.reply(ERROR, meta={"reason": "away"})

    def find(self: Agent, header: Any) -> Any:
        away = header.kind == EVALUATE and header.site == "D" and header.round == 2
        return Away() if away else found(self, header)

    found = Agent.find
    monkeypatch.setattr(Agent, "find", find)
    result = go(study_of(), tmp_path)
    lines = lines_of(tmp_path)
    assert [line["validated"] for line in lines] == [["A", "B", *(["D"] if n != 2 else [])] for n in (1, 2, 3, 4)]
    assert lines[1]["notes"] == ["validated without D (away)"]
    assert any("validated without D (away)" in note for note in result.notes)
    # Round 2, of other patients, is compared with none.
    assert result.selected_round["federated"] == 1


def test_it_is_asked_once_a_round_and_it_is_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = recorded_sessions(monkeypatch)
    go(study_of(schedule={"rounds": 3}), tmp_path)
    asked = [
        s.message.header for s in sent if s.message.header.site == "D" and s.message.header.kind in (TRAIN, EVALUATE)
    ]
    validations = [header for header in asked if header.meta["split"] == "validation"]
    assert [header.round for header in validations] == [1, 2, 3]
    assert {header.kind for header in asked} == {EVALUATE}
    log = (tmp_path / "out" / "work" / "sites" / "D" / "federated" / LOG).read_text()
    assert log.count(f'"kind":"{EVALUATE}"') >= 4


def test_it_gives_sums_of_one_model_a_round_and_trains_for_nobody(tmp_path: Path) -> None:
    study = study_of(schedule={"rounds": 2})
    go(study, tmp_path)
    machine = Machine(study, toy_sites(tmp_path / "data", tuple("ABD")), tmp_path / "out", ())
    arm = machine.arm_spec("federated")

    def ask(kind: str = EVALUATE, by: float = 0.0, number: int = 2, **meta: Any) -> Message:
        with closing(Journal(tmp_path / "out" / "work" / "arms" / "federated", arm.identity)) as journal:
            state = journal.state(2)
            tensors = arm.method.release_for(None, state.public, state.private)
        file, sha = as_tensor_file({name: t + np.float32(by) for name, t in tensors.items()}, tmp_path / "model")
        asked = {"split": "validation", "evaluator": RELEASED, "unseen_site": True, **meta}
        call = Call(kind, arm.identity, number, ("D",), arm.metrics_layout, {}, meta=asked, tensors=file.table,
                    body=FileBody(file.path, file.nbytes), body_sha256=sha)  # fmt: skip
        request = call.message("D")
        return machine.find(request.header).handle(request)

    assert ask().header.kind == UPDATE
    for reply, said in (
        (ask(by=1e-3), "validation sums of one model of a round"),
        (ask(number=3), "the study ends with round 2"),
        (ask(evaluator="baseline"), "validates the model that a request carries"),
        (ask(unseen_site=False), "validates the model that a request carries"),
        (ask(split="test"), "gives its own results on test patients"),
        (ask(TRAIN), "does not train in this arm"),
    ):
        assert reply.header.kind == ERROR
        assert said in reply.header.meta["reason"]
    machine.close()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_bytes_of_many_models_are_no_one_model(tmp_path: Path, split: str) -> None:
    """The attack: a body of several models, and tables that name one of them as the network and the others as junk."""
    study = study_of(schedule={"rounds": 2})
    machine = Machine(study, toy_sites(tmp_path / "data", tuple("ABD")), tmp_path / "out", ())
    arm, initial = machine.arm_spec("federated"), machine.model_context.initial_values()
    models = [{name: tensor + np.float32(by) for name, tensor in initial.items()} for by in (0.0, 0.5, 1.0)]
    parts = {f"{number}/{name}": t for number, model in enumerate(models) for name, t in model.items()}
    file, sha = as_tensor_file(parts, tmp_path / "models")

    def ask(chosen: int) -> Message:
        table = tuple(replace(row, name=row.name.removeprefix(f"{chosen}/")) for row in file.table)
        asked = {"split": split, "evaluator": RELEASED, "unseen_site": True}
        layout = arm.metrics_layout if split == "validation" else arm.evaluation_layout
        call = Call(EVALUATE, arm.identity, 1, ("D",), layout, {}, meta=asked, tensors=table,
                    body=FileBody(file.path, file.nbytes), body_sha256=sha)  # fmt: skip
        request = call.message("D")
        return machine.find(request.header).handle(request)

    answers = [ask(chosen) for chosen in (0, 1, 2, 0)]
    assert [answer.header.kind for answer in answers] == [UPDATE, ERROR, ERROR, UPDATE]
    assert "has measured another model" in answers[1].header.meta["reason"]
    machine.close()


def test_all_arms_but_the_local_ones_choose_on_the_same_patients(tmp_path: Path) -> None:
    study = study_of()
    assert {arm.name: arm.evaluators for arm in every_arm(study)} == {
        "federated": ("D",),
        "pooled": ("D",),
        "local/A": (),
        "local/B": (),
    }
    assert all("D" not in (*arm.sites, *arm.members) for arm in every_arm(study))
    go(study_of(schedule={"rounds": 2}), tmp_path, compare=("local", "pooled"))
    assert [line["validated"] for line in lines_of(tmp_path, "pooled")] == [["D", "pooled"]] * 2
    assert [line["validated"] for line in lines_of(tmp_path, "local/A")] == [["A"]] * 2


def test_check_says_what_it_does(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps(study_of().model_dump(mode="json", exclude_unset=True)))
    text = " ".join(explain(file, None, (), (), allow_code=True).split())
    assert "D evaluates: validates and tests" in text
    assert "released is the one with the best validation r, over the patients of D too" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"protection": {"secure": True}}, "sites.D.role: `evaluate` cannot be combined with protection.secure"),
        ({"schedule": {"rounds": 2, "validate_every": 0}}, "schedule.validate_every is 0"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        toy_study({**ROLES, "C": {}}, **changes)


def test_a_private_part_is_served_as_to_an_unseen_site(tmp_path: Path) -> None:
    changes = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}}
    result = go(study_of(task=changes, method={"kind": "fedbn"}, schedule={"rounds": 2}), tmp_path)
    assert set(result.local_sha256) == {"A", "B"}
    assert [line["validated"] for line in lines_of(tmp_path)] == [["A", "B", "D"]] * 2


@pytest.mark.slow
def test_with_privacy_it_spends_nothing_and_chooses_nothing(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "task": {"kind": "custom", "factory": "tests.toys:make_task", "options": {"patients": 12}},
        "method": {"kind": "fedavg", "weights": "equal"},
        "protection": {"privacy": {"patients_per_step": 2}},
    }
    with pytest.raises(ValidationError, match="must not depend on validation patients"):
        study_of(**changes)
    result = go(study_of(schedule={"rounds": 2, "release": "last"}, **changes), tmp_path)
    assert result.privacy is not None
    assert set(result.values["privacy"]["sites"]) == {"A", "B"}
    assert [line["validated"] for line in lines_of(tmp_path)] == [["A", "B", "D"]] * 2
