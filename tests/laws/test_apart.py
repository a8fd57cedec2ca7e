"""The law of parties apart: coordinator and sites share nothing but messages, and come to the same result."""

from __future__ import annotations

import json
import os
import signal
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file, save

from tests.apart import apart, comparable, engine_of, folder_of, give_root, opened
from tests.scanners import PROTOCOLS
from tests.toys import toy_sites, toy_study
from wardround.errors import DataError, StudyError, WardroundError
from wardround.federation.exchange import ERROR, RELEASE
from wardround.federation.facts import DELIVER, FACTS, ROSTER, SPENT, Patients, SiteFacts, parsed
from wardround.federation.release import FORMAT, model_path
from wardround.plan.arm_specs import ArmSpecs
from wardround.results.schema import Result
from wardround.runs.conduct import coordinate
from wardround.runs.folder import reserve
from wardround.runs.machine import Machine
from wardround.runs.session import run
from wardround.runs.watching import Silent
from wardround.site.process import AgreedStudy, agent_finder, spec_of
from wardround.study.load import plan_sha256, study_sha256
from wardround.study.plugins import Plugins
from wardround.study.schema import Study
from wardround.study.sites import Egress, SiteData, SitesFile
from wardround.wire.canonical import digest
from wardround.wire.message import FileBody, Header, Message, body_sha256
from wardround.wire.tensors import tensors_sha256

SITES = ("A", "B", "C")
ROUNDS = {"schedule": {"rounds": 2}}
LAST = {"rounds": 3, "release": "last"}


def toy(**options: Any) -> dict[str, Any]:
    return {"kind": "custom", "factory": "tests.toys:Regression", "options": options}


UNSEEN = {"sites": {"A": {}, "B": {}, "C": {}, "D": {"role": "unseen"}}}
# No more hospitals than a secure study needs: each is a process that loads torch.
UNSEEN_OF_THREE = {"sites": {"A": {}, "B": {}, "C": {"role": "unseen"}}}
SCANS = {
    "method": {"kind": "hyperfed", "unseen": "mean"},
    "task": {"kind": "custom", "factory": "tests.scanners:make_scans", "options": {}},
    "sites": {name: {"acquisition": PROTOCOLS[name].model_dump()} for name in ("Alpha", "Beta", "Gamma")},
    "acquisition": {"kind": "ct"},
}
PRIVATE = {
    "task": toy(patients=12),
    "method": {"kind": "fedavg", "weights": "equal"},
    "schedule": LAST,
    "protection": {"privacy": {"patients_per_step": 2}},
}


LORA = {"adapters": {"kind": "lora", "targets": ["0", "2"], "rank": 2, "alpha": 1.0}}
LAST_OF_TWO = {"schedule": {"rounds": 2, "release": "last"}}


@dataclass(frozen=True)
class Case:
    changes: dict[str, Any]
    compare: tuple[str, ...] = ()


QUICK = {
    "clear": Case({**ROUNDS, **UNSEEN_OF_THREE}),
    "secure": Case({**ROUNDS, "protection": {"secure": True}}, ("local",)),
    "personal": Case(
        {**ROUNDS, **UNSEEN_OF_THREE, "method": {"kind": "fedbn"}, "task": toy(norm=True), "parts": {"frozen": ["0.*"]}}
    ),
}
SLOW = {
    "private": Case(PRIVATE, ("local",)),
    "secure and private": Case({**PRIVATE, "protection": {**PRIVATE["protection"], "secure": True}}),
    "unseen": Case({**ROUNDS, **SCANS}),
    "stranger under masks": Case({**ROUNDS, **SCANS, "protection": {"secure": True}}),
    "momentum": Case(
        {
            "method": {"kind": "fedavgm", "momentum": 0.8},
            "task": toy(features=40),
            "protection": {"compression": {"kind": "top_k", "ratio": 0.1}},
            "schedule": LAST,
        }
    ),
    "evaluate": Case({**ROUNDS, "sites": {"A": {}, "B": {}, "C": {"role": "evaluate"}}}, ("local",)),
    "control variates": Case({**ROUNDS, **UNSEEN_OF_THREE, "method": {"kind": "scaffold"}}),
    "passes": Case(
        {
            **ROUNDS,
            "method": {"kind": "fednova"},
            "local": {"passes": 1.5, "batch": 2, "optimizer": "sgd", "lr": 0.1},
        },
        ("local",),
    ),
    "evaluate with a mean part": Case(
        {
            **ROUNDS,
            **SCANS,
            "sites": {**SCANS["sites"], "Gamma": {**SCANS["sites"]["Gamma"], "role": "evaluate"}},
        }
    ),
    "encoders of all sites": Case(
        {**ROUNDS, **UNSEEN_OF_THREE, "method": {"kind": "fedmri", "encoder": ["0.*"], "contrast": 0.1}}
    ),
    "fair weights": Case({**ROUNDS, "method": {"kind": "fair_weights"}, "protection": {"secure": True}}),
    "adam": Case({**ROUNDS, "method": {"kind": "fedadam"}}),
    "robust": Case({"schedule": LAST, "protection": {"robust": {"rule": "median"}}}),
    "stages": Case(
        {
            "task": {"kind": "custom", "factory": "tests.chain:make_chain", "options": {}},
            "method": {"kind": "fedavgm"},
            "schedule": {"rounds": 3, "phases": [{"rounds": 1, "train": ["segment"]}, {"train": ["reconstruct"]}]},
        }
    ),
    "products folded": Case({**LORA, **LAST_OF_TWO, **UNSEEN, "method": {"kind": "fedex_lora"}}, ("local",)),
    "products stacked": Case({**LORA, **LAST_OF_TWO, "method": {"kind": "flora", "ranks": {"B": 1}}}),
    "a product of each site's own": Case(
        {
            "adapters": {**LORA["adapters"], "local_rank": 1},
            **UNSEEN,
            **ROUNDS,
            "method": {"kind": "fedsa_lora", "unseen": "mean"},
        }
    ),
    "a failing site": Case({**ROUNDS, "task": toy(fail="B")}),
}


def study_of(changes: dict[str, Any]) -> Study:
    sites = changes.get("sites", SITES)
    return toy_study(sites, **{key: value for key, value in changes.items() if key != "sites"})


def together(folder: Path, case: Case) -> tuple[Study, SitesFile, Result]:
    """The study on one machine; sites that draw secrets have the same ones apart."""
    study = study_of(case.changes)
    sites = toy_sites(folder / "data", tuple(study.sites))
    if study.protection.privacy is not None:
        for number, site in enumerate(study.sites):
            for own in (folder / "together", folder_of(folder / "apart", site)):
                reserve(own)
                give_root(own, site, f"{number + 1:064x}")
    return study, sites, run(study, sites, folder / "together", compare=case.compare, engine="local", quiet=True)


def assert_alike(folder: Path, one: Result, other: Result) -> None:
    assert comparable(one.values) == comparable(other.values)
    for model in one.out.glob("models/*.safetensors"):
        assert model.read_bytes() == (other.out / "models" / model.name).read_bytes()
    for site in one.values["patients"]:
        own = folder_of(folder / "apart", site)
        for private in one.out.glob(f"models/{site}/*/*.safetensors"):
            assert private.read_bytes() == (own / private.relative_to(one.out)).read_bytes()
        # What the consortium releases has come to every hospital, its card too.
        for name in ("models/federated.safetensors", "model_card.md"):
            assert (own / name).read_bytes() == (other.out / name).read_bytes()


def test_parties_apart_come_to_the_same_results(tmp_path: Path) -> None:
    """In the clear, under masks and with private parts: three studies of the same hospitals, each a process."""
    alone = {name: together(tmp_path / name, case) for name, case in QUICK.items()}
    (first, sites, _), *others = alone.values()
    folders = [tmp_path / name / "apart" for name in QUICK]
    more = [
        (study, folder, case.compare)
        for (study, _, _), folder, case in zip(others, folders[1:], list(QUICK.values())[1:], strict=True)
    ]
    with closing(engine_of(first, sites, folders[0], QUICK["clear"].compare, *more)) as engine, opened() as seen:
        results = {
            name: coordinate(
                study,
                tmp_path / name / "apart" / "out",
                engine,
                compare=QUICK[name].compare,
                quiet=True,
                allow_code=True,
            )
            for name, (study, _, _) in alone.items()
        }
    for name, (_, _, one) in alone.items():
        assert_alike(tmp_path / name, one, results[name])
    assert set(results["personal"].values["local_sha256"]) == {"A", "B"}
    # The coordinator's process opened nothing of a site, and the list is not empty for want of looking.
    own = [str(tmp_path / name / part) for name in QUICK for part in ("data", "apart/hospitals")]
    assert [path for path in seen if path.startswith(tuple(own))] == []
    assert any(path.startswith(str(results["secure"].out)) for path in seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_any_study_comes_to_the_same_result_apart(name: str, tmp_path: Path) -> None:
    study, sites, one = together(tmp_path, SLOW[name])
    other = apart(study, sites, tmp_path / "apart", SLOW[name].compare)
    assert_alike(tmp_path, one, other)
    if "private" in name:
        # A coordinator that looked for ledgers in its own folder once reported that nothing was spent.
        assert other.values["privacy"]["epsilon"] > 0.0
        assert all(site["steps"] for site in other.values["privacy"]["sites"].values())


@pytest.mark.slow
def test_a_site_that_lost_its_process_is_started_again(tmp_path: Path) -> None:
    study = study_of(ROUNDS)
    sites = toy_sites(tmp_path / "data", SITES)
    one = run(study, sites, tmp_path / "together", engine="local", quiet=True)
    with closing(engine_of(study, sites, tmp_path)) as engine:

        class Killing(Silent):
            rounds = 0

            def round(self, report: Any) -> None:
                self.rounds += 1
                if self.rounds == 1:
                    os.kill(engine.pids["B"], signal.SIGKILL)

        other = coordinate(study, tmp_path / "out", engine, watcher=Killing(), allow_code=True)
    assert comparable(one.values) == comparable(other.values)


@pytest.mark.slow
def test_other_data_are_refused_by_what_the_site_says(tmp_path: Path) -> None:
    study, sites = study_of(ROUNDS), toy_sites(tmp_path / "data", SITES)
    apart(study, sites, tmp_path)
    (tmp_path / "data" / "B" / "changed").touch()
    with pytest.raises(DataError, match=r"the data of B changed since the run began.*--without B"):
        apart(study, sites, tmp_path)


@pytest.mark.slow
def test_a_site_that_was_away_gets_the_release_when_it_returns(tmp_path: Path, caplog: Any) -> None:
    study, sites = study_of({**ROUNDS, **UNSEEN}), toy_sites(tmp_path / "data", (*SITES, "D"))
    with closing(engine_of(study, sites, tmp_path)) as engine:
        away = engine._sites.pop("D")
        first = coordinate(study, tmp_path / "out", engine, quiet=True, allow_code=True)
        away.close()
    model = folder_of(tmp_path, "D") / "models" / "federated.safetensors"
    assert not model.exists()
    assert "site D did not get the released model" in caplog.text
    again = apart(study, sites, tmp_path)
    assert model.read_bytes() == (tmp_path / "out" / "models" / "federated.safetensors").read_bytes()
    assert again.values["model_sha256"] == first.values["model_sha256"]


@pytest.mark.slow
def test_spending_that_did_not_come_is_an_error(tmp_path: Path) -> None:
    study, sites = study_of(PRIVATE), toy_sites(tmp_path / "data", SITES)
    with closing(engine_of(study, sites, tmp_path)) as engine:
        inner = engine.exchange

        def exchange(messages: Any) -> Any:
            for reply in inner(messages):
                silent = reply.header.kind == SPENT and reply.header.site == "B"
                yield Message(Header(ERROR, reply.header.study, "B", meta={"reason": "away"})) if silent else reply

        engine.exchange = exchange  # type: ignore[method-assign]
        with pytest.raises(WardroundError, match="site B trains and does not say what privacy it spent"):
            coordinate(study, tmp_path / "out", engine, quiet=True, allow_code=True)
    assert not (tmp_path / "out" / "result.json").exists()


@pytest.mark.slow
def test_facts_keep_to_the_site_s_rules(tmp_path: Path) -> None:
    study = study_of(ROUNDS)
    entry = SiteData(data=tmp_path, egress=Egress(minimum_cohort=5))
    sites = SitesFile(sites=dict.fromkeys(SITES, entry)).with_code()
    with closing(engine_of(study, sites, tmp_path)) as engine:
        (reply,) = engine.exchange([Message(facts_of(study))])
    facts = SiteFacts.model_validate(reply.header.meta)
    assert facts.patients is not None
    assert facts.patients.model_dump() == {"train": None, "validation": None, "test": None}
    # The hash of the data itself would show other studies that the patients are the same.
    spec = json.loads((folder_of(tmp_path, "A") / "spec.json").read_text())
    assert spec["site"] == "A"
    assert facts.fingerprint is not None


@pytest.mark.parametrize("compare", ["pooled"])
def test_data_of_several_sites_in_one_place_are_refused(compare: str, tmp_path: Path) -> None:
    study = study_of(ROUNDS)
    with pytest.raises(StudyError, match="stay apart"):
        apart(study, toy_sites(tmp_path / "data", SITES), tmp_path, (compare,))


def test_a_site_keeps_a_model_of_its_study_and_nothing_else(tmp_path: Path) -> None:
    study, sites = study_of(ROUNDS), toy_sites(tmp_path / "data", SITES)
    machine = Machine(study, sites, tmp_path / "out", ())
    kept = model_path(tmp_path / "out", "federated")

    def delivered(data: bytes, **changes: Any) -> dict[str, Any]:
        path = tmp_path / "sent"
        path.write_bytes(data)
        body = FileBody(path, len(data))
        about = {"meta": {"card": "# Card"}, "body_nbytes": len(data), "body_sha256": body_sha256(body), **changes}
        header = Header(DELIVER, machine.study_sha256, "A", **about)
        return dict(machine.find(header).handle(Message(header, body)).header.meta)

    values = {name: tensor.numpy() for name, tensor in machine.model_context.initial.items()}
    ours = {"format": FORMAT, "study_sha256": machine.study_sha256, "plan_sha256": machine.plan_sha256}
    nameless = save(values, ours)
    ours["shared"] = " ".join(values)
    own, again = save(values, ours), save(values, {**ours, "round": "2"})
    other = save(values, {**ours, "study_sha256": "0" * 64})
    elsewhere = save(values, {**ours, "plan_sha256": "0" * 64})
    foreign = save({"w": np.zeros(1, np.float32)}, ours)
    for data, changes, said in (
        (b"no model", {}, "cannot be read"),
        (other, {}, "belongs to another study"),
        (elsewhere, {}, "fills in other defaults"),
        (foreign, {}, "another network than the study's"),
        (nameless, {}, "does not say which of its values are shared"),
        (own, {"body_sha256": "0" * 64}, "not the one that was sent"),
        (own + bytes(1 << 23), {}, "larger than the study's model"),
        (own, {"meta": {"card": "# Card", "also": 1}}, "a delivery needs a card, and nothing else"),
    ):
        assert said in delivered(data, **changes)["reason"]
        assert not kept.exists()
    assert delivered(own) == {}
    assert "another one is not kept in its place" in delivered(again)["reason"]
    assert delivered(own) == {}
    assert kept.read_bytes() == own
    machine.close()


def agent_of(study: Study, folder: Path, **how: Any) -> tuple[Any, str]:
    """The agent of site A as a hospital has it, in this process, and what messages to the study name."""
    agreed = [AgreedStudy(study, folder / "A", ())]
    spec = spec_of("A", toy_sites(folder / "data", SITES), folder / "spool", agreed, **how)
    return agent_finder(spec), study_sha256(study)


def facts_of(study: Study) -> Header:
    """The question for the facts of site A."""
    return Header(FACTS, study_sha256(study), "A", meta={"plan": plan_sha256(study)})


def asked(agent: Any, header: Header) -> Message:
    """The answer of a site to a message without a body."""
    reply: Message = agent(header).handle(Message(header))
    return reply


def test_a_hospital_says_nothing_of_fewer_than_five_patients(tmp_path: Path) -> None:
    study = study_of(ROUNDS)
    agent, _ = agent_of(study, tmp_path)
    said = parsed(SiteFacts, asked(agent, facts_of(study)).header.meta)
    # Four train, two validate, two test.
    assert said.patients == Patients(train=None, validation=None, test=None)
    assert not (tmp_path / "A" / "sites" / "A" / "patients.csv").exists()
    one_machine, _ = agent_of(study, tmp_path / "one", floor=1)
    assert parsed(SiteFacts, asked(one_machine, facts_of(study)).header.meta).patients is not None


def test_a_site_that_fills_in_other_defaults_takes_no_part_and_says_why(tmp_path: Path) -> None:
    study = study_of(ROUNDS)
    agent, identity = agent_of(study, tmp_path)
    for meta in ({"plan": "0" * 64}, {}):
        for kind in (FACTS, SPENT):
            reply = asked(agent, Header(kind, identity, "A", meta=meta))
            assert "site A and the coordinator fill in different defaults of the study" in reply.header.meta["reason"]
    assert asked(agent, facts_of(study)).header.kind == FACTS
    # No message of such a coordinator's arms finds a site, either.
    arm = ArmSpecs(study, (), {}, Plugins(code=True)).arms["federated"]
    assert agent(Header("train", arm.identity(identity, plan_sha256(study)), "A")).name == "A"
    with pytest.raises(StudyError, match="no such study or arm"):
        agent(Header("train", arm.identity(identity, "0" * 64), "A"))


def test_facts_of_other_data_say_no_more_than_that_they_are_others(tmp_path: Path) -> None:
    study = study_of(ROUNDS)
    first = parsed(SiteFacts, asked(agent_of(study, tmp_path, floor=1)[0], facts_of(study)).header.meta)
    (tmp_path / "data" / "A" / "changed").touch()
    then = parsed(SiteFacts, asked(agent_of(study, tmp_path, floor=1)[0], facts_of(study)).header.meta)
    assert first.patients is not None
    assert then.patients is None
    assert None is not then.fingerprint != first.fingerprint
    assert then.public_key == first.public_key


@pytest.mark.slow
def test_a_hospital_s_private_part_is_of_one_round_and_its_hash_is_keyed(tmp_path: Path) -> None:
    study = study_of({**ROUNDS, "method": {"kind": "fedbn"}, "task": toy(norm=True)})
    sites = toy_sites(tmp_path / "data", SITES)
    hashes = []
    for number in range(2):
        folder = tmp_path / str(number)
        with closing(engine_of(study, sites, folder, keyed=True)) as engine:
            hashes.append(coordinate(study, folder / "out", engine, quiet=True, allow_code=True).local_sha256["A"])
            arm = ArmSpecs(study, (), {}, Plugins(code=True)).arm_spec("federated").identity
            own = folder_of(folder, "A") / "models" / "A" / "federated" / "local.safetensors"
            before = own.read_bytes()
            (reply,) = engine.exchange([Message(Header(RELEASE, arm, "A", 1))])
        assert "of another round" in reply.header.meta["reason"]
        assert own.read_bytes() == before
        assert hashes[-1] != tensors_sha256(load_file(own))
    # The same study on the same data: a bare hash would show that they are the same.
    assert hashes[0] != hashes[1]


def test_a_site_sums_with_the_roster_of_its_own_file_alone(tmp_path: Path) -> None:
    study = study_of({**ROUNDS, "protection": {"secure": True}})
    arm = ArmSpecs(study, (), {}, Plugins(code=True)).arm_spec("federated").identity
    log = tmp_path / "A" / "work" / "sites" / "A" / "federated" / "log.jsonl"

    def shown(keys: dict[str, str], expected: str | None, kind: str = ROSTER) -> dict[str, Any]:
        sites = toy_sites(tmp_path / "data", SITES)
        entry = SiteData.model_validate({**sites.of("A").model_dump(), "roster_sha256": expected})
        agreed = [AgreedStudy(study, tmp_path / "A", ())]
        spec = spec_of("A", SitesFile(sites={**sites.sites, "A": entry}).with_code(), tmp_path / "spool", agreed)
        agent = agent_finder(json.loads(json.dumps(spec)))
        key = parsed(SiteFacts, asked(agent, facts_of(study)).header.meta).public_key
        keys |= {"A": key}
        header = Header(ROSTER, arm, "A", meta={"keys": keys}) if kind == ROSTER else Header(kind, arm, "A", 1)
        return dict(asked(agent, header).header.meta)

    keys = {"B": "b" * 64, "C": "c" * 64}
    # Not compared yet: the site says which it was shown, and keeps none.
    refused = shown(keys, "0" * 64)["reason"]
    assert "was shown another one: the log of the site names both hashes" in refused
    events = [json.loads(line) for line in log.read_text().splitlines()]
    (refusal,) = [event["payload"] for event in events if event["event"] == "roster refused"]
    assert refusal == {"roster": digest(keys), "expected": "0" * 64}
    agreed = digest(keys)
    # Another key in the place of a site's is another roster, even where none is kept.
    assert "was shown another one" in shown({"B": "b" * 64, "C": "d" * 64}, agreed)["reason"]
    assert shown(keys, agreed) == {}
    # One that was kept before its hash was known to be wrong serves no sum.
    assert "was shown another one" in shown(keys, "1" * 64, "sum/advertise")["reason"]
    assert "must say kind" in shown(keys, agreed, "sum/advertise")["reason"]
    with pytest.raises(ValidationError, match="roster_sha256"):
        SiteData.model_validate({"data": tmp_path, "roster_sha256": "ab"})


def test_a_roster_belongs_to_no_round(tmp_path: Path) -> None:
    study = study_of({**ROUNDS, "protection": {"secure": True}})
    agent, identity = agent_of(study, tmp_path)
    key = parsed(SiteFacts, asked(agent, facts_of(study)).header.meta).public_key
    keys = {"A": key, "B": "b" * 64, "C": "c" * 64}
    arm = ArmSpecs(study, (), {}, Plugins(code=True)).arms["federated"].identity(identity, plan_sha256(study))
    assert "no round" in asked(agent, Header(ROSTER, arm, "A", 2, meta={"keys": keys})).header.meta["reason"]
    assert asked(agent, Header(ROSTER, arm, "A", meta={"keys": keys})).header.kind == "done"
    # What hospitals can compare by another way stands in the log.
    assert digest(keys) in (tmp_path / "A" / "work" / "sites" / "A" / "federated" / "log.jsonl").read_text()
