"""The command with which a hospital leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.shared import QuietOption, SetOption, complain, say, watching, words
from wardround.errors import StudyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wardround.living.chain import Chain
    from wardround.study.sites import SitesFile


def forget(
    site: Annotated[str, typer.Argument(metavar="SITE", help="The hospital that leaves.")],
    release: Annotated[
        str,
        typer.Option("--release", help="The model that it trained: a file, a run's folder, or in a chain its number."),
    ],
    study: Annotated[Path, typer.Option("--study", help="The study to train by, with the hospital or without.")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the runs and forget.json.")],
    sites: Annotated[
        Path | None, typer.Option("--sites", help="Where each site's data lie (YAML); --write does without.")
    ] = None,
    approximately: Annotated[
        bool,
        typer.Option("--approximate", help="Shrink what was learned and train on, instead of training anew."),
    ] = False,
    keep: Annotated[
        float, typer.Option("--keep", help="With --approximate: the share of what was learned that is kept.")
    ] = 0.2,
    ascent: Annotated[
        int,
        typer.Option("--ascent", min=0, help="With --approximate: rounds before, in which SITE unlearns."),
    ] = 0,
    approved_by: Annotated[
        str, typer.Option("--approved-by", help="Who approves of what both models together reveal: A,B,C.")
    ] = "",
    chain: Annotated[
        Path | None, typer.Option("--chain", metavar="FOLDER", help="The chain of releases, where one is kept.")
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option("--beside", help="A model, or a run, that the hospital never trained: what is left is compared."),
    ] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Only write the studies, for `wardround submit`; nothing is trained.")
    ] = False,
    overrides: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Make the model that takes the place of one which a hospital trained that leaves, and measure what is left of it.

    The exact way trains anew, from the last release that the hospital never trained. Both models together reveal what
    it contributed, so every hospital is asked first: --approved-by names those that approve.
    """
    from wardround.living.chain import Chain
    from wardround.living.forgetting import (
        RECOVERED,
        approximate,
        exact,
        forget_approximately,
        forget_exactly,
        hand_over,
        model_in,
        nowhere,
        shrunk,
    )
    from wardround.living.update import release_named
    from wardround.study.load import load_study
    from wardround.study.sites import load_sites

    if sites is None and not write:
        raise StudyError("--sites: is missing; it says where each site's data lie")
    asked, names = load_study(study, overrides or []), words(approved_by)
    known = load_sites(sites) if sites is not None else nowhere(asked)
    kept = None if chain is None else Chain(chain)
    named = release_named(release, kept).model
    after = out
    if approximately:
        plan = approximate(asked, study.parent, site, named, names, keep=keep, ascent=ascent, chain=kept)
        if write:
            way = plan.ascent or shrunk(plan, plan.model, known, out)
            say(str(hand_over(way, out / ("unlearn.yaml" if plan.ascent else "recover.yaml"))))
            return
        with watching(quiet) as watcher:
            result = forget_approximately(plan, known, out, watcher=watcher)
        after = out / RECOVERED
    else:
        way = exact(asked, study.parent, site, named, names, chain=kept)
        if write:
            say(str(hand_over(way, out / "retrain.yaml")))
            return
        with watching(quiet) as watcher:
            result = forget_exactly(way, known, out, watcher=watcher)
    say(f"The model without {site}: {result.model_sha256}, in {after}")
    models = {"before": named, "after" if approximately else "retrained": model_in(after)}
    if beside is not None and approximately:
        models["retrained"] = model_in(beside)
    _measure(site, known, models, out, kept)
    say(f"Delete the old model where it is no longer needed: beside the new one it reveals what {site} contributed.")


def _measure(site: str, sites: SitesFile, models: Mapping[str, Path], out: Path, chain: Chain | None) -> None:
    """Attack the models with the hospital's own patients, where they are on this machine."""
    from wardround.audit.remains import remains
    from wardround.living.forgetting import study_that_had
    from wardround.wire.files import write_text

    if site not in sites.sites:
        complain(f"What is left of {site} was not measured: that needs its own patients, and the sites file has none")
        return
    study, near = study_that_had(site, models["before"], chain)
    found = remains(study, sites, site, models, near)
    write_text(out / "forget.json", found.model_dump_json(indent=2) + "\n")
    for line in found.lines():
        say(line)
