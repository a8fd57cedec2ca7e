"""A site's rule about identifiers in its files: whether a study may train on data that still hold some."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from wardround.errors import DataError
from wardround.imaging.identifiers.findings import Level
from wardround.site.egress import ACROSS_HOSPITALS
from wardround.study.sites import Identifiers, SiteData

if TYPE_CHECKING:
    from wardround.imaging.identifiers.lint import Looked

log = logging.getLogger(__name__)


def rule_of(entry: SiteData, floor: int) -> Identifiers:
    """A site's rule: the one of its entry; without one `refuse` across hospitals and `allow` on one machine."""
    return entry.identifiers or ("refuse" if floor >= ACROSS_HOSPITALS else "allow")


def lint_site(entry: SiteData, *, everything: bool = False) -> Looked:
    """Look through a site's data folders and tables. Raises DataError for a folder that cannot be read."""
    # Late: every process of a run imports this, and few look into files.
    from wardround.imaging.identifiers.lint import lint_folders

    tables: list[Path] = [] if entry.groups is None else [entry.groups.file]
    return lint_folders(entry.data, tables, everything=everything)


def check_identifiers(site: str, entry: SiteData, floor: int) -> None:
    """Raises `DataError` where a site's data hold identifiers and its rule is `refuse`; `warn` says so in the log.

    The message may leave the site: it names a kind of finding and no number.
    """
    rule = rule_of(entry, floor)
    if rule == "allow":
        return
    found = lint_site(entry).findings.of(Level.REFUSE)
    if not found:
        return
    said = f"its files still tell who patients are. The most frequent finding: {found[0][0].what}"
    if rule == "refuse":
        raise DataError(
            f"site {site}: {said}. Remove identifiers, or write `identifiers: warn` or `allow` into its entry of the "
            "sites file; `wardround site lint` says what and where",
            detail="; ".join(f"{finding.what} ({count} files)" for finding, count in found),
        )
    log.warning("site %s: %s; `wardround site lint` says more", site, said)
