"""A study from unseen hospitals runs no code, in `check`, in a run or in a worker process, unless the site says so."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.toys import toy_sites, toy_study
from typer.testing import CliRunner

import wardround
from wardround.cli import app
from wardround.errors import StudyError
from wardround.runs.machine import Machine
from wardround.study.plugins import Plugins
from wardround.study.schema import Study
from wardround.study.sites import SiteData, SitesFile, load_sites

SITES = ("A", "B", "C")
TASK = """
version: 1
name: gift
sites: {A: {}, B: {}, C: {}}
task: {kind: custom, factory: "%s", options: {command: "touch %s"}}
local: {steps: 1, batch: 2}
schedule: {rounds: 1}
"""
METHOD = """
version: 1
name: gift
sites: {A: {}, B: {}, C: {}}
method: {kind: custom, factory: "%s", options: {command: "touch %s"}}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package with two plug-ins; each leaves a trace when its code is imported or called."""
    folder = tmp_path / "site-packages"
    about = folder / "toy_plugins-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-plugins\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[wardround.tasks]\ntoy = toy_plugins:make\n[wardround.methods]\ntoy = toy_plugins:average\n"
    )
    (folder / "toy_plugins.py").write_text(
        "from pathlib import Path\n"
        "from tests.toys import make_task\n"
        "from wardround.learning.methods.method import Method\n"
        f"Path({str(tmp_path / 'imported')!r}).touch()\n"
        "def make(**options): return make_task(**options)\n"
        "def average(**options): return Method('equal')\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("toy_plugins", None)
    yield folder
    sys.modules.pop("toy_plugins", None)


def sites_of(folder: Path, plugins: dict[str, Any]) -> SitesFile:
    """Three sites, each with the plug-ins that it allows; no code by its place."""
    for name in SITES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    return SitesFile(sites={n: SiteData(data=(folder / n,), plugins=tuple(plugins.get(n, ()))) for n in SITES})


def in_a_worker(host: Machine) -> Machine:
    """The host that a worker process makes of what it is handed."""
    return Machine.from_spec(json.loads(json.dumps(host.spec())))


def named(**changes: Any) -> Study:
    plugin = {"kind": "custom", "factory": "toy", "options": {}}
    return toy_study(**{"task": plugin, "schedule": {"rounds": 1}, **changes})


@pytest.mark.parametrize("text", [TASK, METHOD])
@pytest.mark.parametrize("factory", ["os:system", "subprocess:getoutput", "posix:system"])
def test_a_received_study_runs_nothing_on_check(tmp_path: Path, text: str, factory: str) -> None:
    trace = tmp_path / "trace"
    study = tmp_path / "study.yaml"
    # The one option is passed on by its name; a callable in C takes it all the same.
    study.write_text(text % (factory, trace))
    found = CliRunner().invoke(app, ["check", str(study)])
    assert found.exit_code == 0, found.output
    said = " ".join(found.output.split())
    assert "check did not call it" in said
    assert f"{factory!r} is code by its place" in said
    assert "--allow-code" in said
    toy_sites(tmp_path / "data", SITES)
    sites = tmp_path / "sites.yaml"
    sites.write_text("sites:\n" + "".join(f"  {n}: {{data: data/{n}, plugins: ['{factory}']}}\n" for n in SITES))
    for command in (["check", str(study), "--sites", str(sites)], ["run", str(study), "--sites", str(sites)]):
        refused = CliRunner().invoke(
            app, [*command, *(["--out", str(tmp_path / "out")] if command[0] == "run" else [])]
        )
        assert refused.exit_code == 2, refused.output
    assert not trace.exists()
    assert not (tmp_path / "out").exists()


def test_check_says_what_a_stranger_asks_and_calls_it_when_told_to(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        (TASK % ("tests.toys:make_task", "x")).replace('{command: "touch x"}', "{}").replace("gift", "toy")
    )
    quiet = CliRunner().invoke(app, ["check", str(study)])
    assert "Not called" in quiet.output
    assert "loss" not in quiet.output
    asked = CliRunner().invoke(app, ["check", str(study), "--allow-code"])
    assert asked.exit_code == 0, asked.output
    assert "Not called" not in asked.output
    assert "sums over validation patients of r, mse" in " ".join(asked.output.split())


def test_an_installed_plugin_is_called_where_every_site_allows_it(package: Path, tmp_path: Path) -> None:
    some = sites_of(tmp_path / "data", {"A": ("toy",), "B": ("other", "toy")})
    with pytest.raises(StudyError, match=r"task\.factory: site C does not allow the plug-in 'toy'.*sites\.C\.plugins"):
        wardround.run(named(), some, tmp_path / "out")
    assert not (tmp_path / "imported").exists()
    everyone = sites_of(tmp_path / "data", dict.fromkeys(SITES, ("toy",)))
    method = {"kind": "custom", "factory": "toy", "options": {}}
    result = wardround.run(named(method=method), everyone, tmp_path / "out", engine="local")
    assert (tmp_path / "imported").exists()
    assert result.participants == tuple(SITES)
    assert wardround.evaluate(tmp_path / "out", everyone, engine="local").metrics
    assert in_a_worker(Machine(named(), everyone, tmp_path, ())).task.metrics
    with pytest.raises(StudyError, match="does not allow the plug-in"):
        assert in_a_worker(Machine(named(), some, tmp_path, ())).task
    with pytest.raises(StudyError, match="does not allow the plug-in"):
        wardround.evaluate(tmp_path / "out", some, engine="local")


def test_code_by_its_place_needs_the_flag_whatever_a_sites_file_lists(tmp_path: Path) -> None:
    study = toy_study(schedule={"rounds": 1})
    listed = sites_of(tmp_path / "data", dict.fromkeys(SITES, ("tests.toys:make_task",)))
    with pytest.raises(StudyError, match="give --allow-code"):
        wardround.run(study, listed, tmp_path / "out")
    assert wardround.run(study, listed, tmp_path / "out", engine="local", allow_code=True)
    assert in_a_worker(Machine(study, listed.with_code(), tmp_path, ())).task.metrics
    with pytest.raises(StudyError, match="give --allow-code"):
        assert in_a_worker(Machine(study, listed, tmp_path, ())).task
    # No file can ask for it: who starts a run does, each time.
    text = "allow_code: true\nsites: {A: {data: .}}\n"
    (tmp_path / "sites.yaml").write_text(text)
    with pytest.raises(StudyError, match="allow_code: unknown key"):
        load_sites(tmp_path / "sites.yaml")
    (tmp_path / "sites.yaml").write_text("sites: {A: {data: ., plugins: [toy]}}\n")
    assert load_sites(tmp_path / "sites.yaml").of("A").plugins == ("toy",)
    assert not load_sites(tmp_path / "sites.yaml").allows_code


def test_a_name_without_an_entry_point_imports_nothing(package: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"'toy_plugins' cannot be imported.*wardround.tasks: toy"):
        Plugins({"A": frozenset({"toy_plugins"})}).load("task", "toy_plugins")
    assert not (tmp_path / "imported").exists()
    double = package / "again-1.dist-info"
    double.mkdir()
    (double / "METADATA").write_text("Metadata-Version: 2.1\nName: again\nVersion: 1\n")
    (double / "entry_points.txt").write_text("[wardround.tasks]\ntoy = elsewhere:make\n")
    with pytest.raises(StudyError, match="several installed packages"):
        Plugins({"A": frozenset({"toy"})}).load("task", "toy")


def test_a_site_without_data_of_its_own_has_nothing_to_allow(package: Path, tmp_path: Path) -> None:
    roles = {"A": {}, "B": {}, "C": {}, "D": {"role": "unseen", "scans": ["A"]}}
    sites = sites_of(tmp_path / "data", dict.fromkeys(SITES, ("toy",)))
    study = named(sites=roles)
    assert Machine(study, sites, tmp_path / "out", ()).task.metrics
    assert not list(Plugins.of(study, sites).refused(study))
