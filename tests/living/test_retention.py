"""Not forgetting: Fisher information as a sum, the pull that it makes, and the release as a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from tests.outlines import make_outlines, outline_study
from tests.toys import Regression, make_task, toy_sites, toy_study
from wardround.errors import Interrupted, StudyError
from wardround.federation.release import load_model, model_path
from wardround.learning.examples import ExampleStream
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.weights import file_sha256
from wardround.results.files import read_result
from wardround.results.schema import Result
from wardround.runs.explain import explain
from wardround.runs.session import run
from wardround.storage.journal import Journal
from wardround.study.hashes import study_sha256, written
from wardround.study.load import load_study
from wardround.study.plugins import Plugins
from wardround.study.schema import Study
from wardround.study.teacher import TaughtBy
from wardround.study.update import Update
from wardround.tasks.distillation import Said, binary_distillation

Floats = dict[str, np.ndarray]
# As many steps as a site of the toy task has examples: 4 training patients, two points each.
EXAMPLES = 8
FISHER = {
    "method": {"kind": "fisher"},
    "local": {"steps": EXAMPLES, "batch": 1},
    "schedule": {"rounds": 1, "validate_every": 0},
    "protection": {"initial_scale": 4.0},
}
# One step of a site's fixed point: 26 bits of 32 are a value's, so that 64 sites add up.
STEP = 4.0 / (2**25 - 1)


def go(study: Study, folder: Path, **how: Any) -> Result:
    sites = toy_sites(folder.parent / "data", tuple(study.sites))
    return run(study, sites, folder, engine="local", quiet=True, near=folder.parent, **how)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A release to continue, of the toy task with batch norm."""
    return go(toy_study(task=task(norm=True), schedule={"rounds": 2}), tmp_path_factory.mktemp("chain") / "parent")


def task(**options: Any) -> dict[str, Any]:
    return {"kind": "custom", "factory": "tests.toys:make_task", "options": options}


def start(parent: Result) -> dict[str, Any]:
    return {"kind": "release", "file": "parent", "sha256": parent.model_sha256}


def measured(parent: Result, out: str, sites: Sequence[str] = "ABC", **changes: Any) -> tuple[Result, Path]:
    """A run that measures the Fisher information of the parent, and its file."""
    study = toy_study(sites, start=start(parent), task=task(norm=True), **{**FISHER, **changes})
    result = go(study, parent.out.parent / out)
    return result, result.out / "models" / "fisher.safetensors"


@pytest.fixture(scope="module")
def fisher(parent: Result) -> Path:
    """The file with the parent's Fisher information at all three sites."""
    return measured(parent, "fisher")[1]


def network(parent: Result) -> nn.Module:
    """The parent's network, with its values."""
    model = make_task(norm=True).build_model()
    values = load_model(model_path(parent.out, "federated"))[0]
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in values.items()})
    return model


def squares(parent: Result, site: str) -> dict[str, Tensor]:
    """By hand: the mean of the squared gradients of a site's training examples, one after another."""
    model = network(parent).eval()
    points = make_task(norm=True).dataset(site, (Path(),))
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for index in range(EXAMPLES):
        model.zero_grad()
        x, y = points.batch([index], np.random.default_rng())
        (model(x) - y).square().mean().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            total[name] += p.grad.square()
    return {name: value / EXAMPLES for name, value in total.items()}


def test_fisher_information_is_the_mean_of_the_sites_squared_gradients(parent: Result, fisher: Path) -> None:
    by_hand = [squares(parent, site) for site in "ABC"]
    found = load_file(fisher)
    assert found.keys() == by_hand[0].keys()
    for name, value in found.items():
        expected = sum(each[name] for each in by_hand).numpy() / 3  # type: ignore[union-attr]
        assert np.abs(value - expected).max() <= STEP + 1e-6 * np.abs(expected).max()
        assert value.min() >= 0.0
    # Nothing was trained: what is released is the parent, to every bit, and so is what is tested.
    result = read_result(fisher.parent.parent)
    assert result.model_sha256 == parent.model_sha256
    # No site keeps its own squares.
    for site, mine in zip("ABC", by_hand, strict=True):
        files = [path for path in (result.out / "work" / "sites" / site).rglob("*") if path.is_file()]
        assert len(files) > 1
        own = mine["3.weight"].numpy().tobytes()
        assert not any(own in path.read_bytes() for path in files)


def test_more_steps_than_examples_count_none_twice_and_fewer_take_the_first(parent: Result, fisher: Path) -> None:
    more = measured(parent, "more", local={"steps": EXAMPLES + 3, "batch": 1})[1]
    assert all(np.array_equal(value, load_file(fisher)[name]) for name, value in load_file(more).items())
    _, file = measured(parent, "few", "A", local={"steps": 2, "batch": 1})
    model, points = network(parent).eval(), make_task(norm=True).dataset("A", (Path(),))
    expected = torch.zeros(1)
    for index in ExampleStream(EXAMPLES, 3, "A").take(0, 2):
        model.zero_grad()
        x, y = points.batch([index], np.random.default_rng())
        (model(x) - y).square().mean().backward()
        expected += model[3].bias.grad.square() / 2  # type: ignore[union-attr]
    assert load_file(file)["3.bias"] == pytest.approx(expected.numpy(), abs=STEP, rel=1e-5)


def test_a_masked_sum_is_the_same_and_so_is_one_that_was_interrupted(
    parent: Result, fisher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The start of the sum is another one than a training's from the same release: no difference of the two is a site's.
    changes = {"protection": {**FISHER["protection"], "secure": True}}
    masked = load_file(measured(parent, "masked", **changes)[1])
    plain = load_file(fisher)
    assert all(np.array_equal(plain[name], masked[name]) for name in plain)
    commit, died = Journal.commit, []

    def dying(self: Journal, state: Any, report: Any, receipts: Any) -> None:
        if report is not None and not died:
            died.append(report.round)
            raise Interrupted("power cut")
        commit(self, state, report, receipts)

    monkeypatch.setattr(Journal, "commit", dying)
    with pytest.raises(Interrupted):
        measured(parent, "again")
    assert file_sha256(measured(parent, "again")[1]) == file_sha256(fisher)


def held(parent: Result, fisher: Path, weight: float, sites: Sequence[str] = "A", **changes: Any) -> Study:
    """A study that goes on from the parent, held by its Fisher information."""
    named = {"file": "fisher/models/fisher.safetensors", "sha256": file_sha256(fisher)}
    update = {"train_on": "all", "retain": {"kind": "ewc", "weight": weight, "fisher": named}}
    values = {
        "schedule": {"rounds": 1},
        "local": {"steps": 4, "batch": 2, "optimizer": "sgd", "lr": 0.05},
        "protection": FISHER["protection"],
    }
    return toy_study(sites, start=start(parent), task=task(norm=True), update=update, **{**values, **changes})


def by_hand(parent: Result, study: Study, fisher: Mapping[str, Any], weight: float, mu: float = 0.0) -> nn.Module:
    """One round of one site in a plain loop, with the gradient of the pull written out."""
    model, points = network(parent).train(), Regression(norm=True).dataset("A", (Path(),))
    begun = {name: p.detach().clone() for name, p in model.named_parameters()}
    order = ExampleStream(len(points), study.seed, "A").take(0, study.local.steps * study.local.batch)
    for step in range(study.local.steps):
        model.zero_grad()
        x, y = points.batch(order[2 * step : 2 * step + 2], np.random.default_rng())
        (model(x) - y).square().mean().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            pull = weight * torch.from_numpy(fisher[name]) + mu
            p.data -= study.local.lr * (p.grad + pull * (p.data - begun[name]))
    return model


@pytest.mark.parametrize(("weight", "method"), [(0.0, "fedavg"), (5.0, "fedavg"), (5.0, "fedprox")])
def test_the_pull_is_that_of_the_paper_beside_any_method(
    parent: Result, fisher: Path, weight: float, method: str
) -> None:
    prox = {"kind": "fedprox", "mu": 0.5, "weights": "equal"} if method == "fedprox" else {"kind": method}
    study = held(parent, fisher, weight, method={"weights": "equal", **prox})
    result = go(study, parent.out.parent / f"held-{method}-{weight}")
    values = load_file(fisher)
    expected = dict(by_hand(parent, study, values, weight, 0.5 if method == "fedprox" else 0.0).named_parameters())
    found = load_model(model_path(result.out, "federated"))[0]
    for name, tensor in expected.items():
        assert found[name] == pytest.approx(tensor.detach().numpy(), abs=STEP + 1e-6)
    free = dict(by_hand(parent, study, values, 0.0, 0.0).named_parameters())
    moved = max(float((expected[n] - free[n]).detach().abs().max()) for n in expected)
    assert (moved > 1e-4) == (weight > 0.0)


@pytest.mark.slow
def test_a_pull_of_weight_zero_computes_the_bits_of_none_and_a_resumed_run_those_of_a_whole_one(
    parent: Result, fisher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = held(parent, fisher, 3.0, "ABC", schedule={"rounds": 2})
    whole = go(study, parent.out.parent / "whole")
    release, died = Journal.commit, []

    def dying(self: Journal, state: Any, report: Any, receipts: Any) -> None:
        if report is not None and report.round == 2 and not died:
            died.append(True)
            raise Interrupted("power cut")
        release(self, state, report, receipts)

    monkeypatch.setattr(Journal, "commit", dying)
    with pytest.raises(Interrupted):
        go(study, parent.out.parent / "resumed")
    assert go(study, parent.out.parent / "resumed").model_sha256 == whole.model_sha256
    none = held(parent, fisher, 0.0, "ABC").model_copy(update={"update": Update(train_on="all")})
    assert (
        go(none, parent.out.parent / "none").model_sha256
        == go(held(parent, fisher, 0.0, "ABC"), parent.out.parent / "zero").model_sha256
    )


def test_what_leaves_is_said(parent: Result, tmp_path: Path) -> None:
    study = toy_study("AB", start=start(parent), task=task(norm=True), **FISHER)
    file = parent.out.parent / "check.yaml"
    file.write_text(yaml.safe_dump(written(study)))
    text = " ".join(explain(file, None, (), (), allow_code=True).split())
    assert "the mean square of the loss's gradients over its training examples" in text
    held_by = {"retain": {"kind": "lwf"}, "memory": 0.25, "finetune": {"steps": 5}}
    said = Update.model_validate(held_by).describe()
    assert said.startswith("on patients from whom no release before learned and 0.25 of the others; lwf, weight 1, ")
    assert said.endswith("then 5 steps at each site, lr 0.0001; the site's own, and sent nowhere")
    with pytest.raises(ValidationError, match=r"method.kind=fisher cannot be combined with protection.privacy"):
        toy_study("AB", **{**FISHER, "protection": {"privacy": {"preset": "moderate"}}})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"local": {"steps": 8, "batch": 2}}, "local.batch: method.kind=fisher .*set it to 1"),
        ({"schedule": {"rounds": 2}}, "schedule.rounds: method.kind=fisher"),
        ({"protection": {"compression": {"kind": "top_k"}}}, "protection.compression: method.kind=fisher"),
        ({"adapters": {"kind": "lora", "targets": ["0"]}}, "adapters: method.kind=fisher"),
    ],
)
def test_another_sum_than_the_fisher_information_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        toy_study("AB", **{**FISHER, **changes})


RELEASE = {"kind": "release", "file": "parent", "sha256": "ab" * 32}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"update": {"retain": {"kind": "ewc"}}}, "ewc holds the model to the release that `start` names"),
        ({"update": {"retain": {"kind": "lwf"}}}, "lwf learns from the release that `start` names"),
        ({"update": {"retain": {"kind": "lwf"}}, "start": RELEASE}, "task.kind custom has no teacher; take `ewc`"),
        ({"update": {"memory": 0.5, "train_on": "all"}}, "update.memory: is the share of old patients"),
        (
            {
                "update": {"retain": {"kind": "ewc"}},
                "start": RELEASE,
                "adapters": {"kind": "lora", "targets": ["0"]},
            },
            "ewc weighs the network's own weights",
        ),
        (
            {
                "update": {"retain": {"kind": "ewc"}},
                "start": RELEASE,
                "method": {"kind": "fedavg", "weights": "equal"},
                "schedule": {"rounds": 2, "release": "last"},
                "local": {"steps": 1, "optimizer": "sgd"},
                "protection": {
                    "secure": True,
                    "privacy": {"preset": "moderate", "noise": "distributed", "delta": 1e-5},
                },
            },
            "ewc adds a pull of its own",
        ),
        (
            {
                "update": {"finetune": {}},
                "method": {"kind": "fedavg", "weights": "equal"},
                "schedule": {"rounds": 2, "release": "last"},
                "protection": {"privacy": {"preset": "moderate"}},
            },
            "update.finetune: with protection.privacy",
        ),
    ],
)
def test_what_an_update_cannot_be_combined_with(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        toy_study("ABC", **changes)


def test_another_file_is_one_clear_error(parent: Result, fisher: Path) -> None:
    good = load_file(fisher)
    of = {"format": "wardround-fisher-1", "of": parent.model_sha256}

    def check(values: Floats, metadata: dict[str, str], *, named: bool = True, sha256: str | None = None) -> None:
        path = parent.out.parent / "other.safetensors"
        save_file(values, path, metadata)
        said = file_sha256(path) if sha256 is None else sha256
        given = {"fisher": {"file": path.name, "sha256": said}} if named else {}
        update = {"retain": {"kind": "ewc", **given}}
        study = toy_study("A", start=start(parent), task=task(norm=True), update=update)
        specs = ArmSpecs(study, (), plugins=Plugins(code=True), places=study.places(parent.out.parent))
        specs.pull(specs.arm_spec("federated"))

    check(good, of)
    with pytest.raises(StudyError, match=r"is missing; `wardround update` measures it"):
        check(good, of, named=False)
    with pytest.raises(StudyError, match=r"has sha256 .*, and the study says none: write `sha256: [0-9a-f]{64}`"):
        check(good, of, sha256="")
    with pytest.raises(StudyError, match="is of another release than `start` names"):
        check(good, {**of, "of": "cd" * 32})
    with pytest.raises(StudyError, match="holds no Fisher information"):
        check(good, {"format": "wardround-model-1"})
    with pytest.raises(StudyError, match="holds a value that no square is"):
        check({**good, "0.bias": -np.ones(8, np.float32)}, of)
    with pytest.raises(StudyError, match=r"has nothing for 0\.bias"):
        check({name: value for name, value in good.items() if name != "0.bias"}, of)
    (parent.out.parent / "other.safetensors").unlink()
    held_by = {"retain": {"kind": "ewc", "fisher": {"file": "other.safetensors", "sha256": "ab" * 32}}}
    specs = ArmSpecs(toy_study("A", start=start(parent), task=task(norm=True), update=held_by), ())
    with pytest.raises(StudyError, match="does not exist; put it there"):
        _ = specs.fisher


# The release as a teacher -------------------------------------------------------------------------------------------


def test_lwf_is_the_loss_of_the_paper() -> None:
    """own + weight x cross-entropy at the temperature, up to a factor and what moves no weight."""
    weight, temperature = 1.5, 2.0
    study = outline_study({"A": {}}, start=RELEASE, update={"retain": {"kind": "lwf", "weight": weight}})
    taught = study.task.taught_by
    assert isinstance(taught, TaughtBy)
    assert (taught.file, taught.sha256, taught.temperature) == ("parent", "ab" * 32, temperature)
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 5, 5, generator=random, requires_grad=True)
    said = torch.randn(2, 1, 5, 5, generator=random)
    own = logits.square().mean()
    ours = taught.alpha * own + (1.0 - taught.alpha) * binary_distillation(
        logits, Said(said, torch.ones(2, 1)), temperature
    )
    soft = nn.functional.binary_cross_entropy_with_logits(logits / temperature, torch.sigmoid(said / temperature))
    paper = own + weight * soft
    (mine,) = torch.autograd.grad(ours, logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(paper, logits)
    assert mine.numpy() == pytest.approx(theirs.numpy() / (1.0 + weight / temperature**2), rel=1e-5, abs=1e-9)


def test_the_teacher_follows_from_the_update_and_is_not_written() -> None:
    update = {"retain": {"kind": "lwf"}}
    study = outline_study({"A": {}}, start=RELEASE, update=update)
    assert "teacher" not in written(study)["task"]
    again = load_study(written(study))
    assert study_sha256(again) == study_sha256(study)
    assert again.task.taught_by == study.task.taught_by
    # As a model's file holds it, with every default: what is said twice is no contradiction.
    assert Study.model_validate_json(study.model_dump_json()).task.taught_by == study.task.taught_by
    other = {"teacher": {"file": "another", "sha256": "cd" * 32}}
    with pytest.raises(ValidationError, match=r"task.teacher names one; leave one out"):
        outline_study({"A": {}}, start=RELEASE, update=update, task=other)
    # Nothing of an update is in the hash of a study without one.
    assert "update" not in written(outline_study({"A": {}}))


def test_lwf_trains_with_the_parent_as_its_teacher(tmp_path: Path) -> None:
    """A student that begins as its teacher feels the divergence only once it has moved."""
    quick = {"schedule": {"rounds": 1}, "local": {"steps": 2, "batch": 2, "optimizer": "sgd", "lr": 0.5}}
    sites = make_outlines(tmp_path / "data", {"A": 4})
    first = run(outline_study({"A": {}}, **quick), sites, tmp_path / "parent", engine="local", quiet=True)
    begun = {"kind": "release", "file": "parent", "sha256": first.model_sha256}

    def go_on(out: str, retain: Mapping[str, Any]) -> Floats:
        study = outline_study({"A": {}}, start=begun, update={"retain": retain, "train_on": "all"}, seed=9, **quick)
        result = run(study, sites, tmp_path / out, engine="local", quiet=True, near=tmp_path)
        return load_model(model_path(result.out, "federated"))[0]

    def far(values: Floats) -> float:
        before = load_model(model_path(first.out, "federated"))[0]
        return float(np.sqrt(sum(np.square(values[n] - before[n]).sum() for n in before if n.endswith("weight"))))

    # The weight is the teacher's alone: the own loss is a hundredth of what it was.
    assert 0.0 < far(go_on("lwf", {"kind": "lwf", "weight": 400.0})) < 0.2 * far(go_on("plain", {"kind": "none"}))
