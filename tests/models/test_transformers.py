"""Encoders of Hugging Face transformers: the library's logits from published files, offline, and the frame's parts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.devices import arm_specs_of, device_named, step_and_evaluation
from tests.diagnoses import CLASSES, SIZE, diagnosis_study, make_diagnoses
from tests.laws.test_stages import _drawn
from tests.models.test_transformers_config import CONFIGS, folder_of, section
from tests.runs.test_predict import release
from torch import Tensor, nn
from typer.testing import CliRunner

import wardround
from wardround.cli import app
from wardround.errors import JournalError, StudyError
from wardround.learning.frozen import train_mode
from wardround.learning.gradients import BatchedGradients, ExactGradients
from wardround.models.adapters import attach
from wardround.models.transformers_classifier import TransformersClassifier, TransformersSettings
from wardround.models.transformers_config import DINOv2Config, DINOv2WithRegistersConfig, SwinConfig, ViTConfig
from wardround.plan.weights import begin, file_sha256
from wardround.runs.export import export
from wardround.study.adapters import Bottleneck, LoRA, NoAdapters, Partial, Prompts
from wardround.study.load import load_study
from wardround.study.places import Places
from wardround.study.schema import Study
from wardround.study.start import FromWeights
from wardround.tasks.build import build_task

transformers = pytest.importorskip("transformers", reason="the extra `foundation` is not installed")

LIBRARY = {
    "vit": ViTConfig,
    "dinov2": DINOv2Config,
    "dinov2_with_registers": DINOv2WithRegistersConfig,
    "swin": SwinConfig,
}
pytestmark = pytest.mark.slow
EVERY = pytest.mark.parametrize("kind", CONFIGS)


def built(kind: str, channels: int = 3, **changes: Any) -> TransformersClassifier:
    torch.manual_seed(1)
    settings = TransformersSettings.model_validate(section(kind, **changes))
    network: TransformersClassifier = settings.build_classifier(2, channels, len(CLASSES))
    return network


def theirs(kind: str, head: bool = True) -> Any:
    """The library's own network, every value drawn: some begin as zeros or alike."""
    made = getattr(transformers, f"{LIBRARY[kind].library}Config")(
        **CONFIGS[kind], num_labels=len(CLASSES), attn_implementation=LIBRARY[kind].attention
    )
    torch.manual_seed(2)
    network = getattr(transformers, f"{LIBRARY[kind].library}ForImageClassification")(made).eval()
    for value in network.parameters():
        nn.init.normal_(value, std=0.3)
    return network if head else getattr(network, network.base_model_prefix)


def published(place: Path, kind: str) -> Path:
    """The same, with all files that the library would publish."""
    study = folder_of(place, kind)
    theirs(kind).save_pretrained(place / "model")
    return study


def started(network: nn.Module, file: Path, **changes: Any) -> nn.Module:
    """The network with what a study that starts from the file puts into it."""
    given = FromWeights(kind="weights", file=file.name, sha256=file_sha256(file), **changes)
    begin(given, Places((file,)), NoAdapters(), network)
    return network.eval()


def images(channels: int = 3, side: int = SIZE) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(3))


# The library's numbers ------------------------------------------------------------------------------------------------


@EVERY
def test_a_published_folder_gives_the_library_s_logits(kind: str, tmp_path: Path) -> None:
    """Bit for bit, from the names of published files, which are not the library's own of today."""
    study = load_study(published(tmp_path, kind))
    file = tmp_path / "model" / "model.safetensors"
    assert not load_file(file).keys() <= theirs(kind).state_dict().keys()
    network = started(build_task(study).build_model(), file)
    with torch.no_grad():
        assert torch.equal(network(images()), theirs(kind)(images()).logits)


@EVERY
def test_an_encoder_alone_starts_a_study_whose_head_begins_fresh(kind: str, tmp_path: Path) -> None:
    theirs(kind, head=False).save_pretrained(tmp_path)
    file, network = tmp_path / "model.safetensors", built(kind)
    before = network.head.weight.clone()
    with pytest.raises(StudyError, match=r"no values for head\.bias, head\.weight|no values for head"):
        started(network, file)
    started(network, file, partial=True)
    assert torch.equal(network.head.weight, before)
    with torch.no_grad():
        tokens = theirs(kind, head=False)(images()).last_hidden_state
        found = network.eval().encoder(images())
    expected = tokens.mean(dim=1) if kind == "swin" else tokens[:, 0]
    assert torch.equal(found[:, : tokens.shape[2]], expected)


def test_names_of_files_on_the_hub_are_known() -> None:
    """As in google/vit-base-patch16-224, facebook/dinov2-small and microsoft/swin-tiny-patch4-window7-224."""
    layer = "encoder.network.layers.0.attention"
    assert built("vit").name_of("vit.encoder.layer.0.attention.attention.query.weight") == f"{layer}.q_proj.weight"
    assert built("vit").name_of("vit.encoder.layer.0.attention.output.dense.bias") == f"{layer}.o_proj.bias"
    assert built("vit").name_of("embeddings.cls_token") == "encoder.network.embeddings.cls_token"
    assert built("vit").name_of("pooler.dense.weight") is None
    assert built("vit").name_of("classifier.bias") == "head.bias"
    assert built("vit").name_of("head.bias") == "head.bias"
    dino = built("dinov2").name_of
    assert dino("encoder.layer.1.attention.attention.value.bias").endswith("layer.1.attention.v_proj.bias")
    assert dino("embeddings.mask_token") is None
    block = "swin.encoder.layers.0.blocks.1.attention.self"
    assert built("swin").name_of(f"{block}.relative_position_index") is None
    assert built("swin").name_of(f"{block}.key.weight").endswith("blocks.1.attention.k_proj.weight")


@EVERY
def test_what_a_file_leaves_out_is_as_in_the_library(kind: str) -> None:
    ours = LIBRARY[kind].model_validate({"model_type": kind})
    default = getattr(transformers, f"{LIBRARY[kind].library}Config")()
    for key, value in ours.model_dump(exclude={"use_swiglu_ffn"}).items():
        there = getattr(default, key)
        assert (list(there) if isinstance(there, list | tuple) else there) == (
            list(value) if isinstance(value, tuple) else value
        ), key


@EVERY
def test_positions_of_another_size_are_interpolated_as_the_library_does(kind: str) -> None:
    network, base, larger = built(kind).eval(), theirs(kind).eval(), images(side=2 * SIZE)
    names = {network.name_of(name): value for name, value in base.state_dict().items()}
    network.load_state_dict({name: value for name, value in names.items() if name is not None})
    options = {} if "dinov2" in kind else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        assert torch.equal(network(larger), base(larger, **options).logits)


@EVERY
def test_an_image_of_one_channel_is_seen_by_all_three(kind: str) -> None:
    network, grey = built(kind, channels=1).eval(), images(1)
    assert torch.equal(network(grey), network(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(StudyError, match=r"task\.channels: 2, and the network sees 3; give as many, or 1"):
        built(kind, channels=2)


# Offline --------------------------------------------------------------------------------------------------------------


@EVERY
def test_no_socket_is_opened(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = published(tmp_path, kind)
    monkeypatch.setattr(socket, "socket", _refused)
    monkeypatch.setattr(socket, "getaddrinfo", _refused)
    file = tmp_path / "model" / "model.safetensors"
    network = started(build_task(load_study(study)).build_model(), file)
    assert network(images()).isfinite().all()


def _refused(*_: Any, **__: Any) -> Any:
    raise AssertionError("a socket was asked for")


def test_the_library_is_imported_without_a_socket(tmp_path: Path) -> None:
    """In a process of its own, where MONAI imports it first; what is asked for by name the library then refuses."""
    study = folder_of(tmp_path, "vit")
    code = f"""
import socket
def refused(*_, **__): raise AssertionError("a socket was asked for")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refused
import monai.networks.nets
from wardround.study.load import load_study
from wardround.tasks.build import build_task
build_task(load_study({str(study)!r})).build_model()
import transformers
try:
    transformers.AutoModel.from_pretrained("google/vit-base-patch16-224")
except OSError:
    print("refused", transformers.utils.hub.is_offline_mode())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "refused True", done.stderr


# Adapters, privacy, devices, export -----------------------------------------------------------------------------------

LORA = LoRA(kind="lora", targets=("*.q_proj", "*.v_proj"), rank=2, trained=("head.*",))
ADAPTERS = {
    "lora": LORA,
    "bottleneck": Bottleneck(kind="bottleneck", targets=("*.mlp",), features=16, width=2),
    "prompts": Prompts(kind="prompts", targets=("*.layer*.[0-9]",), features=16, tokens=3),
    "partial": Partial(kind="partial", trained=("*norm*", "head.*")),
}


@pytest.mark.parametrize("name", ADAPTERS)
@EVERY
def test_adapters_reach_the_encoder(kind: str, name: str) -> None:
    network, adapters = built(kind), ADAPTERS[name]
    if kind == "swin" and name == "bottleneck":
        # Each stage has a width of its own.
        adapters = Bottleneck(kind="bottleneck", targets=("*.layers.1.*.mlp",), features=16, width=2)
    before = network(images())
    if kind == "swin" and name == "prompts":
        with pytest.raises(StudyError, match="see windows of fixed sizes, which no token can be added to"):
            attach(network, adapters)
        return
    attached = attach(network, adapters)
    if name in ("lora", "bottleneck"):
        assert torch.equal(network(images()), before)
    if name == "prompts":
        assert not torch.allclose(network(images()), before)
    network(images()).square().sum().backward()
    moved = {n for n, value in network.named_parameters() if value.grad is not None and value.grad.any()}
    assert moved.isdisjoint(attached.frozen)
    assert moved >= {n for n in network.state_dict() if n.endswith(("q_proj.lora.b.weight", "bottleneck.up.weight"))}
    assert moved


@pytest.mark.parametrize("trained", [["head.*"], ["*norm*"]])
def test_what_is_frozen_as_a_whole_drops_nothing_and_what_learns_does(trained: list[str]) -> None:
    dropping = section("vit", hidden_dropout_prob=0.5)
    partial = {"kind": "partial", "trained": trained}
    study = diagnosis_study({"A": {}}, model=dropping, adapters=partial, task={"augment": [{"name": "RandFlipd"}]})
    network = arm_specs_of(study).model_context.model
    train_mode(network)
    again = torch.equal(network(images()), network(images()))
    assert again == (trained == ["head.*"])


@EVERY
def test_a_step_and_an_evaluation_without_numbers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = make_diagnoses(tmp_path, {"A": (4, 4, 4)})
    assert step_and_evaluation(_adapted(kind), sites.of("A").data[0], device_named("meta", monkeypatch))


def _adapted(kind: str, **changes: Any) -> Study:
    return diagnosis_study(
        {"A": {}},
        model=section(kind),
        adapters={"kind": "lora", "targets": ["*.q_proj", "*.v_proj"], "rank": 2, "trained": ["head.*"]},
        local={"steps": 1, "batch": 4},
        **changes,
    )


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov2_with_registers"])
def test_gradients_of_single_patients_are_exact(kind: str, adapted: bool, tmp_path: Path) -> None:
    """With all values, too: a class token and positions belong to no layer that Opacus has a rule for."""
    task, dataset, network = _private(kind, adapted, tmp_path)
    draw = _drawn([(0,), (2, 3)])
    exact = list(ExactGradients(task, network).per_patient(dataset, draw))
    with BatchedGradients.attached(task, network) as batched:
        batched.self_test(dataset)
        at_once = list(batched.per_patient(dataset, draw))
    torch.testing.assert_close(torch.stack(at_once), torch.stack(exact), rtol=1e-3, atol=1e-5)


def test_windows_mix_examples_with_places_so_batched_gradients_are_refused(tmp_path: Path) -> None:
    task, dataset, network = _private("swin", True, tmp_path)
    assert len(list(ExactGradients(task, network).per_patient(dataset, _drawn([(0,)])))) == 1
    with BatchedGradients.attached(task, network) as batched, pytest.raises(StudyError, match="gradients: exact"):
        batched.self_test(dataset)


def _private(kind: str, adapted: bool, place: Path) -> tuple[Any, Any, nn.Module]:
    pytest.importorskip("opacus")
    sites = make_diagnoses(place, {"A": (4, 4, 4)})
    task = build_task(_adapted(kind))
    network = built(kind)
    if adapted:
        attach(network, LORA)
    return task, task.dataset("A", sites.of("A").data), network


@EVERY
def test_it_is_exported(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    study = diagnosis_study({"A": {}}, model=section(kind))
    model = release(tmp_path / "model.safetensors", study)
    assert export(model, tmp_path / "model.onnx").difference < 1e-3


# From a folder to a released model ------------------------------------------------------------------------------------


def test_a_study_is_planned_trained_and_applied_and_needs_the_folder_once(tmp_path: Path) -> None:
    sites = make_diagnoses(tmp_path / "data", {"A": (8, 8, 8), "B": (8, 8, 8)})
    path, out = published(tmp_path, "dinov2"), tmp_path / "out"
    file = tmp_path / "model" / "model.safetensors"
    begins = {"kind": "weights", "file": "model/model.safetensors", "only": ["encoder.*"], "partial": True}
    begins["sha256"] = file_sha256(file)
    head = {"kind": "partial", "trained": ["head.*"]}
    study = {**json.loads(path.read_text()), "sites": {"A": {}, "B": {}}, "start": begins, "adapters": head}
    study["schedule"] = {"rounds": 2}
    path.write_text(json.dumps(study))
    (tmp_path / "sites.yaml").write_text(json.dumps({"sites": {s: {"data": f"data/{s}"} for s in "AB"}}))
    said = CliRunner().invoke(app, ["plan", str(path), "--sites", str(tmp_path / "sites.yaml")])
    assert said.exit_code == 0, said.output
    wardround.run(path, sites, out, processes=1)
    released = out / "models" / "federated.safetensors"
    assert load_file(released).keys() == {"head.weight", "head.bias"}
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**CONFIGS["dinov2"], "num_attention_heads": 4}))
    with pytest.raises(JournalError, match="holds a run of another study"):
        wardround.run(path, sites, out, processes=1)
    config.unlink()
    picture = next((tmp_path / "data" / "A" / "images").iterdir())
    told = wardround.predict(released, picture, tmp_path / "told")
    assert len(told.diagnoses) == 1
    assert told.failed == ()
    pytest.importorskip("onnxscript")
    assert export(released, tmp_path / "model.onnx").difference < 1e-3


def test_what_a_frozen_encoder_gives_is_computed_once() -> None:
    partial = {"kind": "partial", "trained": ["head.*"]}
    context = arm_specs_of(diagnosis_study({"A": {}}, model=section("vit"), adapters=partial)).model_context
    network, whole = context.model, built("vit").eval()
    assert isinstance(network, TransformersClassifier)
    whole.load_state_dict(network.state_dict())
    assert network.lead is not None
    assert torch.allclose(network(images()), whole(images()), atol=1e-6)
