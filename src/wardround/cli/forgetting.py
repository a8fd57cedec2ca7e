"""The command with which a hospital leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wardround.cli.shared import QuietOption, SetOption, complain, say, watching, words
from wardround.errors import StudyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wardround.study.schema import Study
    from wardround.study.sites import SitesFile


def forget(
    site: Annotated[str, typer.Argument(metavar="SITE", help="The hospital that leaves.")],
    release: Annotated[
        Path, typer.Option("--release", help="The released model that it trained, or the folder of its run.")
    ],
    study: Annotated[Path, typer.Option("--study", help="The study to train by, with the hospital or without.")],
    sites: Annotated[Path, typer.Option("--sites", help="Where each site's data lie (YAML).")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the runs and forget.json.")],
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Unlearn and recover, in which the hospital takes part once more.")
    ] = False,
    approved_by: Annotated[
        str, typer.Option("--approved-by", help="Who approves of what both models together reveal: A,B,C.")
    ] = "",
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
    from wardround.living.forgetting import approximate as two_ways
    from wardround.living.forgetting import exact, forget_approximately, forget_exactly, model_in
    from wardround.study.load import load_study
    from wardround.study.sites import load_sites

    asked = load_study(study, overrides or [])
    names = words(approved_by)
    known = load_sites(sites)
    if approximate:
        both = two_ways(asked, site, release, out, names)
        if write:
            _write(both[0].study, out / "unlearn.yaml")
            _write(both[1].study, out / "recover.yaml")
            return
        with watching(quiet) as watcher:
            _, result = forget_approximately(both, known, out, watcher=watcher)
        after = out / "recovered"
    else:
        way = exact(asked, study.parent, site, release, names)
        if write:
            _write(way.study, out / "retrain.yaml")
            return
        with watching(quiet) as watcher:
            result = forget_exactly(way, known, out, watcher=watcher)
        after = out
    say(f"The model without {site}: {result.model_sha256}, in {after}")
    models = {"before": model_in(release), "after" if approximate else "retrained": model_in(after)}
    if beside is not None and approximate:
        models["retrained"] = model_in(beside)
    _measure(site, known, models, out)
    say(f"Delete the old model where it is no longer needed: beside the new one it reveals what {site} contributed.")


def _write(study: Study, path: Path) -> None:
    import yaml

    from wardround.study.hashes import written
    from wardround.wire.files import write_text

    if path.exists():
        raise StudyError("--out: holds such a study already; choose another folder", detail=str(path))
    write_text(path, yaml.safe_dump(written(study), sort_keys=False, allow_unicode=True))
    say(str(path))


def _measure(site: str, sites: SitesFile, models: Mapping[str, Path], out: Path) -> None:
    """Attack the models with the hospital's own patients, where they are on this machine."""
    from wardround.audit.remains import remains
    from wardround.living.forgetting import study_that_had
    from wardround.wire.files import write_text

    if site not in sites.sites:
        complain(f"What is left of {site} was not measured: that needs its own patients, and the sites file has none")
        return
    study, near = study_that_had(site, models["before"])
    found = remains(study, sites, site, models, near)
    write_text(out / "forget.json", found.model_dump_json(indent=2) + "\n")
    for line in found.lines():
        say(line)
