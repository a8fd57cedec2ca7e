"""What a person is told before a run: true causes and the file, what `init` left out, and what is seldom meant."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from tests.mri_hospitals import head, make_hospitals, save, write_study
from wardround import __version__
from wardround.cli import app, shared
from wardround.deidentify import describe_error
from wardround.errors import DataError
from wardround.imaging.propose import propose_study
from wardround.imaging.readers.dicom_file import open_dicom
from wardround.imaging.readers.volume import read_volume
from wardround.results.files import line_of
from wardround.storage.journal import RoundReport
from wardround.study.load import load_study
from wardround.study.sites import load_sites

PATIENT = "Doe-John-1"


def _run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_hospitals(tmp_path / "data")


# Errors -----------------------------------------------------------------------------------------------------------


def test_a_file_that_may_not_be_read_is_not_called_damaged(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data / "Beta" / PATIENT / "flair.nii.gz"

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(nibabel, "load", refuse)
    monkeypatch.setattr("pydicom.dcmread", refuse)
    monkeypatch.setattr("wardround.imaging.readers.dicom_file.read_file_meta_info", refuse)
    for read in (read_volume, open_dicom):
        with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)") as raised:
            read(path)
        assert "damaged" not in str(raised.value)
        assert raised.value.detail == str(path)
        assert PATIENT not in describe_error(raised.value)


def _negative(path: Path) -> None:
    save(head(1).astype(np.int16) - 50, path)


def _large(path: Path) -> None:
    save(np.kron(head(1), np.ones((4, 4, 1), np.uint8)), path)


@pytest.mark.parametrize(("spoil", "words"), [(_negative, "negative values"), (_large, "256 x 256 pixels are too far")])
def test_an_image_that_does_not_fit_is_named_at_the_site_and_nowhere_else(
    spoil: Any, words: str, data: Path, tmp_path: Path
) -> None:
    path = data / "Beta" / PATIENT / "flair.nii.gz"
    spoil(path)
    study, sites = write_study(tmp_path, data)
    for command in ("check", "run"):
        said = _run(command, study, "--sites", sites, *(("--out", tmp_path / "out") if command == "run" else ()))
        assert said.exit_code == 2
        error, place = said.stderr.splitlines()[-2:]
        assert words in error
        assert PATIENT not in error
        assert str(path) in place


# What is seldom meant ---------------------------------------------------------------------------------------------


def test_a_federation_of_one_and_two_sites_on_one_folder_are_said(data: Path, tmp_path: Path) -> None:
    study, sites = write_study(tmp_path, data)
    assert "federation of one" not in _run("check", study, "--sites", sites).stdout
    alone = " ".join(_run("check", study, "--sites", sites, "--set", "sites.Beta.role=unseen").stdout.split())
    assert "Alpha is the only site that trains: this is a federation of one" in alone
    for beta, how in ((data / "Alpha", "have a data folder in common"), (data, "of which one lies in the other")):
        entries = {"Alpha": {"data": str(data / "Alpha")}, "Beta": {"data": str(beta)}}
        sites.write_text(yaml.safe_dump({"sites": entries}))
        if beta == data:
            for patient in ("p0", "p1", "p2"):
                save(head(5), data / patient / "flair.nii.gz")
        said = " ".join(_run("check", study, "--sites", sites).stdout.split())
        assert "Alpha and Beta have" in said
        assert how in said


def test_a_run_of_two_sites_on_one_folder_warns(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    study, sites = write_study(tmp_path, data, schedule={"rounds": 1}, local={"steps": 1})
    sites.write_text(yaml.safe_dump({"sites": {name: {"data": str(data / "Alpha")} for name in ("Alpha", "Beta")}}))
    done = _run("run", study, "--sites", sites, "--out", tmp_path / "out", "--engine", "local", "--quiet")
    assert done.exit_code == 0, done.output
    assert any("Alpha and Beta have a data folder in common" in message for message in caplog.messages)
    assert "training: " not in done.stderr


# init -------------------------------------------------------------------------------------------------------------


def test_names_of_sites_stay_in_their_script(tmp_path: Path) -> None:
    folders = ["東京病院", unicodedata.normalize("NFD", "Universitätsklinikum"), "Больница №1", "दिल्ली", "A b", "A-b"]
    for folder in folders:
        for patient in ("p1", "p2"):
            save(head(1), tmp_path / "in" / folder / patient / "flair.nii.gz")
    study_text, sites_text = propose_study(tmp_path / "in")
    (tmp_path / "study.yaml").write_text(study_text, encoding="utf-8")
    (tmp_path / "sites.yaml").write_text(sites_text, encoding="utf-8")
    study, sites = load_study(tmp_path / "study.yaml"), load_sites(tmp_path / "sites.yaml")
    expected = {"東京病院", "Universitätsklinikum", "Больница-№1".replace("№", "-"), "दिल्ली", "A-b", "A-b-2"}
    assert set(study.sites) == expected == set(sites.sites)
    assert sites.of("東京病院").data == (tmp_path / "in" / "東京病院",)


def test_a_site_of_another_script_trains_and_is_reported(data: Path, tmp_path: Path) -> None:
    names = {"東京病院": data / "Alpha", "Ärzte": data / "Beta"}
    study, sites = write_study(
        tmp_path, data, sites={name: {} for name in names}, schedule={"rounds": 1}, local={"steps": 1}
    )
    sites.write_text(yaml.safe_dump({"sites": {name: {"data": str(path)} for name, path in names.items()}}))
    done = _run("run", study, "--sites", sites, "--out", tmp_path / "out", "--engine", "local", "--compare", "local")
    assert done.exit_code == 0, done.output
    assert "東京病院" in done.stdout
    assert "東京病院" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "models").is_dir()
    said = _run("inspect", tmp_path / "out").stdout
    assert "a run of study tiny" in said
    assert "finished" in said
    assert ["local/東京病院", "1", "of", "1"] in [line.split()[:4] for line in said.splitlines()]
    assert "models/federated.safetensors, of round 1" in said


def test_init_says_what_it_left_out_and_why(data: Path, tmp_path: Path) -> None:
    (data / "notes.txt").write_text("")
    (data / "empty").mkdir()
    save(head(1), data / "deep" / "p" / "session" / "flair.nii.gz")
    (data / ".hidden").mkdir()
    said = _run("init", data, "--out", tmp_path / "new").stdout.splitlines()
    skipped = {line.split(":")[0]: line for line in said if line.startswith("Skipped ")}
    assert set(skipped) == {"Skipped notes.txt", "Skipped empty", "Skipped deep"}
    assert "a file beside" in skipped["Skipped notes.txt"]
    assert "empty folder" in skipped["Skipped empty"]
    assert "do not lie in SITE/PATIENT" in skipped["Skipped deep"]
    # Images right below make the folder one site, and its sites no patients.
    save(head(1), data / "one" / "flair.nii.gz")
    save(head(1), data / "two" / "flair.nii.gz")
    said = _run("init", data, "--out", tmp_path / "again").stdout
    assert "Skipped Alpha: it holds no CONTRAST.nii.gz" in said
    assert "it looks like a site" in said


# The terminal -----------------------------------------------------------------------------------------------------


def test_lines_are_broken_between_words_on_a_terminal_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    text, path = "many words of an error " * 8, "/a/long/path" * 10
    for terminal in (True, False):
        drawn = io.StringIO()
        monkeypatch.setattr(shared, "errors", Console(file=drawn, force_terminal=terminal, width=80, color_system=None))
        shared.explain(text, path)
        lines = drawn.getvalue().splitlines()
        assert f"({path})" in drawn.getvalue()
        wide = [line for line in lines if len(line) > 80]
        assert [path in line for line in wide] == ([True] if terminal else [False, True])


def test_warnings_of_a_run_keep_within_a_terminal() -> None:
    script = (
        "import logging, os, sys; from wardround.logs import log_to_stderr; sys.stderr.isatty = lambda: True;"
        "log_to_stderr(logging.WARNING); logging.getLogger('wardround').warning('many words ' * 30)"
    )
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    lines = done.stderr.splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 80


def test_the_version_is_an_option_too() -> None:
    done = _run("--version")
    assert (done.exit_code, done.stdout.strip()) == (0, __version__)


def test_inspect_says_how_far_a_run_has_come(data: Path, tmp_path: Path) -> None:
    study, _ = write_study(tmp_path, data)
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    (out / "study.yaml").write_text(study.read_text())
    report = RoundReport("federated", 1, 0, ("Alpha",), {}, 0.1, None, 1, 1, 1.0, 0.1, 0.1, 0.0, 0.0, "0d" * 32)
    (out / "rounds.jsonl").write_text(line_of(report))
    said = _run("inspect", out).stdout
    assert "stopped; run the same command again to go on" in said
    assert "federated  1 of 2  not yet released" in said
