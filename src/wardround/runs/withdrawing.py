"""Patients who withdraw from the runs of one machine: opens each run as it was begun, for one of its sites."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from wardround.errors import StudyError
from wardround.plan.arms import POOLED
from wardround.runs.folder import near_in
from wardround.runs.machine import Machine
from wardround.runs.session import open_host
from wardround.site.agent import Agent
from wardround.site.datasets import history_of
from wardround.site.withdrawing import Withdrew, withdraw
from wardround.study.load import load_study
from wardround.study.sites import SitesFile


def withdraw_from_runs(site: str, names: Sequence[str], sites: SitesFile, outs: Sequence[Path]) -> Withdrew:
    """Take patients out of what a site keeps, and of the runs in some folders; see `site.withdrawing.withdraw`.

    Raises `StudyError` for a folder that holds no run, or none in which the site takes part, before anything changes.
    """
    hosts = [_opened(site, sites, out) for out in outs]
    try:
        found = [history_of(sites, host.out, site) for host in hosts] or [sites.of(site).history]
        histories = tuple(dict.fromkeys(history for history in found if history is not None))
        runs: list[tuple[Path, Agent]] = [(host.out, host.agent(site)) for host in hosts]
        return withdraw(site, names, sites.of(site), histories, runs)
    finally:
        for host in hosts:
            host.close()


def _opened(site: str, sites: SitesFile, out: Path) -> Machine:
    study = out / "study.yaml"
    if not study.is_file():
        raise StudyError("--out: the folder holds no run", detail=str(out))
    if site not in load_study(study).sites:
        raise StudyError(f"--out: site {site} has no part in the run of this folder", detail=str(out))
    return open_host(study, sites, out, compared(out), (), None, near=near_in(out))


def compared(out: Path) -> tuple[str, ...]:
    """What the run in a folder is compared with, by the arms that it asked for."""
    path = out / "work" / "compare.json"
    arms = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    local = any(str(arm).startswith("local/") for arm in arms)
    return (*(("local",) if local else ()), *((POOLED,) if POOLED in arms else ()))
