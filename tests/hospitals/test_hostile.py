"""What a coordinator that turned hostile, or a stranger, tries: each of these did harm before it was mended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.hospitals.hubs import Asking, message
from tests.hospitals.joined import Consortium, resident
from tests.toys import toy_study
from wardround.cli import app
from wardround.errors import Rejected, StudyError
from wardround.federation.facts import FACTS
from wardround.hospitals.coordinator.hub import Hub
from wardround.hospitals.federation import Deadlines
from wardround.hospitals.proposal import start_of
from wardround.hospitals.signing import new_instance
from wardround.hospitals.site import approval
from wardround.hospitals.site.decisions import Decisions, Proposed
from wardround.hospitals.site.workers import Workers
from wardround.printable import printable
from wardround.protection.identity import Identity
from wardround.study.hashes import study_sha256
from wardround.study.load import load_study
from wardround.wire.message import Header, Message

STUDY = toy_study()


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path)


def test_a_description_does_not_hide_lines_of_its_review(consortium: Consortium) -> None:
    """Escape sequences and marks that turn text round: what a person approves is what they read."""
    hostile = toy_study(description="fine\x1b[8m\x9b2J\u202e\u2028  protected    wholly")
    resident(consortium.of("A")).handle(consortium.propose("A", hostile))
    command = ["site", "review", study_sha256(hostile)[:12], "--folder", str(consortium.of("A").root)]
    said = CliRunner().invoke(app, command, catch_exceptions=False).output
    assert "about        fine\ufffd[8m" in said
    assert not set(said) & set("\x1b\x9b\u202e\u2028")


def test_text_is_shown_as_it_is_where_it_is_plain() -> None:
    assert printable("Klinik Süd: 3 Ω\n\tµ → “so”\u00a0一") == "Klinik Süd: 3 Ω\n\tµ → “so”\u00a0一"
    assert printable("a\rb\x07\ud800\x1b]0;x\x07") == "a b\ufffd\ufffd\ufffd]0;x\ufffd"


def test_a_name_that_looks_like_a_hash_takes_no_others_place(consortium: Consortium) -> None:
    """Who refuses a study by its hash must not refuse another that was given this hash for a name."""
    each, sha256 = resident(consortium.of("A")), study_sha256(STUDY)
    each.handle(consortium.propose("A", STUDY))
    each.handle(consortium.propose("A", toy_study(name=sha256[:12], seed=7)))
    each.handle(consortium.propose("A", toy_study(name=sha256, seed=8)))
    decisions = Decisions(consortium.of("A"))
    with pytest.raises(StudyError, match=f"2 studies .*{sha256}"):
        decisions.find(sha256[:12])
    assert decisions.find(sha256).sha256 == sha256


def test_a_proposal_that_came_meanwhile_is_not_run_by_the_approval_of_another(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The approved proposal is swapped for another as soon as it was looked at, and put back before the next look."""
    each, sha256 = resident(consortium.of("A")), study_sha256(STUDY)
    each.handle(consortium.propose("A", STUDY))
    consortium.approve("A", sha256)
    ours = each.decisions.get(sha256)
    each.decisions.propose(consortium.propose("A", STUDY, ("local",)))
    theirs = each.decisions.get(sha256)
    assert ours != theirs
    looks = 0

    def swapped(self: Decisions, asked: str) -> Proposed | None:
        nonlocal looks
        looks += 1
        return theirs if looks > 2 and looks % 2 else ours

    given: list[Any] = []

    def ask(self: Workers, study: str, stamp: Any, spec: Callable[[], Path], message: Message, progress: Any) -> Any:
        given.append(json.loads(spec().read_text())["studies"][0]["compare"])
        return message.reply("done")

    monkeypatch.setattr(Workers, "ask", ask)
    monkeypatch.setattr(Decisions, "get", swapped)
    assert each.handle(Message(Header(FACTS, sha256, "A"))).header.kind == "done"
    assert given == [[]]


def test_a_study_that_names_a_thousand_plug_ins_keeps_nobody_waiting(
    consortium: Consortium, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that looks at the kill switch also says how it stands to each study."""
    looks: list[Any] = []
    points = approval.entry_points

    def counted(**about: Any) -> Any:
        looks.append(about)
        return points(**about)

    monkeypatch.setattr(approval, "entry_points", counted)
    approval._versions.cache_clear()
    study = STUDY.model_copy(update={"task": named([f"plug{n}" for n in range(1000)])})
    assert len(approval.installed_code(study)) == 1000
    assert len(looks) <= 4


def named(baselines: list[str]) -> Any:
    class Section:
        kind = "reconstruction"

        def model_dump(self, mode: str) -> dict[str, Any]:
            return {"kind": self.kind, "evaluation": {"baselines": baselines}}

    return Section()


def test_an_adapter_needs_its_hash_too() -> None:
    """Else the reply of a site would say the hash of a file that the coordinator named."""
    weights = {"kind": "weights", "file": "w.safetensors", "sha256": "a" * 64}
    study = load_study({"name": "a", "sites": {"A": {}}, "start": {**weights, "adapter": {"file": "x"}}})
    with pytest.raises(StudyError, match=r"start\.adapter\.sha256: is missing"):
        start_of(study)


def test_a_stolen_kit_hears_nothing_without_the_sites_key(tmp_path: Path) -> None:
    """A kit came by mail: who copied it has the certificate, and must neither get messages nor keep the site out."""
    key, other = Identity.generate(), Identity.generate()
    hub = Hub(tmp_path, lambda site: key.public if site == "A" else None, Deadlines(), 1000)
    asking = Asking(hub.engine(), [message("A")])
    for stolen in ("thief", new_instance("A", other), new_instance("B", key)):
        with pytest.raises(Rejected, match="not its identity key"):
            hub.attach("A", stolen)
        with pytest.raises(Rejected, match="not its identity key"):
            hub.take("A", stolen, 0.0)
    own = new_instance("A", key)
    hub.attach("A", own)
    assert hub.take("A", own, 0.0) is not None
    assert [event.text for event in hub.events] == [
        "a process that does not hold the site's key was refused, with its certificate"
    ]
    hub.close()
    asking.done()
