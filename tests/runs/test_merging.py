"""`wardround weights merge`: a model of LoRA adapters as plain weights that give what it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests.diagnoses import diagnosis_study, make_diagnoses
from tests.plain import plain
from wardround.cli import app
from wardround.errors import DataError, StudyError
from wardround.federation.release import model_path
from wardround.models.adapters import attach, merged
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.weights import file_sha256
from wardround.results.schema import Result
from wardround.runs.merging import merge, opened
from wardround.runs.session import run
from wardround.study.adapters import LoRA
from wardround.study.places import Places
from wardround.study.schema import Study

TARGETS = ["encoder.*.q_proj", "encoder.*.v_proj"]
LORA: dict[str, Any] = {"kind": "lora", "targets": TARGETS, "rank": 2, "trained": ["head.*"]}
# Half of the digits of float32, as the command says.
CLOSE = torch.finfo(torch.float32).eps ** 0.5


def trained(folder: Path, adapters: dict[str, Any] = LORA, method: str = "fedavg", **changes: Any) -> Result:
    """A run of two rounds of a small transformer at two sites."""
    sites = make_diagnoses(folder / "data", {"A": (4, 4, 4), "B": (4, 4, 4)})
    study = diagnosis_study(
        {"A": {}, "B": {}},
        model={"kind": "vit", "preset": "tiny"},
        adapters=adapters,
        method={"kind": method},
        local={"steps": 2, "batch": 4, "optimizer": "sgd", "lr": 0.5},
        schedule={"rounds": 2, "release": "last"},
        **changes,
    )
    return run(study, sites, folder / "out", engine="local", quiet=True)


def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def says(model: Path, site: str | None = None) -> torch.Tensor:
    """What a released model gives of some images."""
    released = opened(model)
    with torch.no_grad():
        found: torch.Tensor = released.network(released.build, site, None)(images())
    return found


def starts(study: Study, file: Path) -> torch.Tensor:
    """What a study without adapters gives before round 1 that starts from a file."""
    start = {"kind": "weights", "file": file.name, "sha256": file_sha256(file)}
    plain = Study.model_validate({**study.model_dump(exclude={"adapters", "method"}), "start": start})
    model = ArmSpecs(plain, (), places=Places((file,))).model_context.model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(images())
    return found


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert float((one - other).abs().max()) <= CLOSE * float(other.abs().max())


CASES = [
    pytest.param("fedavg", {"local_rank": 1}, id="dual"),
    pytest.param("fedavg", {"rank_stabilised": True}, id="rslora", marks=pytest.mark.slow),
    pytest.param("fedex_lora", {}, id="fedex", marks=pytest.mark.slow),
    pytest.param("flora", {}, id="flora", marks=pytest.mark.slow),
    pytest.param("fedsa_lora", {}, id="fedsa", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("method", "adapters"), CASES)
def test_the_merged_file_gives_what_the_model_gives(method: str, adapters: dict[str, Any], tmp_path: Path) -> None:
    result = trained(tmp_path, {**LORA, **adapters}, method)
    study, model = opened(result.out).study, model_path(result.out, "federated")
    personal = method == "fedsa_lora" or "local_rank" in adapters
    served: list[str | None] = [*(["A", "B"] if personal else []), *([] if method == "fedsa_lora" else [None])]
    outputs = {}
    for site in served:
        out = tmp_path / f"{site}.safetensors"
        found = merge(result.out if site is None else model, out, site=site)
        assert found.file.sha256 == file_sha256(out)
        assert (found.whole, found.layers) == (True, sum(name.endswith("lora.b.weight") for name in load_file(model)))
        assert found.difference <= CLOSE
        base = opened(model).build().state_dict()
        held = load_file(out)
        assert {name: t.dtype for name, t in held.items()} == {name: t.dtype for name, t in base.items()}
        outputs[site] = starts(study, out)
        assert_close(outputs[site], says(model, site))
    assert len({tuple(o.flatten().tolist()) for o in outputs.values()}) == len(served)
    if method == "fedsa_lora":
        with pytest.raises(StudyError, match="keeps factors at the sites; name one with --site"):
            merge(model, tmp_path / "none.safetensors")
    if not personal:
        with pytest.raises(StudyError, match="--site A: no private part of that site lies beside the model"):
            merge(model, tmp_path / "none.safetensors", site="A")
    assert not (tmp_path / "none.safetensors").exists()


def untrained(folder: Path, adapters: dict[str, Any]) -> Path:
    """A released model of random adapters, without a run."""
    study = diagnosis_study({"A": {}}, model={"kind": "vit", "preset": "tiny"}, adapters=adapters)
    specs = ArmSpecs(study, ())
    return plain(specs, folder / "model.safetensors")


def test_the_command_prints_what_a_study_says(tmp_path: Path) -> None:
    model = untrained(tmp_path, LORA)
    out = tmp_path / "whole.safetensors"
    shown = CliRunner().invoke(app, ["weights", "merge", str(model), "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.output.split())
    assert f"start: kind: weights file: whole.safetensors sha256: {file_sha256(out)}" in said
    assert "4 layers have their products in their weights" in said
    before = out.read_bytes()
    again = CliRunner().invoke(app, ["weights", "merge", str(model), "--out", str(out)])
    assert again.exit_code != 0
    assert "exists already; add --force" in " ".join(again.output.split())
    CliRunner().invoke(app, ["weights", "merge", str(model), "--out", str(out), "--force"])
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("adapters", "reason"),
    [
        ({"kind": "bottleneck", "targets": ["encoder.blocks.0"], "features": 48, "width": 2}, "this model has bottlen"),
        ({"kind": "prompts", "targets": ["encoder.blocks.0"], "features": 48, "tokens": 2}, "this model has 2 prompts"),
        ({"kind": "partial", "trained": ["head.*"]}, r"this model has head\.\* alone"),
        ({"kind": "none"}, "this model has no adapters"),
    ],
)
def test_what_is_no_part_of_a_weight_is_refused(adapters: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=rf"^only low-rank adapters .*{reason}"):
        merge(untrained(tmp_path, adapters), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_that_gives_other_outputs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here products are added to a tensor that the network does not use: nothing of them is in the file."""
    model = untrained(tmp_path, LORA)

    def forgotten(network: torch.nn.Module) -> torch.nn.Module:
        before = {name: t.clone() for name, t in network.state_dict().items()}
        merged(network).load_state_dict({n: t for n, t in before.items() if "lora" not in n})
        return network

    monkeypatch.setattr("wardround.runs.merging.merged", forgotten)
    with pytest.raises(DataError, match=r"give other outputs than the model with its adapters \(by .*nothing was wri"):
        merge(model, tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.glob("out*")) == []


def test_products_of_a_base_of_16_bits_are_rounded_once() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=torch.bfloat16))
    attach(model, LoRA(kind="lora", targets=("0",), rank=2, alpha=2.0, local_rank=2))
    with torch.no_grad():
        for part in ("lora", "lora_local"):
            model.get_parameter(f"0.{part}.b.weight").normal_(std=0.01)
    weight = model.get_parameter("0.weight").detach().double()
    exact = weight + sum(model.get_submodule(f"0.{p}").product() for p in ("lora", "lora_local"))  # type: ignore[operator]
    found = merged(model).get_parameter("0.weight")
    assert found.dtype is torch.bfloat16
    # Half a unit in the last of its 8 digits.
    assert bool(((found.double() - exact).abs() <= exact.abs() * torch.finfo(torch.bfloat16).eps / 2).all())
