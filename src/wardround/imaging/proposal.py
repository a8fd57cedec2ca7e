"""What proposed studies share, whatever the sites have: beginning, end, the line of a site, who can train."""

from __future__ import annotations

from collections.abc import Iterable

from wardround.errors import DataError
from wardround.imaging.convert import counted_patients

#: How every proposed study begins.
HEAD = """\
# A study: everything that decides its result. What is left out has its default; `wardround check` lists all.
version: 1
name: {name}
seed: 0

# Sites by name. Where their data lie stands in the sites file, never here.
# `role: unseen` is tested only: it shows how the model does at a hospital that never took part.
# `role: evaluate` does not train, and its validation patients count in the choice of the released round.
"""
#: How a study of MRI ends.
TAIL = """\
method:
  kind: fedavg          # fedprox | fedbn | fedavgm | fedadam

local:
  steps: 20             # optimiser steps of a site in a round
  batch: 1
  lr: 0.001

schedule:
  rounds: 20
"""


def site_line(name: str, patients: int, *said: str) -> str:
    """A site with its role, and in a comment how many patients it has and what else is `said` of it."""
    return f"  {name}: {{role: {role_of(patients)}}}   # {'; '.join((counted_patients(patients), *said))}"


def role_of(patients: int) -> str:
    """A site of one patient can only be tested at."""
    return "train" if patients > 1 else "unseen"


def check_training(patients: Iterable[int], *said: str) -> None:
    """Raise DataError where no site can train, with what else is `said` of the folder."""
    if all(count < 2 for count in patients):
        raise DataError("; ".join(("no site can train: each has 1 patient, and one must be held out to test", *said)))
