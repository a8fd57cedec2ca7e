"""LoRA adapters in the folders of Hugging Face's peft: written, read back, refused where they mean something else."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from tests.diagnoses import diagnosis_study
from tests.plain import plain
from wardround.cli import app
from wardround.errors import DataError, StudyError
from wardround.models.adapters import attach, products
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.found import file_sha256
from wardround.plan.peft import CONFIG, MODEL
from wardround.runs.adapter_files import write_adapter
from wardround.runs.merging import opened
from wardround.study.adapters import LoRA
from wardround.study.schema import Study
from wardround.study.sites import SiteData

TARGETS = ["encoder.*.q_proj", "encoder.*.v_proj"]
LORA: dict[str, Any] = {"kind": "lora", "targets": TARGETS, "rank": 2, "alpha": 3.0, "trained": ["head.bias"]}
# A few roundings of float32 in some tens of terms of order one, through four blocks.
CLOSE = 1000 * torch.finfo(torch.float32).eps
VIT = {"kind": "vit", "preset": "tiny"}
DENSENET = {"kind": "densenet", "preset": "tiny"}


def study_on(folder: Path, adapters: dict[str, Any] = LORA, model: dict[str, Any] = VIT, **start: Any) -> Study:
    """A study that starts from a base of its own, which is written to `folder`."""
    fresh = diagnosis_study({"A": {}}, model=model)
    base = folder / "base.safetensors"
    if not base.exists():
        torch.manual_seed(9)
        save_file({n: t.clone() for n, t in ArmSpecs(fresh, ()).task.build_model().state_dict().items()}, base)
    begins = {"kind": "weights", "file": base.name, "sha256": file_sha256(base), **start}
    return diagnosis_study({"A": {}}, model=model, adapters=adapters, start=begins)


def specs_of(study: Study, folder: Path) -> ArmSpecs:
    return ArmSpecs(study, (), places=study.places(folder))


def written(folder: Path, adapters: dict[str, Any] = LORA, model: dict[str, Any] = VIT) -> tuple[Path, Path]:
    """A released model of random adapters, and its folder for peft."""
    released = plain(specs_of(study_on(folder, adapters, model), folder), folder / "model.safetensors")
    write_adapter(released, folder / "adapter")
    return released, folder / "adapter"


def adapter(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"file": "adapter", "sha256": file_sha256(folder / "adapter" / MODEL), **changes}


def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def network_of(model: Path) -> nn.Module:
    released = opened(model)
    return released.network(released.build, None, None)


@pytest.mark.parametrize("stabilised", [False, True])
def test_a_folder_is_what_peft_documents(tmp_path: Path, stabilised: bool) -> None:
    """Names, shapes and settings by its page on the format; what they mean is computed by its formula."""
    released, folder = written(tmp_path, {**LORA, "rank_stabilised": stabilised})
    says, held = json.loads((folder / CONFIG).read_text()), load_file(folder / MODEL)
    study = opened(released).study
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, MODEL]
    assert (says["peft_type"], says["r"], says["lora_alpha"], says["use_rslora"]) == ("LORA", 2, 3.0, stabilised)
    assert (says["bias"], says["fan_in_fan_out"], says["modules_to_save"]) == ("none", False, ["head"])
    assert says["base_model_name_or_path"] == f"sha256:{study.start.sha256}"  # type: ignore[union-attr]
    network, bare = network_of(released), opened(released).build()
    adapted = {name for name, layer in network.named_modules() if products(layer)}
    assert {name for name, _ in bare.named_modules() if re.fullmatch(says["target_modules"], name)} == adapted
    ends = ("lora_A.weight", "lora_B.weight")
    factors = {f"base_model.model.{name}.{end}" for name in adapted for end in ends}
    assert held.keys() == factors | {"base_model.model.head.weight", "base_model.model.head.bias"}
    bare.load_state_dict({n: t for n, t in network.state_dict().items() if "lora" not in n})
    with torch.no_grad():
        for name in adapted:
            a, b = (held[f"base_model.model.{name}.{end}"] for end in ends)
            scale = 3.0 / (math.sqrt(2) if stabilised else 2)
            bare.get_submodule(name).get_parameter("weight").add_(scale * b @ a)
        one, other = bare.eval()(images()), network(images())
    assert float((one - other).abs().max()) <= CLOSE * float(other.abs().max())


@pytest.mark.parametrize("model", [VIT, DENSENET], ids=["linear", "convolutions"])
def test_a_study_begins_with_what_another_wrote(tmp_path: Path, model: dict[str, Any]) -> None:
    adapters = LORA if model is VIT else {**LORA, "targets": ["*.conv2"], "trained": []}
    released, _ = written(tmp_path, adapters, model)
    study = study_on(tmp_path, adapters, model, adapter=adapter(tmp_path))
    begun = specs_of(study, tmp_path).model_context.model
    known = network_of(released).state_dict()
    assert all(torch.equal(t, known[name]) for name, t in begun.state_dict().items())
    assert f"with the adapter of sha256 {adapter(tmp_path)['sha256']}" in study.start.describe()


def test_an_adapter_brings_the_layers_that_a_measured_base_lacks(tmp_path: Path) -> None:
    """A study that trains nothing needs every value: the head of a published encoder is in the folder."""
    released, folder = written(tmp_path)
    says = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**says, "base_model_name_or_path": "somebody/vit"}))
    encoder = {n: t for n, t in load_file(tmp_path / "base.safetensors").items() if not n.startswith("head.")}
    save_file(encoder, tmp_path / "base.safetensors")

    def begun(**start: Any) -> dict[str, torch.Tensor]:
        study = study_on(tmp_path, partial=True, **start)
        measured = study.model_copy(update={"schedule": study.schedule.model_copy(update={"rounds": 0})})
        return specs_of(measured, tmp_path).model_context.model.state_dict()

    known = network_of(released).state_dict()
    assert all(torch.equal(t, known[name]) for name, t in begun(adapter=adapter(tmp_path)).items())
    with pytest.raises(StudyError, match=r"no values for head.weight, head.bias, and with schedule.rounds 0"):
        begun()


def test_a_site_has_the_folder_anywhere_among_its_weights(tmp_path: Path) -> None:
    released, folder = written(tmp_path)
    moved = tmp_path / "shelf" / "of" / "mine"
    moved.parent.mkdir(parents=True)
    study = study_on(tmp_path, adapter=adapter(tmp_path))
    folder.rename(moved)
    with pytest.raises(StudyError, match=r"start.adapter.file: adapter is no folder, and no .safetensors file of sha"):
        _ = specs_of(study, tmp_path).model_context
    places = study.places(tmp_path, [SiteData(data=(tmp_path,), weights=(tmp_path / "shelf",))])
    begun = ArmSpecs(study, (), places=places).model_context.model.state_dict()
    known = network_of(released).state_dict()
    assert all(torch.equal(t, known[name]) for name, t in begun.items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peft_type": "LOHA"}, "is of type 'LOHA', and a study begins with LORA alone"),
        ({"use_dora": True}, "has use_dora: true, which is not read here"),
        ({"rank_pattern": {"q_proj": 4}}, 'has rank_pattern: {"q_proj": 4}, which is not read here'),
        ({"init_lora_weights": "pissa"}, "has init_lora_weights"),
        ({"of_a_later_version": 1}, "has of_a_later_version: 1, which is not read here"),
        ({"r": 4}, "has rank 4, and adapters.rank is 2; set it to 4"),
        ({"lora_alpha": 8}, "counts its product 4 times, and the study 1.5 times; set adapters.alpha: 8"),
        ({"r": True}, "has no numbers `r` and `lora_alpha`"),
        ({"base_model_name_or_path": "sha256:" + "ab" * 32}, "is of the base sha256:abab.* start from its own base"),
        (None, "is no JSON of settings"),
    ],
)
def test_settings_that_mean_something_else_are_refused(
    tmp_path: Path, change: dict[str, Any] | None, reason: str
) -> None:
    _, folder = written(tmp_path)
    says = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text("{" if change is None else json.dumps({**says, **change}))
    with pytest.raises(StudyError, match=rf"^start\.adapter\.file: adapter.*{reason}"):
        _ = specs_of(study_on(tmp_path, adapter=adapter(tmp_path)), tmp_path).model_context


@pytest.mark.parametrize(
    ("adapters", "reason"),
    [
        (
            {**LORA, "targets": [*TARGETS, "encoder.*.k_proj"]},
            r"has no factors for encoder.*k_proj.*adapters",
        ),
        ({**LORA, "targets": TARGETS[:1]}, r"has factors for encoder.*v_proj, which adapters.targets does not name"),
        ({"kind": "partial", "trained": ["head.*"]}, "is LoRA, and the study's adapters are not"),
    ],
)
def test_layers_that_differ_are_named(tmp_path: Path, adapters: dict[str, Any], reason: str) -> None:
    written(tmp_path)
    with pytest.raises(StudyError, match=reason):
        _ = specs_of(study_on(tmp_path, adapters, adapter=adapter(tmp_path)), tmp_path).model_context


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sha256": ""}, r"start.adapter.sha256: is missing.*write `sha256: {found}`"),
        ({"sha256": "ab" * 32}, r"holds another adapter_model.safetensors than the study's: its sha256 is {found}"),
    ],
)
def test_another_file_than_the_studys_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    _, folder = written(tmp_path)
    study = study_on(tmp_path, adapter=adapter(tmp_path, **change))
    with pytest.raises(StudyError, match=reason.format(found=file_sha256(folder / MODEL))):
        _ = specs_of(study, tmp_path).model_context


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    _, folder = written(tmp_path)
    study = study_on(tmp_path, adapter=adapter(tmp_path))
    (folder / MODEL).rename(folder / "adapter_model.bin")
    with pytest.raises(StudyError, match=r"has no adapter_model.safetensors; .* is a pickle, which is not opened"):
        _ = specs_of(study, tmp_path).model_context


def test_tensors_that_do_not_fit_leave_the_model_as_it_was(tmp_path: Path) -> None:
    _, folder = written(tmp_path)
    held = load_file(folder / MODEL)
    last = next(name for name in sorted(held) if "lora_B" in name)
    save_file({**held, last: torch.zeros(1, 2)}, folder / MODEL)
    with pytest.raises(StudyError, match=r"lora_B.weight of shape \[1, 2\], and the network"):
        _ = specs_of(study_on(tmp_path, adapter=adapter(tmp_path)), tmp_path).model_context
    save_file({**held, "base_model.model.decoder.weight": torch.zeros(1)}, folder / MODEL)
    with pytest.raises(StudyError, match=r"base_model.model.decoder.weight has no place in the network"):
        _ = specs_of(study_on(tmp_path, adapter=adapter(tmp_path)), tmp_path).model_context


def test_the_command_prints_what_a_study_says_and_overwrites_nothing(tmp_path: Path) -> None:
    released, folder = written(tmp_path)
    command = ["weights", "adapter", str(released), "--out", str(folder)]
    again = CliRunner().invoke(app, command)
    assert again.exit_code != 0
    assert "holds an adapter already; add --force" in " ".join(again.output.split())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shown = CliRunner().invoke(app, [*command, "--force"])
    assert shown.exit_code == 0, shown.output
    assert f"adapter: file: adapter sha256: {file_sha256(folder / MODEL)}" in " ".join(shown.output.split())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_what_peft_would_compute_otherwise_is_not_written(tmp_path: Path) -> None:
    """Names of trained layers match by their ends there: `head` is the end of `head`, and of nothing else here."""
    adapters = {**LORA, "trained": ["encoder.blocks.0.attention.q_proj.bias"]}
    released = plain(specs_of(study_on(tmp_path, adapters), tmp_path), tmp_path / "model.safetensors")
    with pytest.raises(StudyError, match=r"q_proj was trained beside the adapters, .*which peft cannot hold"):
        write_adapter(released, tmp_path / "adapter")
    with pytest.raises(DataError, match="is a file; name a folder"):
        write_adapter(released, released)
    assert not (tmp_path / "adapter").exists()


# The real package, where it is installed ----------------------------------------------------------------------------


class Small(nn.Module):
    """Linear layers and convolutions of each kind that both have."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.image = nn.Conv1d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False)
        self.volume, self.head = nn.Conv3d(5, 6, (1, 2, 2)), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.image(torch.relu(self.line(x)).unflatten(-1, (4, 4)))
        found: torch.Tensor = self.head(self.volume(y.unsqueeze(2)).flatten(2).mean(2))
        return found


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(("stabilised", "model"), [(False, VIT), (True, VIT), (True, DENSENET)])
def test_peft_gives_the_same_outputs(tmp_path: Path, own: bool, stabilised: bool, model: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    layers = {} if model is VIT else {"targets": ["*.conv2"], "trained": []}
    adapters = {**LORA, **layers, "rank_stabilised": stabilised, "local_rank": 1 if own else 0}
    study = study_on(tmp_path, adapters, model)
    released = plain(specs_of(study, tmp_path), tmp_path / "model.safetensors")
    write_adapter(released, tmp_path / "adapter")
    network = network_of(released)
    bare = opened(released).build()
    bare.load_state_dict(load_file(tmp_path / "base.safetensors"))
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "adapter").eval()(images())
        ours = network(images())
    assert float((theirs - ours).abs().max()) <= CLOSE * float(ours.abs().max())


def test_what_peft_saved_begins_a_network_alike(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from wardround.plan.peft import begin_with_adapter
    from wardround.study.start import FromAdapter

    torch.manual_seed(0)
    base, x = Small().eval(), torch.randn(2, 3, 16)
    targets = ("line", "image", "volume")
    before = {name: t.clone() for name, t in base.state_dict().items()}
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=list(targets), modules_to_save=["head"])
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
        expected = theirs(x)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = Small().eval()
    ours.load_state_dict(before)
    lora = LoRA(kind="lora", targets=targets, rank=2, alpha=3.0, trained=("head.*",))
    attach(ours, lora)
    begin_with_adapter(FromAdapter(**adapter(tmp_path)), tmp_path / "adapter", "ab" * 32, lora, ours)
    found = ours(x).detach()
    assert float((found - expected).abs().max()) <= CLOSE * float(expected.abs().max())
