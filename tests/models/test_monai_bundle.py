"""Networks of MONAI bundles: MONAI's own outputs from a bundle's files, and nothing of a bundle that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.outlines import SIZE, make_outlines, outline_study
from tests.runs.test_predict import release
from torch import Tensor, nn

import wardround
from wardround.errors import StudyError
from wardround.models.bundle_config import ARGUMENTS
from wardround.models.monai_bundle import BundleNetwork, MonaiBundleSettings
from wardround.plan.checkpoints import import_checkpoint
from wardround.plan.weights import begin
from wardround.runs.export import export
from wardround.study.adapters import NoAdapters
from wardround.study.load import load_study, study_sha256, written
from wardround.study.places import Places
from wardround.study.start import FromWeights
from wardround.tasks.build import build_task

UNET = {
    "_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": [4, 8], "strides": [2],
    "num_res_units": 1, "norm": "instance",
}  # fmt: skip
EXAMPLES = Path(__file__).parents[2] / "examples"
# Of each class the arguments of a small one in 2-D.
SMALL: dict[str, dict[str, Any]] = {
    "AttentionUnet": {"spatial_dims": 2, "in_channels": 1, "channels": [4, 8], "strides": [2]},
    "BasicUNet": {"spatial_dims": 2, "in_channels": 1, "features": [4, 4, 4, 4, 4, 4]},
    "DynUNet": {
        "spatial_dims": 2, "in_channels": 1, "kernel_size": [3, 3, 3], "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2], "filters": [4, 8, 8], "deep_supervision": False,
    },
    "SegResNet": {"spatial_dims": 2, "in_channels": 1, "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "SwinUNETR": {"spatial_dims": 2, "in_channels": 1, "feature_size": 12, "use_checkpoint": True, "img_size": 32},
    "UNet": {k: v for k, v in UNET.items() if k not in ("_target_", "out_channels")},
    "UNETR": {
        "spatial_dims": 2, "in_channels": 1, "img_size": [32, 32], "feature_size": 4, "hidden_size": 24, "mlp_dim": 24,
        "num_heads": 2,
    },
    "VNet": {"spatial_dims": 2, "in_channels": 1, "dropout_dim": 2},
}  # fmt: skip


def bundle(place: Path, network: Any = UNET, ending: str = "json", **beside: Any) -> Path:
    """A study with a bundle's folder `bundle` beside it."""
    said = {"imports": ["$import os"], "device": "$torch.device('cpu')", "network_def": network, **beside}
    file = place / "bundle" / "configs" / f"inference.{ending}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(said) if ending == "json" else yaml.safe_dump(said))
    study = place / "study.yaml"
    study.write_text(json.dumps({**written(outline_study({"A": {}})), "model": section()}))
    return study


def section(**changes: Any) -> dict[str, Any]:
    return {"kind": "monai_bundle", "folder": "bundle", **changes}


def settings(network: dict[str, Any], **changes: Any) -> MonaiBundleSettings:
    target, arguments = network["_target_"], {k: v for k, v in network.items() if k != "_target_"}
    given = {"kind": "monai_bundle", "network": {"target": target, "arguments": arguments}, **changes}
    return MonaiBundleSettings.model_validate(given)


def theirs(place: Path, **changes: Any) -> tuple[nn.Module, Path]:
    """MONAI's network, and its values as a bundle's `models/model.pt` and as a file that a study starts from."""
    from monai.networks.nets import UNet

    torch.manual_seed(1)
    network = UNet(**{k: v for k, v in {**UNET, **changes}.items() if k != "_target_"}).eval()
    path = place / "bundle" / "models" / "model.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return network, import_checkpoint(path).path


def started(network: nn.Module, file: Path, **changes: Any) -> nn.Module:
    sha256 = import_checkpoint(file).sha256
    begin(FromWeights(kind="weights", file=file.name, sha256=sha256, **changes), Places((file,)), NoAdapters(), network)
    return network.eval()


def images(side: int = SIZE) -> Tensor:
    return torch.randn(2, 1, side, side, generator=torch.Generator().manual_seed(3))


# A bundle's network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_a_bundle_gives_monai_s_outputs(ending: str, tmp_path: Path) -> None:
    study = load_study(bundle(tmp_path, ending=ending))
    network, file = theirs(tmp_path)
    ours = started(build_task(study).build_model(), file)
    with torch.no_grad():
        assert torch.equal(ours(images()), network(images()))


@pytest.mark.parametrize("target", [t if t == "SegResNet" else pytest.param(t, marks=pytest.mark.slow) for t in SMALL])
def test_every_class_that_is_served_is_built_with_outputs_of_its_own(target: str, tmp_path: Path) -> None:
    if target in ("SwinUNETR", "UNETR"):
        pytest.importorskip("einops", reason="the extra `swin` is not installed")
    assert SMALL.keys() == ARGUMENTS.keys()
    study = load_study(bundle(tmp_path, {"_target_": target, **SMALL[target], "out_channels": 5}))
    fresh = study.model.model_copy(update={"head": "fresh"})
    side = 64 if target == "SwinUNETR" else 32
    for outputs in (1, 3):
        network = fresh.build_network(2, 1, outputs)
        with torch.no_grad():
            assert network.eval()(images(side)).shape == (2, outputs, side, side)
        # The last layer, and no other: MONAI's U-Net has two convolutions there.
        assert 1 <= len([name for name in network.state_dict() if network.name_of(name.partition(".")[2]) is None]) <= 8


def test_probabilities_of_a_softmax_stay_as_they_are(tmp_path: Path) -> None:
    plain, file = theirs(tmp_path, out_channels=4)
    network = settings({**UNET, "out_channels": 4}, head="softmax").build_network(2, 1, 3)
    with torch.no_grad():
        expected = plain(images()).double().softmax(dim=1)[:, 1:]
        found = started(network, file)(images()).double().sigmoid()
    # Sums of four exponentials in float32, and a logarithm of them.
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_fresh_head_begins_fresh_and_all_else_is_the_bundle_s(tmp_path: Path) -> None:
    _, file = theirs(tmp_path, out_channels=4)
    network: BundleNetwork = settings({**UNET, "out_channels": 4}, head="fresh").build_network(2, 1, 2)
    with pytest.raises(StudyError, match=r"set `start\.partial: true` to begin them fresh"):
        started(network, file)
    started(network, file, partial=True)
    published, ours = load_file(file), network.state_dict()
    anew = {name for name in published if network.name_of(name) is None}
    assert anew
    assert all(ours[f"network.{name}"].shape != published[name].shape for name in anew)
    assert all(torch.equal(ours[f"network.{name}"], published[name]) for name in published.keys() - anew)


@pytest.mark.parametrize(
    ("build", "head", "says"),
    [
        ((3, 1, 1), "sigmoid", r"task\.dimensions: 3, and the bundle's network has 2; give as many"),
        ((2, 4, 1), "sigmoid", r"task\.channels: 4, and the bundle's network has 1; give as many"),
        ((2, 1, 2), "sigmoid", r"task\.structures: 2.* 2 outputs with model\.head sigmoid, and it has 1; correct them"),
        ((2, 1, 1), "softmax", r"task\.structures: 1.* 2 outputs with model\.head softmax, and it has 1"),
    ],
)
def test_a_bundle_for_other_images_is_one_clear_error(build: tuple[int, ...], head: str, says: str) -> None:
    with pytest.raises(StudyError, match=says):
        settings(UNET, head=head).build_network(*build)


def test_arguments_that_monai_refuses_and_sizes_that_do_not_fit_are_one_clear_error() -> None:
    with pytest.raises(StudyError, match=r"MONAI's UNet refuses its arguments \(ValueError\); get the bundle again"):
        settings({**UNET, "channels": [4]}).build_network(2, 1, 1)
    with pytest.raises(StudyError, match="UNet cannot be built: missing a required argument: 'channels'"):
        settings({k: v for k, v in UNET.items() if k != "channels"}).build_network(2, 1, 1)
    with pytest.raises(StudyError, match=r"task\.patch: 64 x 64, and the network has positions for 32 x 32"):
        settings({"_target_": "UNETR", **SMALL["UNETR"], "out_channels": 1}).check_size((64, 64))


# What it says, and what it cannot do ----------------------------------------------------------------------------------


def test_values_that_a_definition_refers_to_are_found_and_literals_read(tmp_path: Path) -> None:
    network = {**UNET, "in_channels": "@sizes#in", "channels": "$@widths", "strides": "$(2,)", "norm": "@norms::0"}
    study = load_study(bundle(tmp_path, network, sizes={"in": "@one"}, one=1, widths=[4, 8], norms=["instance"]))
    assert study.model.network.arguments == {k: v for k, v in UNET.items() if k != "_target_"}
    assert study.model.describe() == "monai_bundle, UNet, head sigmoid"
    circle = bundle(tmp_path, {**UNET, "norm": "@a"}, a="@b", b="@a")
    with pytest.raises(StudyError, match=r"network_def\.norm refers to itself"):
        load_study(circle)
    with pytest.raises(StudyError, match="refers to @nothing, which is not there"):
        load_study(bundle(tmp_path, {**UNET, "norm": "@nothing"}))


RUN = "__import__('pathlib').Path('{file}').touch()"


@pytest.mark.parametrize(
    ("network", "says"),
    [
        ({**UNET, "norm": f"${RUN}"}, "network_def.norm is the expression"),
        ({**UNET, "channels": [4, f"${RUN}"]}, "network_def.channels is the expression"),
        ({**UNET, "channels": "$[4] + [8]"}, "none is evaluated; write its value there"),
        ({**UNET, "norm": "$@norms[0]"}, "none is evaluated"),
        ({**UNET, "norm": "%bundle/other.json::norm"}, "none is evaluated"),
        ({**UNET, "act": {"_target_": "os.system", "command": "touch {file}"}}, "network_def.act builds an object"),
        ({"_target_": "os.system", "command": "touch {file}"}, "is a os.system, and nothing is imported for it"),
        ({"_target_": "scripts.evil.UNet"}, "is a scripts.evil.UNet, and nothing is imported for it"),
        ({"_target_": f"${RUN}"}, "and nothing is imported for it"),
        ({"_target_": "FlexibleUNet", "pretrained": True}, "is a FlexibleUNet, and nothing is imported for it"),
        ({**UNET, "dimensions": 2}, "argument 'dimensions' of UNet is not served; served are"),
        ({**UNET, "_requires_": f"${RUN}"}, "network_def._requires_ is the expression"),
        ({**UNET, "_mode_": "debug"}, "argument '_mode_' of UNet is not served"),
        (
            {"_target_": "DynUNet", **SMALL["DynUNet"], "deep_supervision": True},
            "argument 'deep_supervision'",
        ),
        (f"${RUN}", "has no network_def"),
    ],
)
def test_a_hostile_bundle_runs_nothing(network: Any, says: str, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    filled = json.loads(json.dumps(network).replace("{file}", str(touched)))
    study = bundle(tmp_path, filled, norms=["batch"], imports=["$" + RUN.format(file=touched)])
    with pytest.raises(StudyError) as caught:
        load_study(study)
    assert says in str(caught.value)
    assert not touched.exists()


def test_yaml_that_would_make_objects_is_refused(tmp_path: Path) -> None:
    study, touched = bundle(tmp_path, ending="yaml"), tmp_path / "touched"
    file = tmp_path / "bundle" / "configs" / "inference.yaml"
    file.write_text(f"network_def: !!python/object/apply:os.system ['touch {touched}']\n")
    with pytest.raises(StudyError, match=r"bundle/configs/inference\.yaml cannot be read"):
        load_study(study)
    assert not touched.exists()


@pytest.mark.parametrize("value", ["$1", "@x", {"_target_": "os.system"}, "x" * 300, {"a": {"_target_": "x"}}])
def test_a_definition_in_a_study_holds_plain_values_alone(value: Any) -> None:
    study = written(outline_study({"A": {}}))
    network = {"target": "UNet", "arguments": {**SMALL["UNet"], "out_channels": 1, "norm": value}}
    with pytest.raises(StudyError, match="must be a number, a text, or a list or mapping of them; no expression"):
        load_study({**study, "model": {"kind": "monai_bundle", "network": network}})


def test_the_hashes_of_a_study_cover_the_definition_and_nothing_else_of_a_bundle(tmp_path: Path) -> None:
    one = load_study(bundle(tmp_path / "1"))
    same = load_study(bundle(tmp_path / "2", {**UNET, "_desc_": "text"}, "yaml", dataset_dir="/elsewhere"))
    other = load_study(bundle(tmp_path / "3", {**UNET, "channels": [4, 16]}))
    assert study_sha256(one) == study_sha256(same) != study_sha256(other)
    assert study_sha256(load_study(written(one))) == study_sha256(one)
    (tmp_path / "3" / "bundle" / "configs" / "inference.json").unlink()
    with pytest.raises(StudyError, match=r"bundle has no configs/inference\.json or configs/inference\.yaml"):
        load_study(tmp_path / "3" / "study.yaml")


def test_a_bundle_outlines_in_a_chain_too(tmp_path: Path) -> None:
    bundle(tmp_path)
    _, file = theirs(tmp_path)
    chain = yaml.safe_load((EXAMPLES / "lgg-chain.yaml").read_text())
    chain["task"]["segmenter"] = section()
    (tmp_path / "chain.yaml").write_text(json.dumps(chain))
    model: Any = build_task(load_study(tmp_path / "chain.yaml")).build_model()
    started(model, file, into="diagnosis", partial=True)
    assert all(torch.equal(model.diagnosis.network.state_dict()[n], value) for n, value in load_file(file).items())


# From a bundle to a released model ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bundle_is_trained_in_part_applied_and_exported(tmp_path: Path) -> None:
    sites = make_outlines(tmp_path / "data", {"A": 6, "B": 6})
    path = bundle(tmp_path, {**UNET, "out_channels": 4})
    _, file = theirs(tmp_path, out_channels=4)
    begins = {"kind": "weights", "file": "bundle/models/model.safetensors", "partial": True}
    begins["sha256"] = import_checkpoint(file).sha256
    study = {**json.loads(path.read_text()), "sites": {"A": {}, "B": {}}, "start": begins}
    study |= {"model": section(head="fresh"), "adapters": {"kind": "partial", "trained": ["network.model.2.*"]}}
    path.write_text(json.dumps(study))
    wardround.run(path, sites, tmp_path / "out")
    released = tmp_path / "out" / "models" / "federated.safetensors"
    assert all(name.startswith("network.model.2.") for name in load_file(released))
    (tmp_path / "bundle" / "configs" / "inference.json").unlink()
    told = wardround.predict(released, tmp_path / "data" / "A" / "DOE-00", tmp_path / "told")
    assert told.failed == ()


@pytest.mark.slow
@pytest.mark.parametrize("head", ["sigmoid", "softmax"])
def test_it_is_exported(head: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found = settings({**UNET, "out_channels": 1 + (head == "softmax")}, head=head)
    study = outline_study({"A": {}}, model=found.model_dump(exclude={"folder"}))
    model = release(tmp_path / "model.safetensors", study)
    assert export(model, tmp_path / "model.onnx").difference < 1e-3
