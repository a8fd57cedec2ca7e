"""The ledger of a private run that is killed: every step charged once, before anything of it is released."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.killed import ARMS, ROUNDS, SITES, Undisturbed, Whole, charged, released, site_folder, with_secrets

# Two whole private runs come first.
pytestmark = pytest.mark.slow


@pytest.fixture
def whole(undisturbed: Undisturbed) -> Whole:
    """An uninterrupted private run."""
    return undisturbed["private"]


def test_every_release_of_a_whole_run_was_charged(whole: Whole, undisturbed: Undisturbed) -> None:
    out = undisturbed.folder("private")
    for site in SITES:
        assert {(arm, number) for arm in ARMS[site] for number in range(1, ROUNDS + 1)} == released(out, site)
        assert len(whole.facts["ledgers"][site]) == ROUNDS * len(ARMS[site])
    assert 0.9 * 8.0 < whole.facts["privacy"]["epsilon"] <= 8.0


def charging(whole: Whole) -> range:
    """The acts of the first charge, from before it to after it."""
    first, last = whole.heard.index("before spend") + 1, whole.heard.index("after spend") + 1
    assert "after fsync" in whole.heard[first:last]
    assert "before commit" in whole.heard[first:last]
    return range(first, last + 1)


def test_killed_between_the_ledgers_line_and_its_anchor(whole: Whole, tmp_path: Path) -> None:
    acts = charging(whole)
    fatal = whole.heard.index("after fsync", acts.start) + 1
    assert fatal in acts
    whole.killed(tmp_path / "out", fatal)
    whole.resume(tmp_path / "out")


@pytest.mark.slow
def test_killed_around_every_write_of_a_charge(whole: Whole, tmp_path: Path) -> None:
    """Between the ledger's line and its anchor, and between the anchor and the first gradient."""
    for fatal in charging(whole):
        out = tmp_path / f"killed-at-{fatal}"
        whole.killed(out, fatal)
        whole.resume(out)


@pytest.mark.slow
def test_a_ledger_that_is_not_the_newest_stops_its_site(whole: Whole, tmp_path: Path) -> None:
    """Nothing is trained without it; with the newest copy back the run ends as if nothing had been."""
    out = tmp_path / "out"
    # In the middle of the training: every site has paid before, and has to pay again.
    charges = [act for act, what in enumerate(whole.heard, 1) if what == "before spend"]
    whole.killed(out, charges[len(charges) // 2])
    path = site_folder(out, "B") / "ledger.jsonl"
    newest, before = path.read_bytes(), released(out, "B")
    lines = newest.splitlines(keepends=True)
    assert len(lines) >= 2
    edited = newest.replace(b'"steps": 2', b'"steps": 1', 1)
    for spoiled in (None, lines[0], newest[:-5], edited):
        path.unlink() if spoiled is None else path.write_bytes(spoiled)
        said = whole.server.run(out, **whole.case.job)
        assert said["error"] == "NotEnoughSites", said
        assert "does not train with privacy" in said["text"]
        assert released(out, "B") == before
    path.write_bytes(newest)
    whole.resume(out)


def test_another_secret_is_another_model_and_as_many_charges(whole: Whole, tmp_path: Path) -> None:
    out = with_secrets(tmp_path / "out", first=100)
    assert whole.server.run(out, **whole.case.job)["model_sha256"] != whole.said["model_sha256"]
    for site in SITES:
        inputs = {entry.inputs for entry in charged(out, site)}
        assert len(inputs) == len(whole.facts["ledgers"][site])
        assert not inputs & set(whole.facts["ledgers"][site])
