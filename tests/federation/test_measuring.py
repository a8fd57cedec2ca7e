"""What a site measures for others: sums of one model, not of as many as a coordinator likes to compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.federation.rig import Rig
from tests.federation.test_inspection import planted
from tests.toys import toy_sites, toy_study
from wardround.errors import Interrupted
from wardround.federation.exchange import ERROR, EVALUATE, UPDATE
from wardround.runs.session import run
from wardround.runs.watching import Silent
from wardround.site.site import Site
from wardround.storage.journal import Journal, State
from wardround.storage.store import SiteStore
from wardround.wire.message import Message

SPLITS = ("validation", "test")


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    rig = Rig(toy_study(schedule={"rounds": 3}), tmp_path)
    rig.train()
    return rig


def other(rig: Rig, state: State) -> State:
    def nudge(tensors: dict[str, object]) -> None:
        tensors["model/2.bias"] = state.public["model/2.bias"] + 1e-4

    return planted(rig, state, nudge)


def ask(rig: Rig, state: State, split: str, number: int = 3, again: str = "") -> Message:
    layout = rig.arm_spec.metrics_layout if split == "validation" else rig.arm_spec.evaluation_layout
    call = rig.coordinator._call(EVALUATE, state, number, {"split": split, "again": again}, layout)
    return rig.sites["A"].handle(call.message("A"))


@pytest.mark.parametrize("split", SPLITS)
def test_a_second_model_is_not_measured(rig: Rig, split: str) -> None:
    state = rig.journal.state(3)
    assert ask(rig, state, split).header.kind == UPDATE
    refused = ask(rig, other(rig, state), split)
    assert refused.header.kind == ERROR
    assert f"{split} sums of one model" in refused.header.meta["reason"]
    assert ask(rig, state, split, again="once more").header.kind == UPDATE


@pytest.mark.parametrize("split", SPLITS)
def test_a_restarted_site_keeps_to_the_model_it_measured(rig: Rig, split: str, tmp_path: Path) -> None:
    state, site = rig.journal.state(3), rig.sites["A"]
    assert ask(rig, state, split).header.kind == UPDATE
    site.close()
    rig.sites["A"] = Site("A", site.rules, lambda: rig.learner("A"), SiteStore(tmp_path / "sites" / "A"))
    assert ask(rig, other(rig, state), split).header.kind == ERROR
    assert ask(rig, state, split, again="once more").header.kind == UPDATE


def test_another_round_does_not_buy_another_test(rig: Rig) -> None:
    assert ask(rig, rig.journal.state(3), "test").header.kind == UPDATE
    assert ask(rig, other(rig, rig.journal.state(3)), "test", number=2).header.kind == ERROR


def test_validations_are_no_more_than_rounds(rig: Rig) -> None:
    state = rig.journal.state(3)
    assert ask(rig, state, "validation").header.kind == UPDATE
    assert ask(rig, other(rig, state), "validation", number=2).header.kind == ERROR
    beyond = ask(rig, other(rig, state), "validation", number=4)
    assert "the study ends with round 3" in beyond.header.meta["reason"]


def test_a_body_that_is_not_what_was_signed_spends_nothing(rig: Rig) -> None:
    state = rig.journal.state(3)
    wrong = replace(state, public_sha256="0" * 64)
    assert ask(rig, wrong, "test").header.kind == ERROR
    assert ask(rig, state, "test").header.kind == UPDATE


class Stopping(Silent):
    """Ctrl-C after the first round."""

    def round(self, report: object) -> None:
        raise Interrupted("stop")


def test_a_run_leaves_no_database_open_however_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Journal | SiteStore] = []
    closed: list[Journal | SiteStore] = []
    for kind in (Journal, SiteStore):

        def begin(self: Journal | SiteStore, *args: object, _init: object = kind.__init__, **named: object) -> None:
            _init(self, *args, **named)  # type: ignore[operator]
            opened.append(self)

        def end(self: Journal | SiteStore, _close: object = kind.close) -> None:
            closed.append(self)
            _close(self)  # type: ignore[operator]

        monkeypatch.setattr(kind, "__init__", begin)
        monkeypatch.setattr(kind, "close", end)
    study, sites = toy_study(schedule={"rounds": 2}), toy_sites(tmp_path)
    with pytest.raises(Interrupted):
        run(study, sites, tmp_path / "out", engine="local", watcher=Stopping())
    assert len(opened) > 1
    assert {id(o) for o in opened} == {id(c) for c in closed}
    run(study, sites, tmp_path / "out", engine="local")
    assert {id(o) for o in opened} == {id(c) for c in closed}
