"""A federation to look at: three made-up hospitals and their coordinator on one machine, from invitation to result.

The parties are processes with folders of their own and speak as across institutions: certificates on both
sides, approvals that are signed, a secure sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import yaml

from wardround.errors import WardroundError
from wardround.hospitals.coordinator.status import StudyStatus, read_status
from wardround.hospitals.coordinator.submission import submit
from wardround.hospitals.federation import Carrier
from wardround.hospitals.rehearsal import Rehearsal, rehearse
from wardround.hospitals.site.decisions import Decisions, Proposed
from wardround.hospitals.site.review import refuse_obstacles, review
from wardround.imaging.phantoms import DEMO_SITES
from wardround.results.files import read_result
from wardround.results.schema import Result
from wardround.runs.demo import Demo, demo_study
from wardround.runs.watching import Phase
from wardround.study.hashes import written
from wardround.wire.files import write_text

# Half of the patients test: one more than the 11 below which a site lets no result out.
FEDERATION = Demo("federation", DEMO_SITES[:3], train=24, unseen=0, slices=2, compare=("local",))
STUDY, REVIEW = "study.yaml", "review.txt"
_COHORT = 11


def federation_demo(
    out: Path,
    carrier: Carrier,
    say: Callable[[str], None],
    *,
    overrides: Sequence[str] = (),
    page: str | None = None,
    phase: Phase = lambda *_: None,
) -> Result:
    """Stand up the federation in `out`, run the embedded study in it, and end its processes; the study's result.

    What happens is given to `say`, a line each. Raises `WardroundError` where a process ends, or `out` holds another
    federation already.
    """
    study, sites = demo_study(out / "data", overrides, demo=FEDERATION, phase=phase)
    write_text(out / STUDY, yaml.safe_dump(written(study), sort_keys=False))
    entries = {
        name: {"data": [str(path) for path in site.data], "egress": {"minimum_cohort": _COHORT}}
        for name, site in sites.sites.items()
    }
    federation = rehearse(out, carrier, entries)
    say(f"A coordinator and {len(entries)} hospitals have a folder each in {out}, with certificates and keys.")
    try:
        federation.start(more=() if page is None else ("--page", page))
        say("Their processes have started; the hospitals open no port.")
        return _study(federation, out, say)
    finally:
        federation.stop()


def _study(federation: Rehearsal, out: Path, say: Callable[[str], None]) -> Result:
    name, _ = submit(federation.coordinator, out / STUDY, compare=FEDERATION.compare)
    say(f"The study {name} is submitted; the coordinator proposes it to each hospital.")
    for site, folder in federation.sites.items():
        decisions = Decisions(folder)
        found = federation.wait_for(partial(_proposed, decisions), 120.0, f"a proposal to {site}")
        seen = review(decisions, found)
        write_text(folder.root / REVIEW, seen.text + "\n")
        refuse_obstacles(seen)
        decisions.mark_reviewed(found)
        decisions.decide(found, "approved")
        say(f"{site} has read what the study would do there ({folder.root / REVIEW}), and approves.")
    shown: set[tuple[str, int]] = set()

    def done() -> StudyStatus | None:
        found = _status(federation, name)
        if found is None:
            return None
        key = found.state, max((arm.round for arm in found.arms if arm.name == "federated"), default=0)
        if key not in shown:
            shown.add(key)
            say(f"{found.state}: round {key[1]} of {found.rounds}" if key[1] else found.state)
        if found.state in ("stopped", "refused", "withdrawn"):
            raise WardroundError(f"the study {name} is {found.state}: {found.reason}")
        # Each hospital writes its own page when it gets the released model.
        return found if found.state == "finished" and not found.undelivered else None

    federation.wait_for(done, 1800.0, "the end of the study")
    site = next(iter(federation.sites))
    for path in federation.sites[site].studies.glob("*/own/report.html"):
        say(f"{site}'s own page, with pictures of its patients, which no other party has: {path}")
    return read_result(federation.coordinator.studies / name / "out")


def _proposed(decisions: Decisions) -> Proposed | None:
    return next(iter(decisions.all()), None)


def _status(federation: Rehearsal, name: str) -> StudyStatus | None:
    with suppress(OSError):
        status = read_status(federation.coordinator.status)
        return None if status is None else status.study(name)
    return None
