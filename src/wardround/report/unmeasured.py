"""Why a site's numbers are not in a run: its own rules keep them, or something went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wardround.report.results import Run

WITHHELD = "withheld by the site"
FAILED = "could not be measured"


@dataclass(frozen=True)
class Unmeasured:
    """What to say in place of numbers, and the reason."""

    text: str
    reason: str


def unmeasured(run: Run, arm: str, site: str) -> Unmeasured | None:
    """Why an arm has no numbers at a site; None where it has them, or nobody knows of a reason."""
    if reason := run.withheld(arm, site):
        return Unmeasured(WITHHELD, reason)
    failed = run.result.get("failed")
    known = failed.get(site) if isinstance(failed, Mapping) else None
    if known is None or any(run.estimate(arm, site, metric.name) for metric in run.metrics):
        return None
    return Unmeasured(FAILED, str(known))
