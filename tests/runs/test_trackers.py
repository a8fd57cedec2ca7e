"""Trackers hear the numbers of rounds.jsonl and no others; a run is the same with and without them, or as they fail."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner

from tests.runs.test_watching import _report
from tests.toys import toy_sites, toy_study
from wardround import Result, run
from wardround.cli import app
from wardround.errors import Interrupted, MissingExtra, StudyError
from wardround.runs.trackers import Tracker, Trackers, numbers_of
from wardround.runs.watching import Shielded, Silent
from wardround.storage.journal import RoundReport


class Writer:
    """In the place of TensorBoard's writer: keeps what it is given."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, log_dir: str) -> None:
        self.folder, self.closed = log_dir, False
        self.numbers: list[tuple[str, float, int]] = []
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.numbers.append((name, value, step))

    def close(self) -> None:
        self.closed = True


class Client:
    """In the place of MLflow's client."""

    made: ClassVar[list[Client]] = []

    def __init__(self, tracking_uri: str, registry_uri: str) -> None:
        self.uri, self.ended = tracking_uri, False
        self.numbers: list[tuple[str, float, int]] = []
        assert registry_uri == tracking_uri
        Client.made.append(self)

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return "1"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.name = run_name
        return SimpleNamespace(info=SimpleNamespace(run_id="7"))

    def log_metric(self, number: str, name: str, value: float, step: int) -> None:
        self.numbers.append((name, value, step))

    def set_terminated(self, number: str) -> None:
        self.ended = True


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Both packages, as modules that keep what a run sends them."""
    for name, members in {
        "torch.utils.tensorboard": {"SummaryWriter": Writer},
        "mlflow": {},
        "mlflow.tracking": {"MlflowClient": Client},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere.invalid")
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", "")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "")
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    yield
    Writer.made.clear()
    Client.made.clear()


def _go(folder: Path, name: str = "out", **options: Any) -> Result:
    study = toy_study(("A", "B"), schedule={"rounds": 2})
    return run(study, toy_sites(folder / "data", ("A", "B")), folder / name, engine="local", **options)


def test_trackers_get_every_finite_number_of_the_record_once_and_nothing_else(fakes: None, tmp_path: Path) -> None:
    plain = _go(tmp_path, "plain", quiet=True)
    result = _go(tmp_path, quiet=True, compare=["local"], track=["tensorboard:board", "mlflow"])
    assert result.model_sha256 == plain.model_sha256
    lines = [json.loads(line) for line in (result.out / "rounds.jsonl").read_text().splitlines()]
    expected = {
        (f"{name}/{line['arm']}", value, line["round"])
        for line in lines
        for name, value in {
            **{key: line[key] for key in line if isinstance(line[key], int | float)},
            **{f"validation_{key}": value for key, value in line["validation"].items()},
            "sites": len(line["participants"]),
        }.items()
        if name not in ("round", "attempt", "coordinator_seconds")
    }
    (writer,), (client,) = Writer.made, Client.made
    for sink in (writer, client):
        assert set(sink.numbers) == expected
        assert len(sink.numbers) == len(expected)
    assert writer.folder == str(Path("board") / "out")
    assert client.name == "out"
    assert writer.closed
    assert client.ended


def test_mlflow_stays_in_a_local_folder_and_sends_no_telemetry_unless_a_place_is_given(
    fakes: None, tmp_path: Path
) -> None:
    for place in ("mlflow", "mlflow:http://server.invalid:5000"):
        tracker = Trackers.of([place], "out")
        assert not Client.made[1:]
        tracker.beside(Shielded(None)).round(_report("federated", 1))
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert [client.uri for client in Client.made] == [
        f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}",
        "http://server.invalid:5000",
    ]


@pytest.mark.parametrize(
    ("place", "module"), [("tensorboard:x", "torch.utils.tensorboard"), ("mlflow", "mlflow.tracking")]
)
def test_a_missing_package_is_an_error_that_says_what_to_install_before_anything_is_written(
    place: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    extra = place.partition(":")[0]
    with pytest.raises(MissingExtra, match=rf"--track {extra} needs .*pip install 'wardround\[{extra}\]'"):
        _go(tmp_path, track=[place])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["tensorboard", "tensorboard:", "wandb", "mlflows:x"])
def test_an_unknown_tracker_is_an_error_on_the_command_line(place: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="give tensorboard:FOLDER, mlflow or mlflow:URI"):
        Trackers.of([place], "out")
    (tmp_path / "study.yaml").write_text("name: x\nsites: {A: {}}\n")
    words = ["run", str(tmp_path / "study.yaml"), "--sites", str(tmp_path / "none.yaml"), "--track", place, "--quiet"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 2
    assert f"--track {place}: unknown tracker" in " ".join(said.stderr.split())


class _Failing(Writer):
    def add_scalar(self, name: str, value: float, step: int) -> None:
        raise OSError("no space")

    def close(self) -> None:
        raise OSError("no space")


def test_a_tracker_that_fails_is_named_once_and_disturbs_neither_the_run_nor_the_others(
    fakes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.modules["torch.utils.tensorboard"], "SummaryWriter", _Failing)
    result = _go(tmp_path, quiet=True, track=["tensorboard:board", "mlflow"])
    assert result.rounds == 2
    assert {step for _, _, step in Client.made[0].numbers} == {1, 2}
    said = [message for message in caplog.messages if "OSError" in message]
    assert ["goes on" in message for message in said] == [True, False]
    assert "did not close" in said[1]


def test_a_watcher_that_stops_the_run_still_does_and_the_round_is_tracked() -> None:
    class Stopping(Silent):
        def round(self, report: RoundReport) -> None:
            raise Interrupted("stop")

    sink = Writer("")
    sink_like = SimpleNamespace(add=sink.add_scalar, close=sink.close)
    both = Trackers((Tracker(lambda: sink_like),)).beside(Shielded(Stopping()))
    with pytest.raises(Interrupted):
        both.round(_report("federated", 1))
    assert ("loss/federated", 0.5, 1) in sink.numbers


def test_what_is_no_number_is_not_sent() -> None:
    report = _report("federated", 1, loss=float("nan"), validation={"psnr": float("inf"), "ssim": 0.5})
    assert dict(numbers_of(report)).keys() & {"loss", "validation_psnr", "validation_ssim"} == {"validation_ssim"}
    assert "loss" not in dict(numbers_of(_report("federated", 1, loss=None)))
