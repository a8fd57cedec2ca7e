"""What `check` says of a study whose code it does not call."""

from __future__ import annotations

from wardround.results.units import protocol
from wardround.runs.columns import entry, table, wrapped
from wardround.runs.machine import Machine
from wardround.study.load import study_sha256
from wardround.study.schema import Study
from wardround.study.tasks import ReconstructionTask

# What a site of each role does, as `check` says it.
ROLES = {"train": "trains", "evaluate": "evaluates: validates and tests", "unseen": "unseen: only tested"}
# The same where nothing is trained.
_GIVEN = {"train": "measured", "evaluate": "measured", "unseen": "measured: all patients test"}


def roles_of(study: Study) -> dict[str, str]:
    """What a site of each role does in a study."""
    return ROLES if study.trains else _GIVEN


def uncalled(host: Machine) -> str | None:
    """What a study's file says by itself, where it names code that is not called; `None` where there is none.

    Nothing that the study names is imported or opened.
    """
    study, reasons = host.study, tuple(host.plugins.refused(host.study))
    if not reasons:
        return None
    own = not isinstance(study.task, ReconstructionTask)
    # Its plan has the defaults of code that is not called.
    facts = [entry("study_sha256", study_sha256(study)), entry("plan_sha256", "not known without that code")]
    facts += [entry("about", study.description)] if study.description else []
    facts += [entry("method", study.method.kind), entry("rounds", str(study.schedule.rounds))]
    header = ("site", "role") if own else ("site", "role", "simulated scanner")
    scanners = {name: study.acquisition_of(name) for name in study.sites if study.scans}
    rows = [(name, roles_of(study)[site.role], protocol(scanners.get(name))) for name, site in study.sites.items()]
    mind = "The study names code, and check did not call it: what it learns, the model and what travels is not known."
    lines = [wrapped(mind, "  - "), *(wrapped(f"{why}.", "  - ") for why in reasons)]
    return "\n\n".join(
        (
            "\n".join([f"Study {study.name}", *facts]),
            f"Sites\n{table(header, [row[: len(header)] for row in rows])}",
            "\n".join(["Not called", *lines]),
        )
    )
