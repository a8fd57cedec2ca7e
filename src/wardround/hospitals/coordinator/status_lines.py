"""The status of a federation as lines of text: for terminals and logs."""

from __future__ import annotations

import time
from collections.abc import Iterator

from wardround.hospitals.coordinator.status import SiteStatus, Status, StudyStatus
from wardround.results.units import human_bytes, human_seconds

# How a site's state is said, and how a study's.
PRESENCE = {
    "present": "present",
    "late": "late: not heard for some seconds",
    "lost": "lost: its connection is gone",
    "never": "never connected",
}
STATES = {
    "asking": "waits for the hospitals' decisions",
    "running": "running",
    "stopped": "stopped",
    "refused": "refused",
    "withdrawn": "withdrawn",
    "finished": "finished",
}
_DAY = 86400.0
# Days before the end of a certificate from which on it is said.
WARNED = 30


def heading(status: Status, now: float) -> str:
    """The federation, and whether its coordinator is at work."""
    process = status.process
    if not status.alive(now):
        ended = "has ended" if process.state == "ended" else "does not answer any more"
        return f"Federation {status.federation}: the coordinator {ended} ({ago(process.at, now)})"
    page = f", page {process.page}" if process.page else ""
    since = human_seconds(max(0.0, now - process.began))
    return f"Federation {status.federation}: at work for {since} on {process.address} ({process.carrier}){page}"


def state_of(status: Status, study: StudyStatus, now: float) -> str:
    """A study's state in words. Where the coordinator is gone nothing runs, whatever its file says."""
    if study.state in ("asking", "running") and not status.alive(now):
        return f"not at work, for the coordinator is not (before: {STATES[study.state]}); it goes on with it"
    return STATES[study.state]


def ago(at: float, now: float) -> str:
    """`12.0 s ago`."""
    return f"{human_seconds(max(0.0, now - at))} ago"


def warnings(status: Status, now: float) -> Iterator[str]:
    """What to say of certificates that expire within `WARNED` days."""
    found = {"the coordinator": status.process.certificate_until}
    found |= {f"site {site.name}": site.certificate_until for site in status.sites}
    for whose, until in found.items():
        if until is not None and until <= now:
            yield f"The certificate of {whose} has expired, and no connection can be made with it: renew it"
        elif until is not None and until - now < WARNED * _DAY:
            yield f"The certificate of {whose} expires in {(until - now) / _DAY:.0f} days: renew it"


def site_row(site: SiteStatus, now: float) -> tuple[str, str, str, str]:
    """Name, state, when it was last heard, and how many messages wait for it."""
    seen = "–" if site.seen is None else ago(site.seen, now)
    return site.name, PRESENCE[site.state], seen, str(site.waiting) if site.waiting else "–"


def rounds_of(study: StudyStatus) -> str:
    """`3 of 10`, of the arm that is least far while several train."""
    if not study.rounds:
        return "–"
    return f"{next((arm.round for arm in study.arms if arm.name == 'federated'), 0)} of {study.rounds}"


def time_left(study: StudyStatus) -> float | None:
    """Seconds until the federation's last round, as fast as the last ones were; nothing where none is known."""
    done = next((arm.round for arm in study.arms if arm.name == "federated"), 0)
    if study.state != "running" or study.seconds_a_round is None or done >= study.rounds:
        return None
    return (study.rounds - done) * study.seconds_a_round


def validation_of(study: StudyStatus) -> str:
    """The federation's last validation, first metric: `psnr 31.2`."""
    for arm in study.arms:
        if arm.name == "federated":
            return next((f"{name} {value:.4g}" for name, value in arm.validation.items()), "–")
    return "–"


def details(study: StudyStatus) -> Iterator[str]:
    """What else there is to say of a study, a line each."""
    if study.reason:
        yield study.reason
    if study.state == "stopped" and study.waits_for:
        yield f"goes on by itself when {' or '.join(study.waits_for)} is back"
    for site, said in study.sites.items():
        if said.state != "approved" and study.state in ("asking", "refused", "stopped"):
            words = {"asked": "did not answer yet", "pending": "has not decided yet", "refused": "refused"}[said.state]
            yield f"{site} {words}" + (f": {said.reason}" if said.reason else "")
    if study.phase and study.phase != "training":
        yield study.phase
    for site, heard in study.working.items():
        yield f"{site}: {heard.arm}, round {heard.round}, step {heard.step} of {heard.steps}"
    for site, why in study.missing.items():
        yield f"the last round went on without {site}: {why}"
    for site, number in study.at_work.items():
        yield f"the last round did not wait for {site}, which was at work on round {number}"
    for site, left in study.left_out.items():
        if site not in study.missing:
            yield f"{site} was left out of {left.rounds} round{'s' if left.rounds > 1 else ''}"
    if (left_time := time_left(study)) is not None:
        yield f"about {human_seconds(left_time)} left"
    if study.bytes_up or study.bytes_down:
        yield f"traffic: {human_bytes(study.bytes_down)} to the sites, {human_bytes(study.bytes_up)} from them"
    if study.budget is not None:
        spent = ", ".join(f"{site} {epsilon:.3g}" for site, epsilon in study.epsilon.items())
        yield f"privacy: {f'spent epsilon {spent}' if spent else 'the sites say at the end what was spent'}" + (
            f" of {study.budget:g}"
        )
    if study.log_head:
        yield f"log: {study.log_records} records, head {study.log_head[:16]}"
    if study.undelivered and study.state == "finished":
        yield f"the released model waits for {', '.join(study.undelivered)}"


def lines(status: Status, name: str | None = None, now: float | None = None) -> Iterator[str]:
    """The whole status, or that of one study, as lines."""
    now = time.time() if now is None else now
    yield heading(status, now)
    yield from warnings(status, now)
    for site in status.sites:
        who, state, seen, waiting = site_row(site, now)
        heard = f", heard {seen}" if site.seen is not None else ""
        yield f"  site {who}: {state}{heard}" + (f", {waiting} messages wait" if site.waiting else "")
    for study in status.studies:
        if name in (None, study.name):
            how = state_of(status, study, now)
            yield f"  study {study.name}: {how}, round {rounds_of(study)}, {validation_of(study)}"
            yield from (f"    {line}" for line in details(study))
    if not status.studies:
        yield "  no study was submitted yet"
