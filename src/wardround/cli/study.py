"""The commands of a study: propose one, look at what it would do, run it, and measure it again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from wardround.cli.shared import (
    AllowCodeOption,
    CompareOption,
    EngineOption,
    OutOption,
    ProcessesOption,
    QuietOption,
    SetOption,
    SitesOption,
    StudyFile,
    TrackOption,
    console,
    results,
    say,
    summary,
    watching,
    words,
)
from wardround.errors import WardroundError


def run(
    study: StudyFile,
    sites: SitesOption,
    out: OutOption = None,
    compare: CompareOption = "",
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Insist on going on with an earlier run.")] = False,
    without: Annotated[
        list[str] | None, typer.Option("--without", metavar="SITE", help="Go on without a site whose data changed.")
    ] = None,
    engine: EngineOption = None,
    processes: ProcessesOption = None,
    quiet: QuietOption = False,
    allow_code: AllowCodeOption = False,
    track: TrackOption = None,
) -> None:
    """Train a study, measure it, and write the report. Run it again to go on after any interruption."""
    from wardround.runs.session import run as run_study
    from wardround.study.load import load_study

    loaded = load_study(study, overrides or [])
    folder = out or Path("runs") / loaded.name
    with watching(quiet) as watcher:
        result = run_study(
            loaded,
            sites,
            folder,
            compare=words(compare),
            engine=engine,
            processes=processes,
            resume=resume,
            without=without or [],
            watcher=watcher,
            allow_code=allow_code,
            near=study.parent,
            track=track or [],
        )
    summary(result)


def demo(
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write the results; default runs/demo or runs/contrasts.")
    ] = None,
    overrides: SetOption = None,
    contrasts: Annotated[
        bool,
        typer.Option("--contrasts", help="Another kind of scan at every hospital: training together does not help."),
    ] = False,
    processes: ProcessesOption = None,
    quiet: QuietOption = False,
) -> None:
    """Make phantoms of patients for made-up hospitals; most train, alone and together, one only tests.

    With --contrasts they also train on all data pooled.
    """
    from wardround.runs.demo import CONTRASTS, DEMO, demo_study
    from wardround.runs.folder import reserve
    from wardround.runs.session import run as run_study

    chosen = CONTRASTS if contrasts else DEMO
    folder = out or Path("runs") / chosen.name
    reserve(folder)
    if not quiet:
        hospitals = f"{len(chosen.sites)} hospitals, each with its own scanner"
        say(f"Making phantoms: {chosen.total} made-up patients of {hospitals}")
    with watching(quiet) as watcher:
        study, sites = demo_study(folder / "data", overrides or [], demo=chosen, phase=watcher.phase)
        result = run_study(study, sites, folder, compare=chosen.compare, processes=processes, watcher=watcher)
    summary(result)
    say(study.description)


def evaluate(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a finished run.")],
    sites: SitesOption,
    engine: EngineOption = None,
    processes: ProcessesOption = None,
    quiet: QuietOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Recompute every metric of result.json from the saved models and the data, and say whether they agree."""
    from wardround.results.files import read_result
    from wardround.results.tables import numbers_of
    from wardround.runs.session import evaluate as evaluate_run

    with watching(quiet) as watcher:
        found = evaluate_run(out, sites, engine=engine, processes=processes, watcher=watcher, allow_code=allow_code)
    written = read_result(out)
    results(written.model_copy(update=dict(found)))
    if failed := set(found.failed) - set(written.failed):
        raise WardroundError(
            f"{', '.join(sorted(failed))} could not be measured this time, so not every number was compared; mend what "
            "the lines above say"
        )
    now, then = numbers_of(found), numbers_of(written)
    differing = [key for key in {**now, **then} if now.get(key) != then.get(key)]
    if differing:
        raise WardroundError(
            f"{len(differing)} of {len(then)} numbers differ from result.json, the first is {differing[0]}: "
            f"{then.get(differing[0])} there, {now.get(differing[0])} now. Other data, other models, another machine?"
        )
    console.print(f"All {len(then)} numbers agree with result.json.", highlight=False)


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="SITE/PATIENT/CONTRAST.nii.gz, for CT *.dcm, or raw data of MRI.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Where to write study.yaml and sites.yaml.")] = Path("."),
) -> None:
    """Propose a commented study file and a sites file for a folder of scans."""
    from wardround.imaging.propose import propose_study, skipped

    study, sites = propose_study(folder)
    study_file, sites_file = out / "study.yaml", out / "sites.yaml"
    targets = {study_file: study, sites_file: sites}
    for path in targets:
        if path.exists():
            raise WardroundError(f"{path.name} exists already; choose another --out", detail=str(path))
    out.mkdir(parents=True, exist_ok=True)
    for path, text in targets.items():
        path.write_text(text, encoding="utf-8")
    for line in skipped(folder):
        say(f"Skipped {line}")
    say(f"Wrote {study_file} and {sites_file}. Look through them, then:")
    say(f"  wardround check {study_file} --sites {sites_file}")
    say(f"  wardround run {study_file} --sites {sites_file} --compare local,pooled")


def partition(
    study: StudyFile,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="One folder with the patients of all sites.")],
    out: Annotated[Path, typer.Option("--out", help="Where to write sites.yaml and a list of patients a site.")],
    by: Annotated[
        Literal["even", "quantity", "labels"],
        typer.Option("--by", help="Sites alike; of unlike sizes; or of unlike shares of each label."),
    ] = "even",
    column: Annotated[
        str | None, typer.Option("--column", help="A column of the table: the labels, or else each patient's site.")
    ] = None,
    table: Annotated[str | None, typer.Option("--table", help="A CSV in DATA (default: labels.csv).")] = None,
    patient: Annotated[str, typer.Option("--patient", help="The table's column that names the patient.")] = "patient",
    alpha: Annotated[
        float, typer.Option("--alpha", help="How alike the sites are: 0.1 makes them unlike, 100 alike.")
    ] = 0.5,
    least: Annotated[int, typer.Option("--least", help="The least number of patients of a site.")] = 3,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the draw (default: the study's).")] = None,
) -> None:
    """Part one folder of patients among the sites of a study, for data that came without any."""
    from wardround.runs.partition import SITES
    from wardround.runs.partition import partition as part

    if (out / SITES).exists():
        raise WardroundError(f"{SITES} exists already; choose another --out", detail=str(out / SITES))
    counts = part(
        study, data, out, how=by, column=column, table=table, patient=patient, alpha=alpha, least=least, seed=seed
    )
    say(f"Wrote {out / SITES}: " + ", ".join(f"{site} {count}" for site, count in counts.items()) + " patients")


def check(
    study: StudyFile,
    sites: Annotated[Path | None, typer.Option("--sites", help="Also look at the data.")] = None,
    compare: CompareOption = "",
    overrides: SetOption = None,
    full: Annotated[bool, typer.Option("--full", help="Only print the study with every default filled in.")] = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Explain what a study would do, without doing it."""
    from wardround.runs.explain import explain, full_study

    if full:
        say(full_study(study, overrides or []))
    else:
        say(explain(study, sites, words(compare), overrides or [], allow_code=allow_code))
