"""What a study would do, in plain words, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from wardround.federation.training import patients_in
from wardround.runner.session import open_host
from wardround.study.load import load_study, study_sha256
from wardround.study.sites import SiteData, SitesFile, load_sites


def explain(study_file: Path, sites_file: Path | None, compare: Sequence[str], overrides: Sequence[str]) -> str:
    """Arms, steps, what travels and how much of it; with a sites file also the patients of every site.

    Raises `StudyError` and `DataError` for whatever would stop the run.
    """
    study = load_study(study_file, overrides)
    sites = (
        load_sites(sites_file)
        if sites_file is not None
        else SitesFile(sites={name: SiteData(data=Path()) for name in study.sites})
    )
    host = open_host(study, sites, Path(), compare, (), None)
    blueprint = host.blueprint("federated")
    policy, parameters = blueprint.policy, host.bench.parameters
    sizes = {p.name: p.info.size for p in parameters}
    rounds = study.schedule.rounds
    up = blueprint.layout.nbytes
    down = sum(sizes[name] * 4 for name in policy.names("shared"))
    lines = [
        f"Study {study.name}, {study_sha256(study)[:12]}: {len(study.training_sites)} sites train"
        + (f", {', '.join(study.unseen_sites)} only evaluated" if study.unseen_sites else ""),
        f"Model: {sum(sizes.values()):,} values; "
        + ", ".join(
            f"{sum(sizes[n] for n in policy.names(role)):,} {role}"
            for role in ("shared", "local", "frozen")
            if policy.names(role)
        ),
        f"Each round, each site: {study.local.steps} steps of {study.local.batch} examples; "
        f"{_megabytes(down)} down, {_megabytes(up)} up",
        f"In all {rounds} rounds: {_megabytes(rounds * len(study.training_sites) * (up + down))} between sites and "
        "coordinator",
        "What leaves a site: the sum of weighted changes of every shared tensor, its weight, the sum of its losses and "
        "seconds, and sums of validation metrics over patients"
        + ("; its own test results" if sites_file is None else ""),
        "Arms: " + ", ".join(f"{name} ({arm.local.steps * rounds:,} steps a site)" for name, arm in host.arms.items()),
    ]
    if sites_file is not None:
        for name in study.sites:
            counts = patients_in(host.dataset(name))
            egress = sites.of(name).egress.per_site_results
            lines.append(
                f"Site {name}: "
                + ", ".join(f"{count} {split}" for split, count in counts.items())
                + f" patients, {len(host.dataset(name))} training examples; own results "
                + ("leave the site" if egress else "stay at the site")
            )
    return "\n".join(lines)


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.2f} MB" if nbytes < 1e9 else f"{nbytes / 1e9:,.2f} GB"
