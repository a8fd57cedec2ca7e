"""The chain of releases: what is in it stays, and what is broken is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from wardround.errors import JournalError, StudyError
from wardround.federation.release import model_path
from wardround.living.chain import Chain
from wardround.living.release import Release
from wardround.plan.weights import FORMAT, model_sha256
from wardround.results.files import write_result
from wardround.results.schema import Gate, Result, Seconds, Traffic
from wardround.runs.releases import number_in_chain

ONE, TWO, THREE = "first", "second", "third"


def finished(
    folder: Path, value: float, parent: str | None = None, sites: tuple[str, ...] = ("A", "B"), promoted: bool = True
) -> Release:
    """The folder of a run that released a model of one value."""
    tensors = {"w": np.full(3, value, np.float32)}
    start = "" if parent is None else f', "start": {{"kind": "release", "file": "p", "sha256": "{parent}"}}'
    study = f'{{"name": "made", "sites": {{"A": {{}}, "B": {{}}, "C": {{}}}}{start}}}'
    metadata = {"format": FORMAT, "study": study, "shared": "w", "study_sha256": "s" * 64}
    path = model_path(folder, "federated")
    path.parent.mkdir(parents=True)
    save_file(tensors, path, metadata)
    empty: dict[str, Any] = {
        key: {}
        for key in (
            "gains",
            "left_out",
            "withheld",
            "failed",
            "local_sha256",
            "scanners",
            "patients",
            "steps",
            "examples",
        )
    }
    gate = (
        None if parent is None else Gate(promoted=promoted, sites={}, reason="all well" if promoted else "B is worse")
    )
    write_result(
        folder,
        Result(
            **empty,
            metric_specs=(),
            metrics={"federated": {"A": {"dice": {"value": value, "n": 9}}, "mean": None}},
            gate=gate,
            study="made",
            study_sha256="s" * 64,
            plan_sha256="p" * 64,
            model_sha256=model_sha256(tensors, metadata),
            rounds=1,
            participants=sites,
            compare=(),
            traffic=Traffic(bytes_up=0, bytes_down=0),
            seconds=Seconds(total=0, training=0, overhead=0),
            privacy=None,
            selected_round={},
            fingerprint={},
            notes=(),
        ),
    )
    return Release.at(folder)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Chain, list[Release]]:
    """A release, one that came of it, one that was refused."""
    one = finished(tmp_path / ONE, 1.0, sites=("A",))
    two = finished(tmp_path / TWO, 2.0, one.sha256)
    three = finished(tmp_path / THREE, 3.0, two.sha256, promoted=False)
    chain = Chain(tmp_path / "chain")
    for release in (one, two, three):
        chain.add(release)
    return chain, [one, two, three]


def test_what_came_of_what_and_what_is_in_use(made: tuple[Chain, list[Release]]) -> None:
    chain, (one, two, three) = made
    entries = chain.check()
    assert [(entry.number, entry.kind, entry.release) for entry in entries] == [
        (1, "released", one.sha256),
        (2, "released", two.sha256),
        (3, "refused", three.sha256),
    ]
    assert [entry.parent for entry in entries] == [None, one.sha256, two.sha256]
    assert entries[1].metrics == {"A": {"dice": 2.0}}
    assert entries[2].reason == "B is worse"
    assert [entry.release for entry in chain.ancestry(entries[2])] == [three.sha256, two.sha256, one.sha256]
    current = chain.current()
    assert current is not None
    assert current.release == two.sha256
    assert chain.add(two) == entries[1], "what is in it is not added again"
    assert number_in_chain(chain.model(entries[1]), two.sha256) == 2
    assert number_in_chain(two.model, two.sha256) is None
    # B trained the second release, A both, C none.
    without = {site: chain.last_without(site) for site in "ABC"}
    assert without == {"A": None, "B": entries[0], "C": entries[1]}


def test_a_way_back_deletes_nothing(made: tuple[Chain, list[Release]]) -> None:
    chain, (one, two, three) = made
    back = chain.rollback(one.sha256[:8], "a reason")
    assert (back.number, back.kind, back.parent, back.reason) == (4, "rollback", two.sha256, "a reason")
    current = chain.current()
    assert current is not None
    assert current.release == one.sha256
    assert len(chain.check()) == 4
    assert chain.model(current).read_bytes() == one.model.read_bytes()
    with pytest.raises(StudyError, match="is in use already"):
        chain.rollback("1")
    with pytest.raises(StudyError, match="was refused at the gate"):
        chain.rollback(three.sha256)
    assert chain.rollback("2").number == 5
    with pytest.raises(StudyError, match="no release called '9'"):
        chain.find("9")


def test_what_does_not_belong_is_refused(made: tuple[Chain, list[Release]], tmp_path: Path) -> None:
    chain, (one, *_) = made
    with pytest.raises(StudyError, match="came of ffffffffffff, which the chain does not have"):
        chain.add(finished(tmp_path / "stranger", 9.0, "f" * 64))
    shutil.copy(one.model, tmp_path / "alone.safetensors")
    with pytest.raises(StudyError, match="give the folder of the run, not the model's file"):
        Chain(tmp_path / "empty").add(Release.at(tmp_path / "alone.safetensors"))
    assert not (tmp_path / "empty").exists()


def _edit(chain: Chain) -> None:
    path = chain.folder / "log.jsonl"
    path.write_bytes(path.read_bytes().replace(b"B is worse", b"B is bette"))


def _cut(chain: Chain) -> None:
    path = chain.folder / "log.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def _drop(chain: Chain) -> None:
    path = chain.folder / "log.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1] + lines[3:]))


def _lose(chain: Chain) -> None:
    next((chain.folder / "models").iterdir()).unlink()


def _change(chain: Chain) -> None:
    for path in (chain.folder / "models").iterdir():
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[:-1] + b"\1")


def _resign(chain: Chain) -> None:
    (chain.folder / "chain.key").write_text("11" * 32)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_edit, "was edited"),
        (_cut, "its last entry is not signed"),
        (_drop, "are missing before line 2"),
        (_lose, "is gone"),
        (_change, "was changed"),
        (_resign, "its key is another than the one that began it"),
    ],
)
def test_a_broken_chain_is_one_clear_error(
    made: tuple[Chain, list[Release]], harm: Callable[[Chain], None], reason: str
) -> None:
    chain, _ = made
    harm(chain)
    with pytest.raises(JournalError, match=f"the chain of releases is broken: .*{reason}"):
        _ = Chain(chain.folder).check(), Chain(chain.folder).rollback("1")
