"""Comparisons are fair: every arm sees the same examples, on the same schedule, from the same start."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.toys import toy_sites, toy_study
from wardround.errors import StudyError
from wardround.federation.plans import plan_of
from wardround.learning.examples import ExampleStream, SiteExamples, UnionExamples
from wardround.learning.methods.method import Method
from wardround.learning.optimizer import learning_rate
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.arms import arms_of
from wardround.runs.explain import explain
from wardround.runs.machine import Machine
from wardround.runs.session import open_host, run
from wardround.site.rules import rules_of
from wardround.study.plugins import Plugins
from wardround.study.schema import Local
from wardround.wire.message import Header

SITES = {"A": {}, "B": {}, "C": {}, "D": {"role": "unseen"}}


def test_arms_are_the_federation_and_what_was_asked_for() -> None:
    study = toy_study(SITES, method={"kind": "fedprox", "mu": 0.5}, local={"steps": 4, "batch": 2, "warmup": 2})
    arms = {arm.name: arm for arm in arms_of(study, ("local", "pooled"))}
    assert set(arms) == {"federated", "pooled", "local/A", "local/B", "local/C"}
    assert arms["federated"].sites == ("A", "B", "C")
    assert (arms["pooled"].sites, arms["pooled"].members) == (("pooled",), ("A", "B", "C"))
    # A pooled step takes a batch of every site, so that the arm sees as many examples in as many steps.
    assert (arms["pooled"].local.steps, arms["pooled"].local.batch) == (4, 6)
    assert arms["local/B"].local == study.local
    # A proximal term towards oneself would only be a slower optimiser.
    assert arms["local/B"].method.kind == arms["pooled"].method.kind == "fedavg"
    assert len({arm.identity("x", "y") for arm in arms.values()}) == 5
    with pytest.raises(StudyError, match="choose from local, pooled"):
        arms_of(study, ("global",))


def test_the_pooled_arm_sees_the_union_of_what_the_sites_see() -> None:
    sizes = {"A": 7, "B": 10, "C": 4}
    streams = tuple(ExampleStream(size, 3, site) for site, size in sizes.items())
    union = UnionExamples(streams, (0, 7, 17), 3)
    for number in range(1, 6):
        pooled = union.of_round(number, 18)
        alone = [
            offset + index
            for stream, offset in zip(streams, (0, 7, 17), strict=True)
            for index in SiteExamples(stream).of_round(number, 6)
        ]
        assert sorted(pooled) == sorted(alone)
        assert pooled != alone


def test_a_stream_shows_every_example_once_an_epoch_and_depends_on_names_only() -> None:
    stream = ExampleStream(7, 3, "A")
    assert sorted(stream.take(14, 7)) == list(range(7))
    assert stream.take(0, 40)[5:25] == stream.take(5, 20)
    assert ExampleStream(7, 3, "A").take(0, 30) == stream.take(0, 30)
    assert ExampleStream(7, 3, "B").take(0, 30) != stream.take(0, 30)
    assert ExampleStream(7, 4, "A").take(0, 30) != stream.take(0, 30)


def test_learning_rates_follow_the_global_step() -> None:
    local = Local(lr=1.0, schedule="cosine", warmup=4)
    rates = [learning_rate(local, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[12] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert learning_rate(Local(lr=0.3), 19, 20) == 0.3


def test_a_host_builds_each_part_once_and_only_sites_of_its_study(tmp_path: Path) -> None:
    study = toy_study(SITES)
    host = Machine(study, toy_sites(tmp_path, tuple(SITES)), tmp_path / "out", ("local",))
    header = Header("train", host.arm_spec("federated").identity, "A")
    assert host.find(header) is host.find(header)
    assert host.find(Header("train", host.arm_spec("local/A").identity, "A")) is not host.find(header)
    with pytest.raises(StudyError, match="another study"):
        host.find(Header("train", "0" * 64, "A"))
    with pytest.raises(StudyError, match="no site 'Z'"):
        host.find(Header("train", header.study, "Z"))
    again = Machine.from_spec(host.spec())
    assert again.study_sha256 == host.study_sha256
    assert again.arm_spec("federated").layout.sha256 == host.arm_spec("federated").layout.sha256


def test_a_site_without_data_is_named_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no entry for site C"):
        open_host(toy_study(), toy_sites(tmp_path, ("A", "B")), tmp_path / "out", (), (), None)
    assert not (tmp_path / "out").exists()


def test_the_released_round_is_the_best_or_the_last(tmp_path: Path) -> None:
    schedule = {"rounds": 6}
    sites = toy_sites(tmp_path, ("A", "B", "C"))
    local = {"steps": 3, "batch": 2, "optimizer": "sgd", "lr": 0.2}
    best = run(toy_study(schedule=schedule, local=local), sites, tmp_path / "best", engine="local")
    last = run(
        toy_study(schedule={**schedule, "release": "last"}, local=local), sites, tmp_path / "last", engine="local"
    )
    lines = [json.loads(line) for line in (best.out / "rounds.jsonl").read_text().splitlines()]
    scores = {line["round"]: line["validation"]["r"] for line in lines}
    assert best.selected_round == {"federated": max(scores, key=lambda n: scores[n])}
    assert last.selected_round == {"federated": 6}
    assert best.steps == {"federated": 18}
    assert best.examples == {"federated": 18 * 2 * 3}


def test_check_invents_no_scanner_and_no_model_for_a_task_of_ones_own(tmp_path: Path) -> None:
    study, sites = tmp_path / "study.yaml", tmp_path / "sites.yaml"
    study.write_text(yaml.safe_dump(toy_study().model_dump(mode="json")), encoding="utf-8")
    sites.write_text(yaml.safe_dump(toy_sites(tmp_path).model_dump(mode="json")), encoding="utf-8")
    for given in (None, sites):
        said = explain(study, given, (), (), allow_code=True)
        assert "model        the task's own: 65 values" in said
        for invented in ("scanner", "coils", "unrolled", "modl", "preset", "slices"):
            assert invented not in said.replace("egress.scanner_facts", "")


def test_a_start_is_made_once_an_arm_and_nothing_changes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, made, initial = toy_study(), [], Method.initial

    def counted(self: Method, *args: Any) -> Any:
        made.append(self)
        return initial(self, *args)

    monkeypatch.setattr(Method, "initial", counted)
    plans = ArmSpecs(study, ("local",), plugins=Plugins(code=True))
    starts = [rules_of(plans, "federated").initial for _ in study.sites] + [plan_of(plans, "federated").initial]
    assert len(made) == 1
    assert all(start is starts[0] for start in starts)
    assert rules_of(plans, "local/A").initial is not starts[0]
    with pytest.raises(TypeError):
        starts[0]["model/0.bias"] = np.zeros(3)  # type: ignore[index]
