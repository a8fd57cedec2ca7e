"""A hospital installs another version in the middle of a study: stores open, and its approval counts no more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import wardround
from tests.hospitals.joined import Consortium, resident
from tests.toys import toy_sites, toy_study
from wardround.errors import Interrupted, NotEnoughSites, StudyError
from wardround.federation.exchange import TRAIN
from wardround.federation.facts import parsed
from wardround.hospitals.coordinator import proposing
from wardround.hospitals.proposal import Standing
from wardround.hospitals.site import agent, approval
from wardround.hospitals.site.agent import Resident
from wardround.hospitals.site.decisions import Decisions
from wardround.runs.conduct import coordinate
from wardround.runs.session import run
from wardround.study.hashes import study_sha256
from wardround.version import __version__
from wardround.wire.message import Message

ROUNDS, STOPPED_IN = 4, 3
SITES = ("A", "B")
STUDY = toy_study(SITES, schedule={"rounds": ROUNDS})
NEWER = "99.1.0"


class Lines:
    """An engine whose sites are residents of this process; it ends when it is asked for a round."""

    def __init__(self, consortium: Consortium, residents: dict[str, Resident], ends: int | None = None) -> None:
        self._consortium, self._residents, self._ends = consortium, residents, ends
        self.asked: list[tuple[str, int]] = []

    def exchange(self, messages: Any) -> Iterator[Message]:
        for message in messages:
            header = message.header
            if header.kind == TRAIN:
                if header.round == self._ends:
                    raise Interrupted("the coordinator is stopped")
                self.asked.append((header.site, header.round))
            yield self._consortium.said(header.site, self._residents[header.site].handle(message))

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.slow
def test_after_an_upgrade_a_study_goes_on_once_it_is_approved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    consortium, sha256 = Consortium(tmp_path, SITES), study_sha256(STUDY)
    residents = {name: resident(consortium.of(name)) for name in SITES}
    for name, each in residents.items():
        each.handle(consortium.propose(name, STUDY))
        consortium.approve(name, sha256)
    with pytest.raises(Interrupted), closing(Lines(consortium, residents, STOPPED_IN)) as engine:
        coordinate(STUDY, tmp_path / "out", engine, quiet=True, allow_code=True)
    for each in residents.values():
        each._workers.halt()

    _install(NEWER, tmp_path / "newer", monkeypatch)
    residents = {name: resident(consortium.of(name)) for name in SITES}
    for name, each in residents.items():
        standing = parsed(Standing, each.handle(consortium.propose(name, STUDY)).header.meta)
        assert standing.state == "pending"
        assert f"Wardround {__version__} was installed here, and now {NEWER} is" in standing.reason
        assert "Review the study and decide again" in standing.reason
    with pytest.raises(NotEnoughSites, match="no longer counts"), closing(Lines(consortium, residents)) as engine:
        coordinate(STUDY, tmp_path / "out", engine, quiet=True, allow_code=True)
    # The round is asked for, and no site begins a worker for it.
    assert {number for _, number in engine.asked} == {STOPPED_IN}
    assert not any(each._workers.at_work() for each in residents.values())

    for name in residents:
        decisions = Decisions(consortium.of(name))
        found = decisions.find(sha256[:12])
        with pytest.raises(StudyError, match="review"):
            decisions.check_reviewed(found)
        decisions.mark_reviewed(found)
        decisions.check_reviewed(found)
        assert decisions.decide(found, "approved").package == NEWER
    with closing(Lines(consortium, residents)) as engine:
        result = coordinate(STUDY, tmp_path / "out", engine, quiet=True, allow_code=True)
    for each in residents.values():
        each._workers.halt()
    assert {number for _, number in engine.asked} == set(range(STOPPED_IN, ROUNDS + 1))
    alone = run(STUDY, toy_sites(tmp_path / "data", SITES), tmp_path / "alone", engine="local", quiet=True)
    assert result.values["model_sha256"] == alone.values["model_sha256"]


def _install(version: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process, and the processes that it starts, have this package in another version."""
    package, copy = Path(wardround.__file__).parent, folder / "wardround"
    copy.mkdir(parents=True)
    for entry in package.iterdir():
        if entry.name not in ("version.py", "__pycache__"):
            (copy / entry.name).symlink_to(entry)
    (copy / "version.py").write_text(f'__version__ = "{version}"\n', encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    for module in (agent, approval, proposing):
        monkeypatch.setattr(module, "__version__", version)
