"""The anatomy prompt against its equation, and its way from a site's file to the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from tests.ct_hospitals import ct_study, make_ct_hospitals, save_nifti, thorax
from torch import Tensor, nn
from typer.testing import CliRunner

from wardround.cli import app
from wardround.errors import DataError, StudyError
from wardround.imaging.acquisition.ct.system import CTSystem
from wardround.imaging.acquisition.wrapped import Prompted
from wardround.models.anatomy import AnatomyNet
from wardround.models.anatomy import AnatomySettings as Anatomy
from wardround.models.build import build_model
from wardround.models.redcnn import REDCNN
from wardround.models.redcnn import REDCNNSettings as Config
from wardround.runs.session import run
from wardround.study.ct import CTAcquisition
from wardround.study.load import load_study
from wardround.study.sites import load_sites
from wardround.tasks.build import build_task
from wardround.tasks.ct import CTReconstruction

DIMENSION = 12
ANATOMY = {"dimension": DIMENSION, "pool": 3, "width": 8, "heads": 2, "map": 5}
MODEL = {"kind": "redcnn", "preset": "tiny", "conditioning": "bottleneck", "anatomy": ANATOMY}
STUDY = ct_study(model=MODEL, method={"kind": "scan_physfed"})


def _shaken(net: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


# The equation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_map_is_that_of_the_paper(tokens: int) -> None:
    """Pooling, linear, torch's own multi-head attention, linear, bilinear: as the authors wire them."""
    net = _shaken(AnatomyNet(Anatomy(**ANATOMY)))
    assert isinstance(net, AnatomyNet)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        for name in ("weight", "bias"):
            parts = [getattr(layer, name) for layer in (net.queries, net.keys, net.values)]
            getattr(attention, f"in_proj_{name}").copy_(torch.cat(parts))
            getattr(attention.out_proj, name).copy_(getattr(net.merged, name))
    prompt = torch.randn(2, tokens, DIMENSION)
    pooled = prompt.reshape(2, tokens, DIMENSION // 3, 3).mean(-1)
    t = pooled @ net.projection.weight.T + net.projection.bias
    attended = attention(t, t, t, need_weights=False)[0]
    flat = (attended @ net.map.weight.T + net.map.bias).mean(1).reshape(2, 1, 5, 5)
    wanted = 1 + nn.Upsample(size=(11, 13), mode="bilinear", align_corners=False)(flat)
    assert torch.allclose(net(prompt, (11, 13)), wanted, atol=1e-6)


def test_feature_maps_are_weighed_by_it() -> None:
    net = _shaken(AnatomyNet(Anatomy(**ANATOMY, weight=0.25)))
    assert isinstance(net, AnatomyNet)
    operator, prompt = _system(), torch.randn(2, 1, DIMENSION)
    c = torch.randn(2, 4, 12, 12)
    out = net.weighed(c, Prompted(operator, prompt))
    assert torch.allclose(out, 0.75 * c + 0.25 * c * net(prompt, (12, 12)), atol=1e-6)
    assert torch.equal(net.weighed(c, operator), c)
    with pytest.raises(StudyError, match="has 7 values and the model takes 12"):
        net.weighed(c, Prompted(operator, torch.zeros(2, 1, 7)))


def test_the_default_sizes_are_the_papers() -> None:
    with torch.device("meta"):
        net = AnatomyNet(Anatomy())
    assert sum(p.numel() for p in net.parameters()) == 40_304_025
    assert (net.projection.in_features, net.projection.out_features, net.map.out_features) == (8000, 2048, 3481)
    assert (net.config.heads, net.config.weight) == (4, 0.1)


def _system(size: int = 32) -> CTSystem:
    acquisition = load_study(STUDY).acquisition_of("A")
    assert isinstance(acquisition, CTAcquisition)
    return CTSystem(acquisition)


def _red(shaken: bool) -> REDCNN:
    torch.manual_seed(0)
    model = build_model(Config.model_validate(MODEL), "ct")
    assert isinstance(model, REDCNN)
    if shaken:
        for part in (model.encoder, model.decoder):
            _shaken(part)
    return model


def test_an_untrained_branch_changes_nothing_and_learns() -> None:
    model, system = _red(True), _system()
    assert model.anatomy is not None
    data = torch.randn(2, *system.data_shape)
    prompted = Prompted(system, torch.randn(2, 1, DIMENSION))
    plain = model(system, data)
    assert torch.allclose(model(prompted, data), plain, rtol=1e-5, atol=1e-5 * float(plain.detach().abs().max()))
    model(prompted, data).square().mean().backward()
    assert model.anatomy.map.weight.grad is not None
    assert float(model.anatomy.map.weight.grad.abs().max()) > 0
    _shaken(model.anatomy)
    assert not torch.allclose(model(prompted, data), plain, rtol=1e-2)
    other = Prompted(system, torch.randn(2, 1, DIMENSION))
    assert not torch.allclose(model(prompted, data), model(other, data), rtol=1e-3)


def test_a_prompted_operator_is_the_operator() -> None:
    system = _system()
    prompted = Prompted(system, torch.zeros(1, 1, 3))
    x, y = torch.randn(1, *system.image_shape), torch.randn(1, *system.data_shape)
    assert (prompted.image_shape, prompted.data_shape) == (system.image_shape, system.data_shape)
    for name, argument in (("A", x), ("A_adjoint", y), ("normal", x), ("initial", y), ("norm", x)):
        assert torch.equal(getattr(prompted, name)(argument), getattr(system, name)(argument))
    assert torch.equal(prompted.protocol, system.protocol)  # type: ignore[arg-type]
    assert system.prompt is None


# From a site's file ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_ct_hospitals(tmp_path_factory.mktemp("hospitals"))


def _vectors(folder: Path, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    names = sorted(entry.name for entry in folder.iterdir())
    return {name: random.standard_normal(DIMENSION).astype(np.float32) for name in names}


def _sites_file(place: Path, folders: dict[str, Path], **files: str) -> Path:
    entries: dict[str, Any] = {site: {"data": str(folder)} for site, folder in folders.items()}
    for site, name in files.items():
        entries[site]["embeddings"] = name
    path = place / "sites.yaml"
    path.write_text(yaml.safe_dump({"sites": entries}), encoding="utf-8")
    return path


def _task(embeddings: dict[str, Path]) -> CTReconstruction:
    task = build_task(load_study(STUDY), embeddings)
    assert isinstance(task, CTReconstruction)
    return task


def test_every_example_comes_with_its_patients_vector(folders: dict[str, Path], tmp_path: Path) -> None:
    vectors = {site: _vectors(folder, i) for i, (site, folder) in enumerate(folders.items())}
    np.savez(tmp_path / "a.npz", **vectors["A"])  # type: ignore[arg-type]
    save_file(vectors["B"], tmp_path / "b.safetensors")
    task = _task({"A": tmp_path / "a.npz", "B": tmp_path / "b.safetensors"})
    for site in "AB":
        dataset = task.dataset(site, (folders[site],))
        for split in ("train", "test"):
            names = list(vectors[site])
            for example in dataset._index.examples(split):  # type: ignore[arg-type]
                (part,) = dataset.scan(example, True).parts
                assert part.prompt is not None
                assert torch.equal(part.prompt[0, 0], torch.from_numpy(vectors[site][names[example.patient]]))
        (part,) = dataset.batch([0, 1, 0], np.random.default_rng(0)).parts
        assert part.prompt is not None
        assert part.prompt.shape == (3, 1, DIMENSION)
        assert torch.equal(part.prompt[0], part.prompt[2])
        assert torch.equal(part.alone(1).prompt[0], part.prompt[1])  # type: ignore[index]
    visits = task.visits("New", {site: (folders[site],) for site in "AB"})
    scans = [part for _, batch in visits.evaluation("test") for part in batch.parts]
    seen = {tuple(part.prompt[0, 0].tolist()) for part in scans if part.prompt is not None}
    assert seen <= {tuple(v.tolist()) for of_site in vectors.values() for v in of_site.values()}
    assert len(seen) > 1


def test_one_vector_may_serve_all_and_several_tokens_too(folders: dict[str, Path], tmp_path: Path) -> None:
    report = np.random.default_rng(0).standard_normal((4, DIMENSION))
    own = {next(iter(sorted(folders["A"].iterdir()))).name: report[:2]}
    np.savez(tmp_path / "all.npz", all=report, **own)
    dataset = _task({"A": tmp_path / "all.npz"}).dataset("A", (folders["A"],))
    shapes = {tuple(p.prompt.shape[1:]) for s in ("train", "validation", "test") for _, b in dataset.evaluation(s)  # type: ignore[arg-type]
              for p in b.parts if p.prompt is not None}  # fmt: skip
    assert shapes == {(4, DIMENSION), (2, DIMENSION)}
    images = _red(False)(dataset.batch([0], np.random.default_rng(0)).parts[0].prompted, torch.zeros(1, 24, 48))
    assert images.shape == (1, 32, 32)


def test_the_data_are_others_with_other_embeddings(folders: dict[str, Path], tmp_path: Path) -> None:
    prints = []
    for seed in (0, 0, 1):
        np.savez(tmp_path / "a.npz", **_vectors(folders["A"], seed))  # type: ignore[arg-type]
        prints.append(_task({"A": tmp_path / "a.npz"}).dataset("A", (folders["A"],)).fingerprint())
    assert prints[0] == prints[1] != prints[2]


BAD: dict[str, tuple[Any, str]] = {
    "absent": (None, "the file of embeddings does not exist"),
    "dimension": (lambda v: v | {"all": np.zeros(9)}, r"1 of 6 embeddings have the shape \(9,\).*takes \(12,\)"),
    "scalar": (lambda v: {"all": np.float32(1)}, r"shape \(\)"),
    "missing": (lambda v: dict(list(v.items())[2:]), "2 of 5 patients have no embedding.*named `all`"),
    "nan": (lambda v: v | {"x": np.full(DIMENSION, np.nan)}, "1 of 6 embeddings hold NaN"),
    "complex": (lambda v: v | {"x": np.zeros(DIMENSION, complex)}, "something else than real numbers"),
    "empty": (lambda v: {}, "holds none"),
    "objects": (lambda v: {"all": np.array([{}, 1], dtype=object)}, "damaged or holds Python objects"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_embeddings_are_one_clear_error(folders: dict[str, Path], tmp_path: Path, fault: str) -> None:
    spoil, message = BAD[fault]
    path = tmp_path / "Doe-Jane" / "a.npz"
    path.parent.mkdir()
    if spoil is not None:
        np.savez(path, **spoil(_vectors(folders["A"], 0)))
    with pytest.raises(DataError, match=message) as caught:
        _task({"A": path}).dataset("A", (folders["A"],))
    assert str(caught.value).startswith("site A: ")
    assert "Doe" not in str(caught.value)


def test_other_files_are_no_embeddings(folders: dict[str, Path], tmp_path: Path) -> None:
    kinds = (("a.csv", "must be a .npz or .safetensors"), ("a.npz", "damaged"), ("a.safetensors", "damaged"))
    for name, message in kinds:
        (tmp_path / name).write_bytes(b"1,2,3")
        with pytest.raises(DataError, match=message):
            _task({"A": tmp_path / name}).dataset("A", (folders["A"],))


# Runs and the command line -----------------------------------------------------------------------------------------


def _cli(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_study_that_asks_for_embeddings_gets_them_or_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    np.savez(tmp_path / "a.npz", all=np.ones(DIMENSION, np.float32))
    for files, message in (
        ({"A": "a.npz"}, "site B provides none; add the file as `sites.B.embeddings`"),
        ({"A": "a.npz", "B": "b.npz"}, "sites.B.embeddings: the file does not exist; correct the path"),
    ):
        sites = _sites_file(tmp_path, folders, **files)
        result = _cli("check", tmp_path / "study.yaml", "--sites", sites)
        assert result.exit_code == 2
        assert message in result.stderr
        assert _cli("run", tmp_path / "study.yaml", "--sites", sites, "--out", tmp_path / "out").exit_code == 2
        assert not (tmp_path / "out").exists()
    sites = _sites_file(tmp_path, folders, A="a.npz", B="a.npz")
    said = _cli("check", tmp_path / "study.yaml", "--sites", sites).stdout
    assert "embeddings of patients" in said


@pytest.mark.parametrize(
    ("anatomy", "message"),
    [({"heads": 3, "width": 8}, "do not divide"), ({"dimension": 3, "pool": 4}, "more than dimension")],
)
def test_sizes_that_do_not_fit_are_refused(anatomy: dict[str, int], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        load_study(ct_study(model=MODEL | {"anatomy": ANATOMY | anatomy}))


@pytest.mark.slow
def test_a_run_trains_the_branch_and_the_model_takes_an_embedding(folders: dict[str, Path], tmp_path: Path) -> None:
    vectors = {site: _vectors(folder, i) for i, (site, folder) in enumerate(folders.items())}
    for site, of_site in vectors.items():
        np.savez(tmp_path / f"{site}.npz", **of_site)  # type: ignore[arg-type]
    sites = load_sites(_sites_file(tmp_path, folders, A="A.npz", B="B.npz"))
    study = load_study(STUDY, ["local={steps: 3, lr: 0.01}", "task.evaluation.baselines=[]"])
    out = run(study, sites, tmp_path / "out", engine="local").out

    # The branch is shared and was trained; the decoder stayed.
    released = load_file(out / "models" / "federated.safetensors")
    assert float(np.abs(released["anatomy.map.weight"]).max()) > 0
    assert set(load_file(out / "models" / "A" / "federated" / "local.safetensors")) == {
        name for name in released if name.startswith("decoder.")
    }

    # A clinic: neutral without an embedding, with one an image of its own. The decoder of a site makes it matter.
    model, source = out / "models" / "federated.safetensors", tmp_path / "ct.nii.gz"
    save_nifti([thorax(1)], source)
    np.savez(tmp_path / "one.npz", patient=20 * np.ones(DIMENSION))
    images: list[np.ndarray] = []
    for name, more in (("n", ()), ("o", ("--embedding", tmp_path / "one.npz"))):
        result = _cli("reconstruct", model, source, tmp_path / f"{name}.nii.gz", "--site", "A", *more)
        assert result.exit_code == 0, result.stderr
        assert ("anatomy map is neutral" in result.stdout) == (name == "n")
        images.append(nib.load(tmp_path / f"{name}.nii.gz").get_fdata())  # type: ignore[attr-defined]
    assert np.abs(images[0] - images[1]).max() > 1e-3
    refused = _cli("reconstruct", model, source, tmp_path / "x.nii.gz", "--embedding", tmp_path / "A.npz")
    assert refused.exit_code == 2
    assert "--embedding: the file holds 5 embeddings" in refused.stderr


def test_a_model_without_anatomy_takes_no_embedding(tmp_path: Path) -> None:
    study = load_study(ct_study())
    tensors: dict[str, Tensor] = build_model(study.model, "ct").state_dict()
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    metadata = {"format": "wardround-model-1", "study": study.model_dump_json()}
    save_file(arrays, tmp_path / "m.safetensors", metadata=metadata)
    save_nifti([thorax(1)], tmp_path / "ct.nii.gz")
    np.savez(tmp_path / "one.npz", all=np.ones(DIMENSION))
    arguments = (tmp_path / "m.safetensors", tmp_path / "ct.nii.gz", tmp_path / "out.nii.gz")
    result = _cli("reconstruct", *arguments, "--embedding", tmp_path / "one.npz")
    assert result.exit_code == 2
    assert "--embedding: this model takes none" in result.stderr
