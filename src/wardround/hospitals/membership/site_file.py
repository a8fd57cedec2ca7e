"""The site's own file, `site.yaml`: made with comments when a site joins, filled in there, read by its agent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from wardround.errors import StudyError
from wardround.hospitals.folders import SiteFolder
from wardround.study.load import validate
from wardround.study.sites import SiteData, SitesFile, load_sites
from wardround.study.yaml_text import read_yaml

#: What stands in a new file where the hospital writes the folder of its data.
UNFILLED = "/path/to/the/patients"
#: Fewer patients than this are not counted outside the hospital, unless its own file says otherwise.
MINIMUM_COHORT = 11
#: What a site keeps over all studies, where its file does not name other places.
LEDGER, HISTORY = "ledger.jsonl", "history"

_TEXT = """\
# What site {site} brings to the federation, and what it lets out. Only this hospital reads and changes this file; it is
# in no kit and in no message. Paths may be relative to this file, and hold ~ and ${{VARIABLE}}.
# After a change: wardround site doctor FOLDER, then stop and start the site's agent.
sites:
  {site}:
    # The folder with the patients, a folder each; or a list of such folders.
    data: {unfilled}
    # A text file with the names of the patients that may be used, one a line. Default: all in `data`.
    # patients: patients.txt

    # What may leave besides sums of updates.
    egress:
      # Counts and sums over fewer patients than this stay here.
      minimum_cohort: {minimum}
      # Whether mean and standard error over this site's own test patients leave.
      per_site_results: true
      # Metrics that may leave: all, or a list.
      metrics: all
      # Whether a released model may list the scanners of this site (sets of values, never of single patients).
      scanner_facts: false

    # Where to compute: cpu, cuda, cuda:1, or auto.
    device: cpu
    # Threads on the CPU.
    threads: 1
    # GB that training may take; a study that takes more is refused before it starts.
    # memory: 16

    # What this site keeps over all studies: privacy spent, and which masked rounds it joined. Back them up.
    ledger: ledger.jsonl
    history: history
    # Encrypts what the site keeps of a study: a file with 64 hex digits (openssl rand -hex 32 > encryption.key).
    # encryption_key: encryption.key

    # Installed plug-ins whose code a study may have called here, by name. Code never comes with a study.
    # plugins: []
"""


def site_file(site: str) -> str:
    """The text of a new site's file, with a comment for each key that a hospital decides on."""
    return _TEXT.format(site=site, unfilled=UNFILLED, minimum=MINIMUM_COHORT)


def load_site(folder: SiteFolder, site: str) -> SiteData:
    """A site's entry in its own file, with absolute paths.

    Raises `StudyError`, which names the key and the fix, where the file is not filled in, holds another site's entry or
    more than one, or names what is not there.
    """
    raw = validate(SitesFile, read_yaml(folder.site, "site"), "site", show_values=False)
    if set(raw.sites) != {site}:
        raise StudyError(f"site.yaml must hold one entry, `sites.{site}`: this folder's certificate is for that site")
    if Path(UNFILLED) in raw.sites[site].data:
        raise StudyError(f"sites.{site}.data: write the folder of your patients' data into site.yaml")
    return load_sites(folder.site).of(site)


def over_all_studies(sites: SitesFile, folder: SiteFolder) -> SitesFile:
    """The sites with one ledger and one history for all studies in a site's folder, where its file names none.

    With those of each study alone, two studies of the same patients could be played against each other.
    """
    root = folder.root.absolute()

    def kept(entry: SiteData) -> SiteData:
        ledger, history = entry.ledger or root / LEDGER, entry.history or root / HISTORY
        return entry.model_copy(update={"ledger": ledger, "history": history})

    found = sites.model_copy(update={"sites": {name: kept(entry) for name, entry in sites.sites.items()}})
    return found.with_code() if sites.allows_code else found


def sites_at(folder: SiteFolder) -> SitesFile:
    """The site's own file as its agent and its reviews read it: with what is kept `over_all_studies`."""
    return over_all_studies(load_sites(folder.site), folder)


def files_in(folders: tuple[Path, ...], most: int = 100_000) -> tuple[int, int]:
    """How many files and folders lie in some folders, of which no name is kept; counting ends at `most` files.

    Raises `OSError` where a folder cannot be read.
    """
    files = inner = 0
    for _, below, names in _walk(folders):
        files += len(names)
        inner += len(below)
        if files >= most:
            break
    return files, inner


def _walk(folders: tuple[Path, ...]) -> Iterator[tuple[str, list[str], list[str]]]:
    def refuse(error: OSError) -> None:
        raise error

    for folder in folders:
        yield from os.walk(folder, onerror=refuse)
