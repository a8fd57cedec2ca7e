"""Patients who withdraw at a hospital of a federation: from its records, and from every study that ran here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wardround.hospitals.folders import SiteFolder
from wardround.hospitals.membership.site_file import sites_at
from wardround.hospitals.site.decisions import Decisions
from wardround.site.agent import Agent
from wardround.site.agreed import AgreedStudy, spec_of
from wardround.site.process import agents_of
from wardround.site.withdrawing import Withdrew, withdraw
from wardround.version import __version__


def withdraw_here(folder: SiteFolder, names: Sequence[str], *, allow_code: bool = False) -> Withdrew:
    """Take patients out of what this hospital keeps; see `site.withdrawing.withdraw`.

    The resident process may run: its workers look at the record with every message. `allow_code` is for tests, as that
    of `Resident`. Raises as `withdraw`, and `StudyError` for a study that this version resolves to another plan.
    """
    decisions, sites = Decisions(folder), sites_at(folder)
    if allow_code:
        sites = sites.with_code()
    entry = sites.of(decisions.site)
    runs: list[tuple[Path, Agent]] = []
    for found in decisions.all():
        if not found.folder.own.is_dir():
            continue
        agreed = AgreedStudy(found.study, found.folder.own, found.proposal.compare, found.proposal.plan_sha256)
        identity = folder.identity.absolute()
        spec = spec_of(decisions.site, sites, None, [agreed], identity=identity, package=__version__)
        runs += [(found.folder.own, agent) for agent in agents_of(spec)]
    try:
        # Joined folders always have one: `over_all_studies`.
        histories = () if entry.history is None else (entry.history,)
        return withdraw(decisions.site, names, entry, histories, runs)
    finally:
        for _, agent in runs:
            agent.close()
