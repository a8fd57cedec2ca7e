"""`wardround plan`: what it says is what a run then takes, and a site too small is refused before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.diagnoses import diagnosis_study
from tests.toys import toy_sites, toy_study
from wardround.cli import app
from wardround.errors import StudyError
from wardround.federation.expected import expected
from wardround.learning.device import CPU
from wardround.runs.machine import NOWHERE, Machine
from wardround.runs.outlook import bits_of, outlook
from wardround.runs.session import run
from wardround.site.memory import CONTEXT, GIGABYTE, footprint_of, processes_that_fit
from wardround.study.hashes import written
from wardround.study.schema import Study
from wardround.study.sites import SitesFile

SITES: dict[str, Any] = {"A": {}, "B": {}, "C": {"role": "evaluate"}, "D": {"role": "unseen"}}
NORM = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}}
ROUNDS = 3


def study(**changes: Any) -> Study:
    return toy_study(SITES, task=NORM, schedule={"rounds": ROUNDS}, **changes)


def files(folder: Path, study: Study, sites: dict[str, Any] | None = None) -> tuple[Path, Path]:
    paths = folder / "study.yaml", folder / "sites.yaml"
    paths[0].write_text(yaml.safe_dump(written(study)))
    entries = {name: {"data": f"data/{name}", **more} for name, more in (sites or {}).items()}
    paths[1].write_text(yaml.safe_dump({"sites": entries}))
    return paths


@pytest.mark.parametrize("changes", [{}, {"parts": {"frozen": ["0.*"]}}, {"method": {"kind": "fedbn"}}])
def test_a_run_takes_what_was_planned(tmp_path: Path, changes: dict[str, Any]) -> None:
    sites = toy_sites(tmp_path / "data", tuple(SITES))
    found = run(study(**changes), sites, tmp_path / "out", engine="local", quiet=True).traffic
    bill = expected(Machine(study(**changes), sites, tmp_path / "out", ()))
    rounds, tests = found.arms["federated"].rounds, found.arms["federated"].tests
    trained, validated = 2 * ROUNDS, ROUNDS
    for kind in ("base", "model", "adapters", "metrics", "side_channels"):
        planned = [
            trained * getattr(getattr(bill.training, way), kind)
            + 2 * getattr(getattr(bill.last, way), kind)
            + validated * getattr(getattr(bill.validation, way), kind)
            for way in ("up", "down")
        ]
        assert [getattr(rounds.up, kind), getattr(rounds.down, kind)] == planned
    # The study's own messages have the delivery, whose file is billed by its tensors.
    assert tests.down.model + found.study.down.model == len(SITES) * bill.tests.down.model
    assert tests.up.metrics == len(SITES) * bill.tests.up.metrics
    other = trained * bill.training.down.other + 2 * bill.last.down.other + validated * bill.validation.down.other
    # A scale has up to 22 characters and starts with 3; the heads of two logs are lacking in the first round.
    slack = (trained + 2) * 20 * 10 + validated * 100 + 2 * (3 * 80 + 40)
    assert abs(rounds.down.other - other) <= slack


def test_the_coordinators_side_opens_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: Any) -> None:
        raise AssertionError("a site's data were opened")

    monkeypatch.setattr("wardround.site.datasets.Datasets.of", opened)
    path, _ = files(tmp_path, study(start={"kind": "weights", "file": "absent.safetensors", "sha256": "ab" * 32}))
    done = CliRunner().invoke(app, ["plan", str(path), "--allow-code", "--bandwidth", "8kbit/s"])
    assert done.exit_code == 0, done.output
    assert "at 8kbit/s" in done.stdout
    assert "The step of A, B depends on its data: add --sites, at the site." in " ".join(done.stdout.split())
    assert "coordinator" in done.stdout
    uncalled = CliRunner().invoke(app, ["plan", str(path)])
    assert "Not called" in uncalled.stdout


def test_images_of_the_studys_size_need_no_data(tmp_path: Path) -> None:
    path, _ = files(
        tmp_path, diagnosis_study({"A": {}, "B": {}}, model={"kind": "efficientnet_lite", "preset": "tiny"})
    )
    found = outlook(path, None, (), (), ())
    (memory, room), other = found.memory["A"], found.memory["B"][0]
    assert (memory.how, room) == ("meta", None)
    assert memory == other
    assert "counted in two steps on torch's meta device" in " ".join(found.text.split())


@pytest.mark.slow
def test_a_site_too_small_learns_it_before_it_starts(tmp_path: Path) -> None:
    toy_sites(tmp_path / "data", tuple(SITES))
    entries: dict[str, Any] = {"A": {"memory": 1e-6}, "B": {"memory": 1.0}}
    path, sites = files(tmp_path, study(), entries)
    done = CliRunner().invoke(app, ["plan", str(path), "--sites", str(sites), "--allow-code"])
    assert done.exit_code == 2
    assert "Memory of training" in done.stdout
    assert "too little for a training step at A needs" in " ".join(done.output.split())
    assert "B needs" not in done.output
    # A site's own file alone is enough, at the site.
    path, sites = files(tmp_path, study(), {"B": entries["B"]})
    done = CliRunner().invoke(app, ["plan", str(path), "--sites", str(sites), "--allow-code"])
    assert done.exit_code == 0, done.output
    assert "Room: B " in done.stdout
    assert "of 1.0 GB." in done.stdout

    known = toy_sites(tmp_path / "data", tuple(SITES))
    small = known.sites["A"].model_copy(update={"memory": 1e-6})
    with pytest.raises(StudyError, match=r"sites.SITE.memory: too little for a training step at A needs .* has 1e-06"):
        run(study(), SitesFile(sites={**known.sites, "A": small}).with_code(), tmp_path / "out", engine="local")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_more_workers_than_a_gpu_has_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stand-in says how much a GPU has; the rest is as on one. What a step takes is counted here."""
    known = toy_sites(tmp_path / "data", tuple(SITES))
    host = Machine(study(), known, NOWHERE, ())
    assert host.processes(8) == 8
    taken = max(footprint_of(host, host.dataset(site), CPU).total for site in ("A", "B"))
    free = 3 * (taken + CONTEXT) + 1
    monkeypatch.setattr("wardround.runs.machine.free_memory", lambda compute: free)
    assert (host.processes(8), host.processes(2)) == (3, 2)
    assert "a GPU has room for 3 processes that train at once, of 8: --processes sets another number" in caplog.text
    # What a site's file leaves of it counts where that is less, and one process is always tried.
    small = known.sites["A"].model_copy(update={"memory": (2 * (taken + CONTEXT) + 1) / GIGABYTE})
    assert Machine(study(), SitesFile(sites={**known.sites, "A": small}).with_code(), NOWHERE, ()).processes(8) == 2
    free = 1
    assert host.processes(8) == 1


@pytest.mark.parametrize(
    ("most", "taken", "count"),
    [
        (4, {}, 4),
        (4, {"cuda:0": (10**9, 10**10)}, 4),
        (9, {"cuda:0": (10**9, 10**10)}, 6),
        (9, {"cuda:0": (10**9, 10**10), "cuda:1": (4 * 10**9, 10**10)}, 2),
    ],
)
def test_the_fullest_gpu_decides(most: int, taken: dict[str, tuple[int, int]], count: int) -> None:
    assert processes_that_fit(most, taken) == count


@pytest.mark.parametrize(
    ("text", "bits"), [("100Mbit/s", 1e8), ("1.5 Gbit/s", 1.5e9), ("20MB/s", 1.6e8), ("9600bit/s", 9600.0)]
)
def test_a_bandwidth_is_bits_a_second(text: str, bits: float) -> None:
    assert bits_of(text) == bits


@pytest.mark.parametrize("text", ["100", "fast", "0Mbit/s", "-1Mbit/s", "1Tbit/s", "100 Mbps"])
def test_another_is_one_clear_error(text: str) -> None:
    with pytest.raises(StudyError, match=r"write a number and bit/s or B/s, as in 100Mbit/s"):
        bits_of(text)
