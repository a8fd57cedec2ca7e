"""What `check` says of the columns by which sites give their results in groups. For eyes at the sites."""

from __future__ import annotations

from collections.abc import Iterator

from wardround.runs.machine import Machine
from wardround.site.groups import labels_of, parted, too_few
from wardround.tasks.task import Named


def group_lines(host: Machine) -> Iterator[str]:
    """A line for each site that declares columns: groups with their numbers of test patients, or why they stay.

    What an earlier run gave is not looked up. Raises DataError for a table that cannot be read.
    """
    for site in host.study.sites:
        entry, egress = host.sites.sites.get(site), host.egress(site)
        if entry is None or entry.groups is None:
            continue
        dataset = host.dataset(site)
        if not egress.per_site_results or host.study.protection.privacy is not None or not isinstance(dataset, Named):
            yield f"{site}: nothing, as {_why(host, site)}"
            continue
        labels = labels_of(entry.groups, dataset.names("test"), site)
        said = []
        for name, column in entry.groups.columns.items():
            groups = parted(column, labels[name], egress.least)
            sizes = ", ".join(f"{label} {len(places)}" for label, places in groups.items())
            said.append(f"{name} ({sizes or f'stays: {too_few(egress.least)}'})")
        yield f"{site}: {'; '.join(said)}"


def _why(host: Machine, site: str) -> str:
    if not host.egress(site).per_site_results:
        return "egress.per_site_results is false"
    private = host.study.protection.privacy is not None
    return "protection.privacy has no noise for it" if private else "its data name no patients"
