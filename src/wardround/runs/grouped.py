"""Measures a run, and asks every site for its results by the columns that its own file declares."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from wardround.errors import WireError
from wardround.federation.exchange import ERROR, Engine
from wardround.federation.facts import PLAN, parsed
from wardround.federation.grouped import GROUPS, GroupValue, SiteGroups
from wardround.results.schema import GroupTables, Measured, Table
from wardround.runs.context import Context
from wardround.runs.evaluation import at_site, measure, over_sites, tables
from wardround.runs.watching import Phase
from wardround.study.groups import OTHER
from wardround.tasks.estimates import WITHHELD, Mean
from wardround.wire.message import Header, Message

log = logging.getLogger(__name__)
# Of a site: column -> group -> row -> metric.
Given = Mapping[str, Mapping[str, Mapping[str, Mapping[str, GroupValue]]]]


def measured(host: Context, engine: Engine, phase: Phase = lambda *_: None, *, again: str = "") -> Measured:
    """What result.json says of every model and baseline, by site and by group; the rest is as in `measure`."""
    found = tables(host, measure(host, engine, phase, again=again))
    said, missing = ask_groups(host, engine)
    return found.model_copy(update={"groups": group_tables(host, said), "groups_missing": missing})


def ask_groups(host: Context, engine: Engine) -> tuple[dict[str, Given], dict[str, str]]:
    """What sites give by group, and by site why it gives nothing of a column that it declares."""
    given: dict[str, Given] = {}
    missing: dict[str, str] = {}
    meta = {PLAN: host.plan_sha256}
    asked = [Message(Header(GROUPS, host.study_sha256, site, meta=meta)) for site in host.remaining(host.study.sites)]
    replies = {reply.header.site: reply for reply in engine.exchange(asked)}
    for site in host.remaining(host.study.sites):
        header = replies[site].header
        try:
            if header.kind == ERROR:
                raise WireError(str(header.meta.get("reason", "no reason given")))
            found = _known(host, site, parsed(SiteGroups, header.meta))
        except WireError as error:
            log.warning("site %s gave nothing by group: %s", site, error)
            missing[site] = str(error)
            continue
        given[site] = {c.name: {group.name: group.rows for group in c.groups} for c in found.columns if c.groups}
        if why := [f"{c.name}: {c.reason}" for c in found.columns if not c.groups]:
            missing[site] = "; ".join(why)
    return given, missing


def _known(host: Context, site: str, said: SiteGroups) -> SiteGroups:
    """The same; raises `WireError` for a row or metric that the study does not have."""
    rows = {*host.study.compared_rows, *(name for name in host.arms if "/" not in name), f"local/{site}"}
    metrics = {spec.name for spec in host.task.metrics}
    for column in said.columns:
        for group in column.groups:
            if group.rows.keys() - rows or any(values.keys() - metrics for values in group.rows.values()):
                raise WireError("results by group of a row or metric that the study does not have")
    return said


def group_tables(host: Context, given: Mapping[str, Given]) -> tuple[GroupTables, ...]:
    """Tables by column and group, `other` last; of an arm, a row for each site, and the mean where all that train gave
    the group."""
    order = [*(name for name in (*host.study.compared_rows, *host.arms) if "/" not in name), "local"]
    found = []
    for column in dict.fromkeys(column for columns in given.values() for column in columns):
        of_column = {site: columns[column] for site, columns in given.items() if column in columns}
        # In the order of the site that has most of them.
        most = sorted(of_column.values(), key=len, reverse=True)
        labels = dict.fromkeys(label for groups in most for label in groups)
        for label in sorted(labels, key=lambda label: label == OTHER):
            sites = {site: groups[label] for site, groups in of_column.items() if label in groups}
            arms = {arm: table for arm in order if (table := _table(host, arm, sites))}
            found.append(GroupTables(column=column, group=label, metrics=arms))
    return tuple(found)


def _table(host: Context, arm: str, sites: Mapping[str, Mapping[str, Mapping[str, GroupValue]]]) -> Table:
    """An arm's table; empty where no site gave one of its numbers."""
    specs, training = host.task.metrics, host.remaining(host.study.averaged_sites)
    means: dict[str, dict[str, Mean]] = {}
    for site, rows in sites.items():
        if row := rows.get(f"local/{site}" if arm == "local" else arm):
            means[site] = {
                spec.name: Mean(told.value, told.se, told.n, told.absent) if (told := row.get(spec.name)) else WITHHELD
                for spec in specs
            }
    table: Table = {site: at_site(specs, of_site) for site, of_site in means.items()}
    if table and means.keys() >= set(training):
        table["mean"] = over_sites(specs, [means[site] for site in training])
    return table
