"""The commands; thin."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from wardround import __version__
from wardround.errors import Interrupted, WardroundError
from wardround.logs import log_to_stderr

if TYPE_CHECKING:
    from wardround.runner.session import Result
    from wardround.runner.watching import Watcher


class _Commands(TyperGroup):
    """Every error raised on purpose, or by the disk, becomes one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; 2 stands for an error, 130 for a run that was stopped."""
        try:
            return super().invoke(ctx)
        except Interrupted as error:
            errors.print(Text(str(error), style="yellow"), soft_wrap=True)
            raise typer.Exit(130) from None
        except WardroundError as error:
            _explain(str(error), error.detail)
        except BrokenPipeError:
            raise
        except OSError as error:
            _explain(os.strerror(error.errno) if error.errno else str(error), str(error.filename or ""))
        raise typer.Exit(2)


app = typer.Typer(
    cls=_Commands,
    help="Train imaging models across hospitals without moving a scan.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
convert_app = typer.Typer(help="Convert public downloads into Wardround's folder layout.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")
log_app = typer.Typer(help="Look at the logs that every party of a run keeps.", no_args_is_help=True)
app.add_typer(log_app, name="log")
console = Console()
errors = Console(stderr=True)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="The study file (YAML).")]
SitesOption = Annotated[Path, typer.Option("--sites", help="Where each site's data lie (YAML).")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Where to write the results (default: runs/NAME).")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a key of the study: a.b=value.")]
CompareOption = Annotated[str, typer.Option("--compare", help="What to compare with: local,pooled.")]
EngineName = Literal["local", "workers"]
EngineOption = Annotated[
    EngineName | None, typer.Option("--engine", help="One process, or several (default where there are cores).")
]
ProcessesOption = Annotated[
    int | None, typer.Option("--processes", min=1, help="Worker processes (default: one a core).")
]

AllowCodeOption = Annotated[
    bool, typer.Option("--allow-code", help="Let the study name any code, not only plug-ins of the sites file.")
]


def main() -> None:
    """The entry of the `wardround` command."""
    log_to_stderr(logging.DEBUG if os.environ.get("WARDROUND_DEBUG") else logging.WARNING)
    # Whoever stops a service or a batch job sends this: it ends a run as Ctrl-C does, to be gone on with.
    signal.signal(signal.SIGTERM, _interrupt)
    app()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@app.command()
def run(
    study: StudyFile,
    sites: SitesOption,
    out: OutOption = None,
    compare: CompareOption = "",
    overrides: SetOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Insist on going on with an earlier run.")] = False,
    engine: EngineOption = None,
    processes: ProcessesOption = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Train a study, measure it, and write the report. Run it again to go on after any interruption."""
    from wardround.runner.session import run as run_study
    from wardround.study.load import load_study

    loaded = load_study(study, overrides or [])
    folder = out or Path("runs") / loaded.name
    with _watcher() as watcher:
        result = run_study(
            loaded,
            sites,
            folder,
            compare=_words(compare),
            engine=engine,
            processes=processes,
            resume=resume,
            watcher=watcher,
            allow_code=allow_code,
        )
    _summary(result)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Where to write the results.")] = Path("runs/demo"),
    overrides: SetOption = None,
) -> None:
    """Make brain phantoms for four hospitals; three train together, alone and pooled, the fourth only tests."""
    from wardround.runner.demo import demo_study
    from wardround.runner.session import run as run_study

    console.print("Making brain phantoms for four hospitals, each with its own scanner ...")
    study, sites = demo_study(out / "data", overrides or [])
    with _watcher() as watcher:
        result = run_study(study, sites, out, compare=["local", "pooled"], watcher=watcher)
    _summary(result)


@app.command()
def evaluate(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a finished run.")],
    sites: SitesOption,
    engine: EngineOption = None,
    processes: ProcessesOption = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Recompute every metric of result.json from the saved models and the data, and say whether they agree."""
    import json

    from wardround.report.terminal import numbers_of
    from wardround.runner.session import evaluate as evaluate_run

    with _watcher() as watcher:
        found = evaluate_run(out, sites, engine=engine, processes=processes, watcher=watcher, allow_code=allow_code)
    written = json.loads((out / "result.json").read_text(encoding="utf-8"))
    _results(found)
    if failed := set(found["failed"]) - set(written.get("failed", ())):
        raise WardroundError(
            f"{', '.join(sorted(failed))} could not be measured this time, so not every number was compared; mend what "
            "the lines above say"
        )
    now, then = numbers_of(found["metrics"]), numbers_of(written["metrics"])
    differing = [key for key in {**now, **then} if now.get(key) != then.get(key)]
    if differing:
        raise WardroundError(
            f"{len(differing)} of {len(then)} numbers differ from result.json, the first is {differing[0]}: "
            f"{then.get(differing[0])} there, {now.get(differing[0])} now. Other data, other models, another machine?"
        )
    console.print(f"All {len(then)} numbers agree with result.json.", highlight=False)


@app.command()
def reconstruct(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A released model (models/ARM.safetensors).")],
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="A NIfTI image, k-space (.npy: slices x coils x H x W), a DICOM CT folder."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The NIfTI file to write, or for DICOM a folder.")],
    site: Annotated[str | None, typer.Option("--site", help="Whose scanner and coils (default: the study's).")] = None,
    embedding: Annotated[
        Path | None, typer.Option("--embedding", help="A file with the patient's embedding, for a model with anatomy.")
    ] = None,
    dose: Annotated[
        float | None, typer.Option("--dose", help="Put noise into CT projections first: the share of their dose left.")
    ] = None,
) -> None:
    """Reconstruct with a released model. An image is scanned by the study's simulated scanner first."""
    from wardround.runner.apply import reconstruct as apply

    _say(apply(model, source, output, site=site, embedding=embedding, dose=dose))


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="SITE/PATIENT/CONTRAST.nii.gz, or for CT *.dcm.")],
    out: Annotated[Path, typer.Option("--out", help="Where to write study.yaml and sites.yaml.")] = Path("."),
) -> None:
    """Propose a commented study file and a sites file for a folder of scans."""
    from wardround.data.propose import propose_study

    study, sites = propose_study(folder)
    study_file, sites_file = out / "study.yaml", out / "sites.yaml"
    targets = {study_file: study, sites_file: sites}
    for path in targets:
        if path.exists():
            raise WardroundError(f"{path.name} exists already; choose another --out", detail=str(path))
    out.mkdir(parents=True, exist_ok=True)
    for path, text in targets.items():
        path.write_text(text, encoding="utf-8")
    _say(f"Wrote {study_file} and {sites_file}. Look through them, then:")
    _say(f"  wardround check {study_file} --sites {sites_file}")
    _say(f"  wardround run {study_file} --sites {sites_file} --compare local,pooled")


@app.command()
def check(
    study: StudyFile,
    sites: Annotated[Path | None, typer.Option("--sites", help="Also look at the data.")] = None,
    compare: CompareOption = "",
    overrides: SetOption = None,
    full: Annotated[bool, typer.Option("--full", help="Only print the study with every default filled in.")] = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Explain what a study would do, without doing it."""
    from wardround.runner.explain import explain, full_study

    if full:
        _say(full_study(study, overrides or []))
    else:
        _say(explain(study, sites, _words(compare), overrides or [], allow_code=allow_code))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file, a folder, or a released model.")],
) -> None:
    """Say what a file or folder holds, without naming a patient."""
    from wardround.data.convert import inspect_path

    if path.suffix == ".safetensors":
        from wardround.runner.inspection import inspect_model

        _say(inspect_model(path))
        return
    _say(str(inspect_path(path)))


@app.command()
def audit(
    study: StudyFile,
    sites: SitesOption,
    site: Annotated[str, typer.Option("--site", help="The site that audits itself; no image leaves it.")],
    out: Annotated[Path, typer.Option("--out", help="Where to write audit.json and audit.html.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="A released model, or the folder of a run (default: round 1).")
    ] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="Updates to attack in each way.")] = None,
    only: Annotated[
        str, typer.Option("--only", help="Parts to do: lint,inversion,membership,properties,epsilon (default: all).")
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer trials and shorter searches.")] = False,
    pictures: Annotated[bool, typer.Option("--pictures", help="Show patients' images; the page stays here.")] = False,
    noise_multiplier: Annotated[
        float | None, typer.Option("--noise-multiplier", help="Claimed privacy: noise in units of the clip.")
    ] = None,
    clip: Annotated[float | None, typer.Option("--clip", help="Claimed privacy: the clip's norm (default: 1).")] = None,
    dp_steps: Annotated[
        int | None, typer.Option("--dp-steps", help="Claimed privacy: steps with noise (default: 1).")
    ] = None,
    sampling: Annotated[
        float | None, typer.Option("--sampling", help="Claimed privacy: rate of Poisson sampling (default: 1).")
    ] = None,
    delta: Annotated[float | None, typer.Option("--delta", help="Claimed privacy: delta (default: 1e-5).")] = None,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", help="Claimed privacy: epsilon (default: computed).")
    ] = None,
    identity: Annotated[
        Path | None,
        typer.Option("--identity", help="The store with the site's key (default: the run's, or one by --out)."),
    ] = None,
    overrides: SetOption = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Attack a site's own updates, at the site, and say what they give away. Exit code 2 where a claim is refuted."""
    from wardround.audit.command import audit as audit_site
    from wardround.audit.epsilon import claim_of
    from wardround.audit.results import PARTS
    from wardround.study.load import load_study
    from wardround.study.sites import load_sites

    claim = claim_of(
        noise_multiplier,
        {"clip": clip, "dp-steps": dp_steps, "sampling": sampling, "delta": delta, "epsilon": epsilon},
    )
    known = load_sites(sites)
    found = audit_site(
        load_study(study, overrides or []),
        known.with_code() if allow_code else known,
        site,
        out,
        model=model,
        claim=claim,
        quick=quick,
        trials=trials,
        pictures=pictures,
        parts=[word for word in _words(only) if word != "lint"] if only else PARTS,
        store=identity,
    )
    _say(f"{found.light}: {found.verdict}")
    if found.epsilon is not None:
        _say(str(found.epsilon))
    _say(f"Report: {out / 'audit.html'}")
    if found.epsilon is not None and not found.epsilon.holds:
        raise WardroundError("the measured lower bound of epsilon is above the claimed upper bound; do not rely on it")
    if found.lint:
        raise WardroundError(f"the lint refuses the model: {found.lint[0].tensor} {found.lint[0].text}")


@app.command("verify-audit")
def verify_audit(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of an audit.")],
    key: Annotated[str | None, typer.Option("--key", help="The site's public key in hex, as the site gave it.")] = None,
) -> None:
    """Check that an audit is what its site signed."""
    from wardround.audit.signature import verify

    signed = verify(folder, key)
    _say(f"Whole: site {signed.site} signed it with key {signed.key}.")
    if key is None:
        _say("Whose key that is only the site can say: compare it, or give it with --key.")


@app.command()
def version() -> None:
    """Print the version."""
    _say(__version__)


@log_app.command("verify")
def verify_log(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run's folder, or one log.jsonl.")],
) -> None:
    """Find what was edited, deleted, reordered or cut off in the logs of a run; exit code 1 where something was."""
    from wardround.federation.verify import verify

    found = verify(folder)
    for log in found.logs:
        signed = f"{log.signatures} signatures, key {log.key}" if log.key else "no signatures"
        _say(f"{log.name}: {len(log.entries)} records, {signed}" + (f" ({log.note})" if log.note else ""))
    for damage in found.damages[:20]:
        errors.print(Text(damage, style="red"), soft_wrap=True)
    if (more := len(found.damages) - 20) > 0:
        errors.print(Text(f"... and {more} more", style="red"))
    if found.damages:
        raise typer.Exit(1)
    if found.anchors:
        agree = f"{found.anchors} anchors in other parties' logs agree"
        _say(f"Whole: {agree}. What follows a log's last anchor could be cut off unseen.")
    elif len(found.logs) == 1:
        _say("Whole in itself. No other party's log is here, so records cut off its end would not show.")
    else:
        _say("Whole, each in itself. None holds an anchor of another, so records cut off their ends would not show.")


@convert_app.command("lgg")
def convert_lgg(
    download: Annotated[
        Path, typer.Argument(metavar="DOWNLOAD", help="The unpacked public download (it holds kaggle_3m/).")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write SITE/PATIENT/*.nii.gz into.")],
) -> None:
    """Convert the public LGG MRI segmentation collection."""
    from wardround.data.convert import convert_lgg as convert

    report = convert(download, out)
    patients = ", ".join(f"{site} {count}" for site, count in sorted(report.patients.items()))
    _say(f"Patients by site: {patients}; {report.without_t1ce} without t1ce (FLAIR stands in).")


# What several commands share ---------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _say(text: str) -> None:
    """Print a text as it is: no colours guessed, no line broken."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _explain(message: str, detail: str) -> None:
    errors.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    if detail:
        errors.print(Text(f"       ({detail})", style="dim"), soft_wrap=True)


@contextmanager
def _watcher() -> Iterator[Watcher | None]:
    if not console.is_terminal:
        yield None
        return
    from wardround.progress import LiveProgress

    with LiveProgress(console) as live:
        yield live


def _summary(result: Result) -> None:
    _results(result.values)
    _say(f"Report: {result.report}")
    _say(f"Model:  {result.out / 'models' / 'federated.safetensors'}")


def _results(values: Mapping[str, Any]) -> None:
    from wardround.report.terminal import lacking_in, table_of

    table = table_of(values["metrics"])
    if table is not None:
        console.print(table)
    for line in lacking_in(values):
        _say(line)
