"""Studies of the networks for MRI: they train together, and a run that is stopped and goes on gives the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.apart import comparable
from tests.mri_hospitals import make_hospitals, write_study
from wardround.cli import app
from wardround.errors import Interrupted, StudyError
from wardround.federation.release import model_path
from wardround.plan.weights import load_model
from wardround.runs.export import export
from wardround.runs.session import run

QUICK = {"local": {"steps": 1, "batch": 2, "optimizer": "adam"}, "schedule": {"rounds": 2}}


class Stops:
    """Ctrl-C after the first round."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def round(self, _: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [{"kind": "varnet"}, {"kind": "e2e_varnet"}, {"kind": "swin_denoiser", "prompts": 3}],
    ids=lambda g: g["kind"],
)
def test_a_federation_trains_it_and_resumes(given: dict[str, Any], tmp_path: Path) -> None:
    """Sites have 4 and 6 coils. The second run forgets activations, too, which changes no bit."""
    study, sites = write_study(tmp_path, make_hospitals(tmp_path), model={**given, "preset": "tiny"}, **QUICK)
    printed = CliRunner().invoke(app, ["check", str(study), "--sites", str(sites)], catch_exceptions=False)
    assert printed.exit_code == 0, printed.output
    assert f"{given['kind']}, preset tiny" in printed.output
    whole = run(study, sites, tmp_path / "whole", engine="local", quiet=True)
    assert whole.metric("federated", "mean", "psnr") > 0.0
    with pytest.raises(Interrupted):
        run(study, sites, tmp_path / "out", engine="local", watcher=Stops())  # type: ignore[arg-type]
    again = run(study, sites, tmp_path / "out", engine="local", quiet=True, resume=True)
    assert again.model_sha256 == whole.model_sha256
    assert comparable(again.values) == comparable(whole.values)
    with pytest.raises(StudyError, match="models of images can be exported"):
        export(model_path(tmp_path / "whole", "federated"), tmp_path / "network.onnx")


@pytest.mark.slow
def test_prompts_alone_are_trained_and_exchanged_on_a_pretrained_network(tmp_path: Path) -> None:
    """The pretraining has no prompts: those of the adaptation begin fresh, and all else stays as it was released."""
    data, swin = make_hospitals(tmp_path), {"kind": "swin_denoiser", "preset": "tiny"}
    first = run(
        *write_study(tmp_path / "first", data, model=swin, **QUICK), tmp_path / "pretrained", engine="local", quiet=True
    )
    changes: dict[str, Any] = {
        "model": {**swin, "prompts": 3},
        "start": {"kind": "release", "file": "pretrained", "sha256": first.model_sha256, "partial": True},
        "adapters": {"kind": "partial", "trained": ["*.prompts"]},
        **QUICK,
    }
    study, sites = write_study(tmp_path, data, **changes)
    second = run(study, sites, tmp_path / "adapted", engine="local", quiet=True)
    before, after = (load_model(model_path(out, "federated"))[0] for out in (first.out, second.out))
    prompts = {name for name in after if name.endswith(".prompts")}
    assert len(prompts) == 2
    assert prompts == set(after) - set(before) or prompts == set(after)
    for name in set(before) & set(after):
        np.testing.assert_array_equal(after[name], before[name])
    assert second.values["traffic"]["bytes_up"] < first.values["traffic"]["bytes_up"] / 4
