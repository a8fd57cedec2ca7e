"""A released model as ONNX: the same numbers as torch, for any number of examples, and what cannot be exported."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.diagnoses import diagnosis_study
from tests.outlines import outline_study
from tests.runs.test_predict import release
from wardround.cli import app
from wardround.errors import DataError, MissingExtra
from wardround.runs import export as exporting
from wardround.runs.export import export
from wardround.runs.releases import ReleasedModel
from wardround.study.load import load_study
from wardround.tasks.build import build_task

STUDIES = {"segmentation": outline_study({"A": {}}), "classification": diagnosis_study({"A": {}})}


@pytest.mark.parametrize("kind", STUDIES)
def test_onnx_gives_torch_s_numbers(kind: str, tmp_path: Path) -> None:
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    study = STUDIES[kind]
    model, output = release(tmp_path / "model.safetensors", study), tmp_path / "out" / "model.onnx"
    done = CliRunner().invoke(app, ["export", str(model), str(output)])
    assert done.exit_code == 0, done.output
    assert "Research use only" in done.output
    assert [path.name for path in output.parent.iterdir()] == ["model.onnx"]
    task: Any = build_task(study)
    network = ReleasedModel.opened(model).network(task.build_model, None, None)
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    for count in (1, 5):
        batch = torch.randn(count, *task.input_shape())
        with torch.no_grad():
            ours = network(batch).numpy()
        (theirs,) = session.run(["logits"], {"image": batch.numpy()})
        np.testing.assert_allclose(theirs, ours, atol=1e-3 * np.abs(ours).max())
    kept = {prop.key: prop.value for prop in onnx.load(output).metadata_props}
    assert json.loads(kept["study"])["name"] == study.name


def test_other_numbers_than_torch_s_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = release(tmp_path / "model.safetensors", STUDIES["classification"])
    monkeypatch.setattr(exporting, "_exported", lambda *_: b"")
    monkeypatch.setattr(exporting, "_difference", lambda *_: 0.01)
    with pytest.raises(DataError, match="other numbers than torch"):
        export(model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = release(tmp_path / "model.safetensors", STUDIES["segmentation"])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"pip install 'wardround\[onnx\]'"):
        export(model, tmp_path / "model.onnx")
    physics = load_study({"name": "x", "sites": {"A": {}}})
    reconstructor = release(tmp_path / "mri.safetensors", physics)
    done = CliRunner().invoke(app, ["export", str(reconstructor), str(tmp_path / "model.onnx")])
    assert done.exit_code == 2
    assert "this one's task is `reconstruction`" in done.stderr
    assert not (tmp_path / "model.onnx").exists()
