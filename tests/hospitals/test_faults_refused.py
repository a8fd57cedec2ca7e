"""What a federation of real processes refuses, and what stops it and lets it go on: no wrong model comes of any."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.hospitals.ward import COORDINATOR, ROUNDS, SECURE, Ward, same_model, ward
from wardround.hospitals.certificates import issue, make_authority
from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.https.protocol import RESERVE
from wardround.hospitals.keys import make_key
from wardround.hospitals.membership.overview import overview
from wardround.hospitals.site.control import resume, status_of, stop_all_work
from wardround.hospitals.site.decisions import Decisions, Proposed
from wardround.hospitals.site.review import review

# Minutes of whole federations whose processes are killed: `make test-faults`.
pytestmark = pytest.mark.processes

ALL: dict[str, Any] = {"schedule": {"rounds": ROUNDS, "min_sites": 3}}


def carrier_says(folder: SiteFolder, text: str) -> bool:
    """Whether a site's process says of its connection what is expected."""
    return text in str(status_of(folder).get("carrier_state", ""))


@pytest.mark.slow
def test_a_certificate_that_expired_or_is_of_another_federation(tmp_path: Path) -> None:
    with ward(tmp_path) as made:
        site = made.federation.sites["C"]
        good, other = tmp_path / "good", tmp_path / "other"
        shutil.copytree(site.certificates, good)
        issue(made.federation.coordinator.authority, site.certificates, "C", days=0)
        made.federation.start()
        made.submit()
        made.approve("A", "B")
        made.wait(lambda: carrier_says(site, "expired"), "a certificate that expired")
        # One of an authority with the same name.
        make_authority(other, "rehearsal")
        issue(other, site.certificates, "C")
        made.wait(lambda: carrier_says(site, "of another federation"), "a certificate of another federation")
        # It trusts the right authority, and its own certificate is of the other: now the coordinator refuses.
        shutil.copy(good / "ca.crt", site.certificates / "ca.crt")
        made.wait(lambda: carrier_says(site, "another federation"), "a certificate of another federation")
        shutil.copytree(good, site.certificates, dirs_exist_ok=True)
        made.approve("C")
        same_model(made, made.finish())


@pytest.mark.slow
@pytest.mark.parametrize("rules", [{}, SECURE], ids=["clear", "secure"])
def test_the_copy_of_a_site_s_folder_is_not_let_in_beside_it(tmp_path: Path, rules: Any) -> None:
    with ward(tmp_path, **{**ALL, **rules}) as made:
        made.begin()
        made.wait_round(1)
        twin = SiteFolder(tmp_path / "twin")
        # Without what is being written meanwhile.
        at_work = shutil.ignore_patterns("*.sock", "own", "spool")
        shutil.copytree(made.federation.sites["A"].root, twin.root, ignore=at_work)
        twin.status.unlink()
        commands = made.federation.commands["A"]
        made.federation.sites = {**made.federation.sites, "twin": twin}
        made.federation.commands = {**made.federation.commands, "twin": [*commands[:-1], str(twin.root)]}
        made.federation.start("twin")
        made.wait(lambda: carrier_says(twin, "runs on two computers"), "a twin that is refused")
        result = made.finish()
        # What the hub noted is told at the service's next look.
        made.wait(lambda: made.said("site A: a second process of the site was refused"), "the note of a twin")
        assert status_of(twin)["answered"] == 0
        del made.federation.sites["twin"]
        same_model(made, result)


@pytest.mark.slow
def test_the_same_kit_with_another_key_answers_nothing(tmp_path: Path) -> None:
    with ward(tmp_path, **ALL) as made:
        made.begin()
        made.wait_round(2)
        made.kill("A")
        site = made.federation.sites["A"]
        own = tmp_path / "own.key"
        site.identity.rename(own)
        make_key(site.identity)
        made.federation.start("A")
        made.wait(lambda: made.said("site A: a process that does not hold the site's key"), "a process refused")
        rounds = len(made.rounds())
        made.kill("A")
        assert rounds < ROUNDS
        os.replace(own, site.identity)
        made.federation.start("A")
        same_model(made, made.finish())


@pytest.mark.slow
def test_a_study_with_code_does_not_run_where_no_code_is_allowed(tmp_path: Path) -> None:
    with ward(tmp_path, plain=["C"], deadlines={"reply": 120.0, "attempts": 1, "pause": 0.1}, **ALL) as made:
        made.federation.start()
        made.submit()
        made.approve("A", "B")
        decisions = Decisions(made.federation.sites["C"])
        found: Proposed = made.wait(lambda: next(iter(decisions.all()), None), "a proposal to C")
        seen = review(decisions, found)
        assert "code by its place, and no hospital runs such" in seen.text
        assert seen.obstacles
        # Even where someone signs it none the less, nothing of it runs.
        decisions.decide(found, "approved")

        def stopped() -> str:
            status = made.status()
            return status.reason if status is not None and status.state == "stopped" else ""

        reason = made.wait(stopped, "a study that stops")
        assert "C" in reason
        assert "tests.toys:make_task" in reason
        assert not made.rounds()


@pytest.mark.slow
@pytest.mark.parametrize("rules", [{}, SECURE], ids=["clear", "secure"])
def test_a_hospital_stops_all_work_in_a_round_and_lets_it_go_on(tmp_path: Path, rules: Any) -> None:
    with ward(tmp_path, holds=["A"], **{**ALL, **rules}) as made:
        site = made.federation.sites["A"]
        made.begin()
        made.wait_round(1)
        made.hold.touch()
        made.holding()
        before = len(made.rounds())
        assert stop_all_work(site, "a test")
        made.hold.unlink()
        made.wait(lambda: not made.children("A"), "the end of A's worker")
        made.wait(lambda: status_of(site)["state"] == "stopped", "the site says so")
        assert len(made.rounds()) == before
        # Also a process that is started again does not begin.
        made.kill("A")
        made.federation.start("A")
        made.federation.processes.pop("A").wait(60.0)
        assert "was stopped" in made.federation.log("A").read_text()
        assert resume(site)
        made.federation.start("A")
        same_model(made, made.finish())


@pytest.mark.slow
def test_no_study_runs_for_ever_in_the_status_of_a_dead_coordinator(tmp_path: Path) -> None:
    with ward(tmp_path) as made:
        made.begin()
        made.wait_round(1)
        root, now = made.federation.coordinator.root, partial(datetime.now, UTC)
        assert overview(root, now()).studies == ("toy: running",)
        made.kill(COORDINATOR)
        seen = overview(root, now())
        assert "not running" in seen.service
        assert seen.studies == ("toy: not at work, for the service is not running (before: running)",)
        made.federation.start(COORDINATOR)
        same_model(made, made.finish())
        assert overview(root, now()).studies == ("toy: finished",)


#: MB of a small disk: room to work beside what the carrier keeps free.
ROOM = RESERVE // 1_000_000 + 24


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Callable[[int], None]]:
    """Put a folder on a disk of its own. What is yielded fills it but for some bytes; a negative number empties it."""
    kept = folder.with_name(f"{folder.name}-kept")
    folder.rename(kept)
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "wardround-test", str(folder)],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        folder.rmdir()
        kept.rename(folder)
        pytest.skip("no disk of a test's own can be mounted here: this needs root")
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    filler = folder / "filler"

    def leave(nbytes: int) -> None:
        filler.unlink(missing_ok=True)
        if nbytes >= 0:
            free = shutil.disk_usage(folder).free
            # Others write meanwhile: it may be full before.
            with suppress(OSError):
                filler.write_bytes(bytes(max(0, free - nbytes)))

    try:
        yield leave
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk of a test's own needs root")
@pytest.mark.parametrize("left", [0, 9000])
@pytest.mark.parametrize("party", ["A", COORDINATOR])
def test_a_disk_is_full_and_has_room_again(tmp_path: Path, party: str, left: int) -> None:
    with ward(tmp_path, holds=["A"], **ALL) as made, small_disk(tmp_path / party, ROOM) as leave:
        made.begin()
        made.wait_round(2)
        made.hold.touch()
        made.holding()
        log = made.federation.log("A")
        leave(left)
        made.hold.unlink()
        before = made.wait(lambda: _stands_still(made), "a study that stands still")
        # Both say what is in the way, and go on by themselves.
        made.wait(lambda: b"on the disk" in log.read_bytes(), "what is in the way")
        leave(-1)
        assert before < ROUNDS
        same_model(made, made.finish())
        assert not list((tmp_path / party).rglob("*.draft"))


def _stands_still(made: Ward) -> int:
    """The rounds there are, once a few seconds brought no other."""
    count = len(made.rounds())
    time.sleep(3.0)
    return count if len(made.rounds()) == count else 0
