"""The first two commands of a new user: what they hand on to the tests, and what they say while they install."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import wardround

ROOT = Path(__file__).parents[1]
# A Python that makes a venv of itself, whose pip talks a lot, and fails where it is asked to.
PYTHON = """#!/bin/sh
case "$*" in
  *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *"-m pip"*) echo "Collecting torch"; [ -z "$BROKEN" ] || { echo "no matching version" >&2; exit 1; } ;;
  *"-m pytest"*) echo "tests run" ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with nothing beside it, as far as make can tell."""
    folder = tmp_path / "alone" / "wardround"
    folder.mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "python").write_text(PYTHON)
    (folder / "python").chmod(0o755)
    return folder


def make(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("WARDROUND", "MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", "PYTHON=./python", *words]
    return subprocess.run(
        command, cwd=folder, env=inherited | variables, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("how", ["nothing beside it", "hidden", "empty in the environment"])
def test_no_real_images_are_no_variable_and_not_an_empty_one(clone: Path, how: str) -> None:
    if how == "hidden":
        (clone.parent / "shared" / "data").mkdir(parents=True)
    words = ["WARDROUND_DATA="] if how == "hidden" else []
    variables = {"WARDROUND_DATA": ""} if how == "empty in the environment" else {}
    said = make(clone, *words, "--eval=show:; @printenv WARDROUND_DATA || echo absent", "show", **variables)
    assert (said.returncode, said.stdout) == (0, "absent\n"), said


def test_real_images_beside_a_clone_or_named_reach_the_tests(clone: Path) -> None:
    show = ("--eval=show:; @printenv WARDROUND_DATA || echo absent", "show")
    assert make(clone, *show, WARDROUND_DATA="/elsewhere").stdout == "/elsewhere\n"
    beside = clone.parent / "shared" / "data"
    beside.mkdir(parents=True)
    assert make(clone, *show).stdout == f"{beside}\n"


def test_installing_says_one_line_and_pip_is_heard_only_where_it_fails(clone: Path) -> None:
    failed = make(clone, "test", BROKEN="yes")
    assert failed.returncode
    assert "no matching version" in failed.stdout
    assert "could not be installed" in failed.stdout
    assert not (clone / ".venv" / ".installed").exists()
    done = make(clone, "test")
    assert done.returncode == 0, done
    first, *rest = done.stdout.splitlines()
    assert first.startswith("Making .venv with all packages")
    assert "Collecting" not in done.stdout
    assert "Collecting torch" in (clone / ".venv" / "install.log").read_text()
    assert rest[-1] == "tests run"
    assert not done.stderr
    assert "Making" not in make(clone, "test").stdout


def test_an_old_python_is_one_clear_line(clone: Path) -> None:
    (clone / "python").write_text("#!/bin/sh\nexit 1\n")
    failed = make(clone, "test")
    assert failed.returncode
    assert failed.stdout == "Wardround needs Python 3.11 or newer: make PYTHON=python3.11\n"


def test_the_version_is_said_once_the_same() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == wardround.__version__
