"""The commands of the audit: attack a site's own updates, and check what it signed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wardround.cli.shared import AllowCodeOption, SetOption, SitesOption, StudyFile, say, words
from wardround.errors import WardroundError


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
        parts=[word for word in words(only) if word != "lint"] if only else PARTS,
        store=identity,
        near=study.parent,
    )
    say(f"{found.light}: {found.verdict}")
    if found.epsilon is not None:
        say(str(found.epsilon))
    say(f"Report: {out / 'audit.html'}")
    if found.epsilon is not None and not found.epsilon.holds:
        raise WardroundError("the measured lower bound of epsilon is above the claimed upper bound; do not rely on it")
    if found.lint:
        raise WardroundError(f"the lint refuses the model: {found.lint[0].tensor} {found.lint[0].text}")


def verify_audit(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder of an audit.")],
    key: Annotated[str | None, typer.Option("--key", help="The site's public key in hex, as the site gave it.")] = None,
) -> None:
    """Check that an audit is what its site signed."""
    from wardround.audit.signature import verify

    signed = verify(folder, key)
    say(f"Whole: site {signed.site} signed it with key {signed.key}.")
    if key is None:
        say("Whose key that is only the site can say: compare it, or give it with --key.")
