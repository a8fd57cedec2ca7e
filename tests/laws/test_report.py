"""The law of the honest report: every number can be measured again, by any engine, from what was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.federation.rig import Rig
from tests.toys import toy_sites, toy_study
from wardround.errors import DataError, JournalError, StudyError
from wardround.federation.release import load_model
from wardround.results.files import read_result
from wardround.runs.session import Result, evaluate, run
from wardround.study.sites import Egress, SitesFile
from wardround.wire.tensors import tensors_sha256

STUDY = toy_study(
    method={"kind": "fedbn"},
    task={"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}},
    sites={"A": {}, "B": {}, "C": {}, "D": {"role": "unseen"}},
    schedule={"rounds": 3},
)
COMPARE = ("local", "pooled")


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> SitesFile:
    return toy_sites(tmp_path_factory.mktemp("data"), tuple(STUDY.sites))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, sites: SitesFile) -> Result:
    return run(STUDY, sites, tmp_path_factory.mktemp("run") / "out", compare=COMPARE, engine="local")


@torch.no_grad()
def _mse(tensors: dict[str, Any], rig: Rig, site: str, own: Path, *, unseen: bool) -> float:
    """A test error computed outside every room of the product."""
    model = rig.host.task.build_model()
    private = load_file(own) if own.exists() else {}
    model.load_state_dict({n: torch.from_numpy(t) for n, t in {**tensors, **private}.items()})
    model.eval()
    # FedBN serves a site that did not train with statistics of what it is given, as in training.
    model[1].train(unseen)
    values = []
    for _, (x, y) in rig.host.dataset(site).evaluation("test"):
        values.append(float((model(x) - y).square().mean()))
    return float(np.mean(values))


def test_every_metric_is_measured_again_exactly(finished: Result, sites: SitesFile) -> None:
    measured = evaluate(finished.out, sites, engine="local")
    for key in ("metrics", "gains", "left_out", "withheld", "failed"):
        assert getattr(measured, key) == getattr(finished, key)
    assert finished == read_result(finished.out)
    assert finished.values == json.loads((finished.out / "result.json").read_text())
    assert set(finished.metrics) == {"federated", "local", "pooled"}
    assert set(finished.metrics["federated"]) == {"A", "B", "C", "D", "mean"}


def test_the_numbers_are_those_of_the_saved_models(finished: Result, tmp_path: Path) -> None:
    rig, out = Rig(STUDY, tmp_path), finished.out
    metrics = finished.metrics
    for site in STUDY.sites:
        for arm, file in (("federated", "federated"), ("pooled", "pooled"), ("local", f"local-{site}")):
            if arm == "local" and site == "D":
                continue
            tensors, _ = load_model(out / "models" / f"{file}.safetensors")
            value = metrics[arm][site]["mse"].value
            own = out / "models" / site / file / "local.safetensors"
            again = _mse(tensors, rig, site, own, unseen=arm == "federated" and site == "D")
            assert value == pytest.approx(again, abs=2e-6), (arm, site)
    rows = [metrics["federated"][s]["mse"].value for s in STUDY.training_sites]
    assert metrics["federated"]["mean"]["mse"].value == pytest.approx(np.mean(rows), abs=2e-6)
    gain = finished.gains["federated"]["pooled"]["A"]["mse"].value
    assert gain == pytest.approx(metrics["pooled"]["A"]["mse"].value - rows[0], abs=2e-6)


def test_hashes_are_those_of_the_saved_models(finished: Result) -> None:
    tensors, metadata = load_model(finished.out / "models" / "federated.safetensors")
    shared = {name: tensors[name] for name in metadata["shared"].split(" ")}
    assert finished.model_sha256 == tensors_sha256(shared)
    assert "1.running_mean" not in shared
    for site, sha in finished.local_sha256.items():
        own = load_file(finished.out / "models" / site / "federated" / "local.safetensors")
        assert sha == tensors_sha256(own)
    assert set(finished.local_sha256) == {"A", "B", "C"}


def test_evaluating_measures_and_does_not_remember(finished: Result, sites: SitesFile) -> None:
    """Data that changed since are noticed: no number comes from a cached answer."""
    changed = sites.of("B").data[0] / "changed"
    changed.touch()
    try:
        measured = evaluate(finished.out, sites, engine="local")
    finally:
        changed.unlink()
    assert measured.metrics["federated"]["B"] is None
    assert "changed since the run began" in measured.failed["B"]
    assert measured.withheld == {}
    assert measured.metrics["federated"]["A"] == finished.metrics["federated"]["A"]
    assert evaluate(finished.out, sites, engine="local").metrics == finished.metrics


@pytest.mark.slow
def test_worker_processes_give_the_same_bits(finished: Result, sites: SitesFile, tmp_path: Path) -> None:
    other = run(STUDY, sites, tmp_path / "out", compare=COMPARE, engine="workers", processes=2)
    for key in ("model_sha256", "local_sha256", "metrics", "gains", "selected_round", "study_sha256"):
        assert getattr(other, key) == getattr(finished, key), key

    def told(out: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
        timed = ("seconds", "coordinator_seconds", "training_seconds")
        return [{k: v for k, v in line.items() if k not in timed} for line in lines]

    assert told(other.out) == told(finished.out)


def test_rounds_are_written_again_from_the_journal(finished: Result, sites: SitesFile) -> None:
    path = finished.out / "rounds.jsonl"
    before = path.read_text()
    lines = [json.loads(line) for line in before.splitlines()]
    arms = ("pooled", "federated", "local/A", "local/B", "local/C")
    assert [(line["arm"], line["round"]) for line in lines] == [(arm, n) for arm in arms for n in (1, 2, 3)]
    assert all(line["validation"] for line in lines)
    path.unlink()
    again = run(STUDY, sites, finished.out, compare=COMPARE, engine="local", resume=True)
    assert path.read_text() == before
    assert again.model_sha256 == finished.model_sha256
    assert again.metrics == finished.metrics


def test_a_site_that_withholds_has_null_and_a_reason(sites: SitesFile, tmp_path: Path) -> None:
    shy = sites.of("C").model_copy(update={"egress": Egress(per_site_results=False)})
    closed = sites.model_copy(update={"sites": {**sites.sites, "C": shy}})
    values = run(STUDY, closed, tmp_path / "out", engine="local")
    row = values.metrics["federated"]
    assert row["C"] is None
    assert "mean" in row
    assert row["mean"] is None
    assert row["A"]["mse"].n == 2
    assert values.withheld.keys() == {"C"}
    assert values.failed == {}
    assert "egress.per_site_results is false" in values.withheld["C"]
    # Its patients still count in the sums over all sites.
    lines = [json.loads(line) for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]
    assert all(line["participants"] == ["A", "B", "C"] for line in lines)


def test_a_foreign_or_broken_model_is_refused(sites: SitesFile, tmp_path: Path) -> None:
    ours = run(STUDY, sites, tmp_path / "ours", engine="local").out
    other = STUDY.model_copy(update={"seed": 99})
    theirs = run(other, sites, tmp_path / "theirs", engine="local").out
    path = ours / "models" / "federated.safetensors"
    good = path.read_bytes()

    path.write_bytes((theirs / "models" / "federated.safetensors").read_bytes())
    with pytest.raises(StudyError, match="belongs to another study"):
        evaluate(ours, sites, engine="local")
    for bad in (good[: len(good) // 2], b"\xff" * 40, b""):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="cannot be read"):
            evaluate(ours, sites, engine="local")
    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(DataError, match="not a model"):
        evaluate(ours, sites, engine="local")
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        evaluate(ours, sites, engine="local")
    path.write_bytes(good)
    assert evaluate(ours, sites, engine="local").metrics["federated"]["A"]
    (ours / "study.yaml").write_text((theirs / "study.yaml").read_text())
    with pytest.raises(StudyError, match=r"not the study of result\.json"):
        evaluate(ours, sites, engine="local")
    with pytest.raises(JournalError, match="no finished run"):
        evaluate(tmp_path / "nothing", sites, engine="local")
