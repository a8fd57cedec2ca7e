"""The command by which a new hospital gets a model of its own from a release."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from wardround.cli.models import PluginOption
from wardround.cli.shared import AllowCodeOption, QuietOption, SetOption, SitesOption, say

if TYPE_CHECKING:
    from wardround.living.joining import Joined
    from wardround.tasks.estimates import PatientEstimate


def join(
    release: Annotated[
        Path,
        typer.Argument(metavar="RELEASE", help="A run's folder, or a released model (models/federated.safetensors)."),
    ],
    sites: SitesOption,
    site: Annotated[str, typer.Option("--site", help="The new hospital, by its name in the sites file.")],
    out: Annotated[Path, typer.Option("--out", help="A folder for its model and what came out.")],
    train: Annotated[
        Literal["auto", "all"],
        typer.Option("--train", help="auto: the private part of a personal method, else all that the release trained."),
    ] = "auto",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often validation patients are asked.")] = 10,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of training between two validations.")] = 10,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Default: the study's for a private part, else a tenth of it.")
    ] = None,
    overrides: SetOption = None,
    plugins: PluginOption = None,
    quiet: QuietOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Fit a release to a new hospital with its own patients alone: no other site trains, and nothing leaves.

    Its validation patients choose between the release and the models after each round, so that it is never worse on
    them than the release. Both are then tested on its test patients.
    """
    from wardround.living.joining import join as join_release

    found = join_release(
        release,
        sites,
        site,
        out,
        train=train,
        rounds=rounds,
        steps=steps,
        lr=lr,
        overrides=overrides or (),
        plugins=plugins or (),
        allow_code=allow_code,
        told=(lambda _: None) if quiet else say,
    )
    for line in lines_of(found):
        say(line)


def lines_of(found: Joined) -> list[str]:
    """What is printed of a joining."""
    from wardround.tasks.estimates import LEAST_PATIENTS

    learned = "all that the release trained" if found.trained == "all" else found.trained
    chosen = (
        f"chosen by validation patients: the model after round {found.round}"
        if found.chosen == "joined"
        else "no round was better than the release on validation patients: the release is the hospital's model"
    )
    few = (
        f"it is the choice of {found.validation_patients} validation patients: look at test patients before you use it"
    )
    site = f" --site {found.site}" if found.chosen == "joined" else ""
    return [
        f"{found.site} joined release {found.release[:12]}; learned at home: {learned}",
        f"{chosen} ({found.metric} {found.validation['joined']:.4g}, release {found.validation['release']:.4g})",
        *([few] if found.validation_patients < LEAST_PATIENTS else []),
        *(
            f"  test {name}: release {_text(row.release)}, joined {_text(row.joined)}, better by {_text(row.gain)}"
            for name, row in found.test.items()
        ),
        f"wardround predict {found.model} INPUT... --out FOLDER{site}",
    ]


def _text(found: PatientEstimate) -> str:
    if not found.n:
        return "no value"
    interval = "" if found.ci_low is None else f" [{found.ci_low:.4g}, {found.ci_high:.4g}]"
    return f"{found.value:.4g}{interval} (n {found.n})"
