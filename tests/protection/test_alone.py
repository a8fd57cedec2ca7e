"""Under a secure sum, an arm of one site stays in it: what a coordinator could subtract from a sum is never sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.federation.rig import recorded_sessions
from tests.toys import toy_sites, toy_study
from wardround.engines.local import LocalEngine
from wardround.errors import Interrupted, NotEnoughSites, StudyError
from wardround.federation.coordinator import Coordinator
from wardround.federation.exchange import ALONE, DONE, ERROR, EVALUATE, RELEASE, TRAIN, UPDATE, Call
from wardround.federation.measuring import OWN
from wardround.federation.release import load_model, serve, shared_sha256
from wardround.runs.machine import Machine
from wardround.runs.session import Result, evaluate, run
from wardround.runs.watching import Silent
from wardround.storage.journal import Journal
from wardround.storage.verify import verify
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.study.sites import Egress, SitesFile
from wardround.wire.message import FileBody, Header, Message

SITES = ("A", "B", "C", "D")
ROUNDS = 3


def study_of(*, secure: bool, **changes: Any) -> Study:
    protection = {"secure": secure, "initial_scale": 8.0, "max_sites": 4}
    local = {"steps": 2, "batch": 2, "optimizer": "adam", "lr": 0.1, "optimizer_state": "keep"}
    return toy_study(SITES, protection=protection, local=local, schedule={"rounds": ROUNDS}, **changes)


def compared(folder: Path, name: str, *, secure: bool, sites: SitesFile | None = None, **how: Any) -> Result:
    sites = sites or toy_sites(folder / "data", SITES)
    return run(study_of(secure=secure), sites, folder / name, compare=["local"], engine="local", **how)


def own(out: Path, site: str) -> Path:
    return out / "models" / site / f"local-{site}" / "model.safetensors"


@pytest.fixture(scope="module")
def clear(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The same study without masks: its local arms run on messages."""
    return compared(tmp_path_factory.mktemp("clear"), "out", secure=False)


def test_an_arm_that_stays_inside_comes_to_the_model_of_one_that_is_sent(
    tmp_path: Path, clear: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = recorded_sessions(monkeypatch)
    result = compared(tmp_path, "out", secure=True)
    for site in SITES:
        expected = clear.out / "models" / f"local-{site}.safetensors"
        assert shared_sha256(own(result.out, site)) == shared_sha256(expected)
        assert load_model(own(result.out, site))[1]["round"] == load_model(expected)[1]["round"]
        assert not (result.out / "models" / f"local-{site}.safetensors").exists()
    assert result.metrics["local"] == clear.metrics["local"]
    assert result.selected_round.keys() == {"federated"}
    assert {json.loads(line)["arm"] for line in (result.out / "rounds.jsonl").read_text().splitlines()} == {"federated"}

    # At the seam: a request without a body, an answer that holds nothing; at the end the test result, and no more.
    host = Machine(study_of(secure=True), toy_sites(tmp_path / "data", SITES), result.out, ("local",))
    arms = {host.arm_spec(f"local/{site}").identity for site in SITES}
    layout = host.arm_spec("local/A").evaluation_layout
    ours = [s for s in sent if s.message.header.study in arms]
    assert [s.message.header.kind for s in ours if not s.message.header.reply_to].count(ALONE) == 4 * ROUNDS
    for one in ours:
        header = one.message.header
        if header.kind == UPDATE:
            assert (header.meta["layout"], len(one.body)) == (layout.sha256, layout.nbytes)
        else:
            assert header.kind in (ALONE, DONE, EVALUATE)
            assert one.body == b""
            assert not header.meta or header.kind == EVALUATE
    # Its log, and the one of the coordinator within, hold each other.
    assert verify(result.out).damages == []
    events = [json.loads(line) for line in (result.out / "work/sites/A/local-A/log.jsonl").read_text().splitlines()]
    assert [e["payload"]["round"] for e in events if e["event"] == ALONE] == [1, 2, 3]


def test_no_update_of_a_local_arm_equals_a_masked_one(
    tmp_path: Path, clear: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack: what local/X sends in round 1 is X's share of the masked sum, from the same start and examples."""
    sent = recorded_sessions(monkeypatch)
    result = compared(tmp_path, "out", secure=True)
    updates = [s for s in sent if s.message.header.kind == UPDATE]
    asked = {s.message.id: s.message.header for s in sent if not s.message.header.reply_to}
    federated = Machine(study_of(secure=True), toy_sites(tmp_path / "data", SITES), result.out, ()).arm_spec(
        "federated"
    )
    trained = [s for s in updates if asked[s.message.header.reply_to].kind == TRAIN]
    assert trained
    assert {s.message.header.study for s in trained} == {federated.identity}
    # No tensor of the model that a site keeps crosses the seam.
    stream = b"\0".join(s.data for s in sent)
    for site in SITES:
        for tensor in load_file(own(result.out, site)).values():
            assert tensor.nbytes < 8 or tensor.tobytes() not in stream


@pytest.mark.slow
def test_evaluate_finds_the_same_numbers_and_a_lost_model_is_written_anew(tmp_path: Path) -> None:
    result = compared(tmp_path, "out", secure=True)
    before = own(result.out, "B").read_bytes()
    own(result.out, "B").unlink()
    again = evaluate(result.out, toy_sites(tmp_path / "data", SITES), engine="local")
    assert again.metrics == result.metrics
    assert own(result.out, "B").read_bytes() == before


def test_a_request_that_equals_one_within_is_refused(tmp_path: Path) -> None:
    """Of round 1 a coordinator can foretell every byte, and what the site said within lies in its store."""
    host = Machine(study_of(secure=True), toy_sites(tmp_path / "data", SITES), tmp_path / "out", ("local",))
    arm_spec, asked = host.arm_spec("local/A"), []

    class Foretelling:
        def exchange(self, messages: Any) -> Iterator[Message]:
            asked.extend(messages)
            raise Interrupted("foretold")

        def close(self) -> None:
            """Nothing is open."""

    with closing(Journal(tmp_path / "foretold", arm_spec.identity)) as journal:
        coordinator = Coordinator(host.plan("local/A"), arm_spec.method, Foretelling(), journal)
        with pytest.raises(Interrupted):
            list(coordinator.rounds(coordinator.start(lambda: host.initial(arm_spec))))
    site = host.find(asked[0].header)
    assert site.handle(Message(Header(ALONE, arm_spec.identity, "A", 1))).header.kind == DONE
    assert [site.handle(message).header.kind for message in asked] == [ERROR]
    host.close()


def test_a_site_that_withholds_its_results_withholds_those_of_its_own_model(tmp_path: Path) -> None:
    sites = toy_sites(tmp_path / "data", SITES)
    closed = sites.sites["B"].model_copy(update={"egress": Egress(per_site_results=False)})
    sites = sites.model_copy(update={"sites": {**sites.sites, "B": closed}})
    result = compared(tmp_path, "out", secure=True, sites=sites)
    assert result.metrics["local"]["B"] is None
    assert result.metrics["local"]["A"] is not None


# A coordinator that asks for more ----------------------------------------------------------------------------------


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Machine]:
    host = Machine(study_of(secure=True), toy_sites(tmp_path / "data", SITES), tmp_path / "out", ("local", "pooled"))
    yield host
    host.close()


def state_of(host: Machine, folder: Path, arm: str = "federated") -> Call:
    """What an honest coordinator of the arm would send in round 1."""
    with_arm = host.arm_spec(arm)
    from wardround.federation.coordinator import Coordinator
    from wardround.storage.journal import Journal

    journal = Journal(folder / "hostile", with_arm.identity)
    coordinator = Coordinator(host.plan(arm), with_arm.method, LocalEngine(host.find), journal)
    state = coordinator.start(lambda: host.initial(with_arm))
    call = coordinator._call(TRAIN, state, 1, {"keep": [0], "validate": True}, with_arm.codec.sent(with_arm.layout))
    journal.close()
    return call


def asked(host: Machine, call: Call, site: str) -> Message:
    """The answer at the door of a site, or of whatever stands for it."""
    (reply,) = LocalEngine(host.find).exchange([call.message(site)])
    return reply


@pytest.mark.parametrize(
    ("arm", "site", "why"),
    [
        ("local/A", "A", "trains this arm inside"),
        ("local/A", "B", "has no part in an arm that another site trains alone"),
        ("pooled", "A", "does not train in this arm"),
        ("federated", "A", "a clear update is not given"),
    ],
)
def test_a_site_refuses_to_train_in_the_clear_whatever_arm_is_named(
    host: Machine, tmp_path: Path, arm: str, site: str, why: str
) -> None:
    reply = asked(host, state_of(host, tmp_path, arm), site)
    assert reply.header.kind == ERROR
    assert why in reply.header.meta["reason"]


def test_an_arm_without_a_site_does_not_exist_at_any_site(host: Machine, tmp_path: Path) -> None:
    from wardround.wire.canonical import digest

    call = replace(state_of(host, tmp_path), study=digest([host.study_sha256, host.plan_sha256, "without/B"]))
    reply = asked(host, call, "A")
    assert "an arm that this run does not have" in reply.header.meta["reason"]


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(("arm", "site"), [("local/A", "A"), ("pooled", "A"), ("federated", "A")])
def test_sums_for_pooling_do_not_leave_a_site_by_themselves(
    host: Machine, tmp_path: Path, arm: str, site: str, split: str
) -> None:
    """A site's validation is hidden in the masked sum; asked for alone it would be read."""
    call, arm_spec = state_of(host, tmp_path, arm), host.arm_spec(arm)
    for layout in (arm_spec.metrics_layout, arm_spec.evaluation_layout):
        meta = {"split": split}
        reply = asked(host, replace(call, kind=EVALUATE, layout=layout, scales={}, meta=meta), site)
        own_test = split == "test" and layout is arm_spec.evaluation_layout and arm != "local/A"
        assert (reply.header.kind == UPDATE) == own_test, reply.header.meta


def test_a_site_tests_no_model_but_its_own_in_its_own_arm(host: Machine, tmp_path: Path) -> None:
    arm_spec = host.arm_spec("local/A")
    test = Call(EVALUATE, arm_spec.identity, 1, ("A",), arm_spec.evaluation_layout, {}, meta={"split": "test"})
    early = asked(host, replace(test, meta={"split": "test", "evaluator": OWN}), "A")
    assert "has not trained alone" in early.header.meta["reason"]
    body = state_of(host, tmp_path, "local/A")
    for evaluator in (OWN, "released"):
        foreign = replace(body, kind=EVALUATE, layout=arm_spec.evaluation_layout, scales={})
        reply = asked(host, replace(foreign, meta={"split": "test", "evaluator": evaluator}), "A")
        assert "the model that it trained alone, and no other" in reply.header.meta["reason"]
    assert "trains this arm inside" in asked(host, replace(test, kind=RELEASE, meta={}), "A").header.meta["reason"]


def test_a_request_to_train_alone_holds_a_round_of_the_study_and_nothing_else(host: Machine, tmp_path: Path) -> None:
    def ask(number: int, **more: Any) -> Message:
        header = Header(ALONE, host.arm_spec("local/A").identity, "A", number, **more)
        (reply,) = LocalEngine(host.find).exchange([Message(header)])
        return reply

    assert "names a round and nothing else" in ask(1, meta={"validate": True}).header.meta["reason"]
    assert "names a round and nothing else" in ask(0).header.meta["reason"]
    assert "the study ends with round 3" in ask(10**6).header.meta["reason"]
    assert ask(1).header.kind == DONE
    (reply,) = LocalEngine(host.find).exchange([Message(Header(ALONE, host.arm_spec("federated").identity, "A", 1))])
    assert reply.header.kind == ERROR


def test_left_out_arms_are_refused_with_the_reason() -> None:
    study = load_study(
        {
            "name": "left-out",
            "sites": {name: {} for name in SITES},
            "task": {"contrasts": ["flair"], "evaluation": {"leave_one_out": True}},
            "protection": {"secure": True},
        }
    )
    from wardround.plan.arm_specs import ArmSpecs

    with pytest.raises(StudyError, match=r"leave_one_out: .* minus the sum without one is the update of that one"):
        ArmSpecs(study, ())


# Stopped and started again -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """As kill -9 would, it passes every handler of errors."""


_OTHERS = [pytest.param(number, marks=pytest.mark.slow) for number in (1, 3)]


@pytest.mark.parametrize("number", [2, *_OTHERS])
def test_an_arm_inside_goes_on_after_a_kill(
    tmp_path: Path, clear: Result, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Killed between a round's commit at the site and its answer: the commit stands, the round is not done twice."""
    from wardround.storage.store import SiteStore

    finish = SiteStore.finish

    def dying(self: SiteStore, reply: Message, *args: Any, **named: Any) -> None:
        if reply.header.kind == DONE and reply.header.round == number:
            raise Killed
        finish(self, reply, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(SiteStore, "finish", dying)
        with pytest.raises(Killed):
            compared(tmp_path, "out", secure=True)
    result = compared(tmp_path, "out", secure=True)
    for site in SITES:
        assert shared_sha256(own(result.out, site)) == shared_sha256(clear.out / "models" / f"local-{site}.safetensors")
    assert result.metrics["local"] == clear.metrics["local"]
    assert verify(result.out).damages == []


class Stopping(Silent):
    """Ctrl-C after the first round of the first arm that stays inside."""

    def round(self, report: Any) -> None:
        if report.arm.startswith("local/"):
            raise Interrupted("stop")


@pytest.mark.slow
def test_a_run_stops_between_two_rounds_inside(tmp_path: Path, clear: Result) -> None:
    with pytest.raises(Interrupted):
        compared(tmp_path, "out", secure=True, watcher=Stopping())
    assert not own(tmp_path / "out", "A").exists()
    result = compared(tmp_path, "out", secure=True)
    assert result.metrics["local"] == clear.metrics["local"]


def test_a_site_that_cannot_train_stops_the_run_and_says_why(tmp_path: Path) -> None:
    study = study_of(secure=True, task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"nan": "B"}})
    with pytest.raises(NotEnoughSites, match=r"local/B: .*the training loss of round 1 is not finite"):
        run(study, toy_sites(tmp_path, SITES), tmp_path / "out", compare=["local"], engine="local",
            overrides=["protection.honest_but_curious=true"])  # fmt: skip


def test_a_model_kept_inside_serves_its_site(tmp_path: Path) -> None:
    """`wardround reconstruct` takes it like any other."""
    result = compared(tmp_path, "out", secure=True)
    tensors, metadata = load_model(own(result.out, "A"))
    assert (metadata["arm"], metadata["format"]) == ("local/A", "wardround-model-1")
    host = Machine(study_of(secure=True), toy_sites(tmp_path / "data", SITES), result.out, ())
    serve(host.model_context.model, host.study, metadata, "A")
    assert tensors.keys() == host.model_context.initial.keys()


def test_the_start_is_the_sites_own(host: Machine, tmp_path: Path) -> None:
    """The request to train alone carries no model: the start is the site's own."""
    call = state_of(host, tmp_path, "local/A")
    assert isinstance(call.body, FileBody)
    header = replace(call.message("A").header, kind=ALONE, meta={})
    (reply,) = LocalEngine(host.find).exchange([Message(header, call.body)])
    assert reply.header.kind == ERROR
    assert "names a round and nothing else" in reply.header.meta["reason"]
