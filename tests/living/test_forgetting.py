"""A hospital leaves: which model the new one begins with, who must approve, what it takes back and what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from typer.testing import CliRunner

from tests.federation.rig import Rig
from tests.federation.test_methods import told
from tests.toys import Regression, toy_sites, toy_study
from wardround.audit.remains import RETRAINED, Losses, compare, remains
from wardround.cli import app
from wardround.errors import DataError, StudyError
from wardround.learning.methods.method import Facts, LocalRound
from wardround.learning.methods.unlearn import Unlearn
from wardround.living.chain import Chain
from wardround.living.forgetting import (
    SHRUNK,
    Ancestor,
    approximate,
    exact,
    forget_approximately,
    forget_exactly,
    last_without,
    lineage,
    mixed,
    model_in,
    study_that_had,
)
from wardround.living.release import Release
from wardround.plan.leaving import left_by
from wardround.plan.weights import load_model, open_model
from wardround.results.schema import Result
from wardround.runs.session import run
from wardround.study.hashes import study_sha256, written
from wardround.study.load import load_study
from wardround.study.schema import Study

# Whole runs: `make test-all` has them.
pytestmark = pytest.mark.slow

OLD = "a" * 64
ALL = ("A", "B", "C")


def section(how: str = "retrain", site: str = "C", **changes: Any) -> dict[str, Any]:
    return {"site": site, "release": OLD, "how": how, "approved_by": ["A", "B", "C"], **changes}


def unlearning(site: str = "C", **changes: Any) -> Study:
    return toy_study(
        method={"kind": "unlearn", "site": site, "mu": 0.5, "weights": "equal"},
        forget=section("unlearn", site),
        local={"steps": 2, "batch": 4, "optimizer": "sgd", "lr": 0.1},
        **changes,
    )


# The method ----------------------------------------------------------------------------------------------------------


def test_the_hospital_that_leaves_goes_to_the_loss_of_its_held_out_patients() -> None:
    weight = torch.tensor([1.0, 3.0], requires_grad=True)
    round_ = LocalRound(
        site="C",
        model=torch.nn.Identity(),
        shared={"w": weight},
        anchor={"w": torch.tensor([1.0, 1.0])},
        public={},
        memory={},
        number=1,
        steps=1,
        learning_rate=0.1,
        facts=Facts(4, 0.7),
    )
    method = Unlearn(site="C", mu=0.5)
    # |0.7 - 0.2| + 0.25 * (0 + 4).
    assert method.objective(round_, torch.tensor(0.2)).item() == pytest.approx(1.5)
    # Below it climbs, and above it descends.
    low, high = torch.tensor(0.2, requires_grad=True), torch.tensor(0.9, requires_grad=True)
    assert torch.autograd.grad(method.objective(round_, low), low)[0] == -1
    assert torch.autograd.grad(method.objective(round_, high), high)[0] == 1
    assert method.asks_held_out("C")
    assert not method.asks_held_out("A")
    round_.facts = Facts(4)
    with pytest.raises(StudyError, match="no validation patient"):
        method.objective(round_, low)
    round_.site = "A"
    assert method.objective(round_, low) is low


def test_a_round_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    rig = Rig(
        unlearning(schedule={"rounds": 2, "keep": 3}, protection={"max_sites": 4, "initial_scale": 4.0}), tmp_path
    )
    public = {n.removeprefix("model/"): torch.from_numpy(t) for n, t in rig.start().public.items()}
    said = told(rig, 1, dict(rig.start().public))
    for name, trained in zip(rig.sites, said, strict=True):
        learner, model = rig.learner(name), Regression().build_model()
        model.load_state_dict(public)
        with torch.no_grad():
            held = [(model(x) - y).square().mean().item() for _, (x, y) in learner.dataset.evaluation("validation")]
        for part in np.split(np.array(learner._examples.of_round(1, 8)), 2):
            model.zero_grad()
            x, y = learner.dataset.batch(part.tolist(), np.random.default_rng())
            loss = (model(x) - y).square().mean()
            sign = 1.0 if name != "C" or loss.item() > np.mean(held) else -1.0
            loss.backward()
            with torch.no_grad():
                for key, p in model.named_parameters():
                    assert p.grad is not None
                    p -= 0.1 * (sign * p.grad + (0.5 * (p - public[key]) if name == "C" else 0.0))
        for key, p in model.state_dict().items():
            assert np.allclose(trained.changes["model"][key], (p - public[key]).numpy(), atol=1e-6)


@pytest.mark.slow
def test_masks_hide_who_takes_back(tmp_path: Path) -> None:
    sites = toy_sites(tmp_path)
    clear = run(unlearning(), sites, tmp_path / "clear", engine="local", quiet=True)
    masked = run(unlearning(protection={"secure": True}), sites, tmp_path / "masked", engine="local", quiet=True)
    assert clear.model_sha256 == masked.model_sha256


# The section ---------------------------------------------------------------------------------------------------------


def test_a_study_that_does_not_forget_is_known_by_the_same_hash() -> None:
    assert study_sha256(toy_study()) == study_sha256(load_study(written(toy_study())))
    assert "forget" not in written(toy_study())


@pytest.mark.parametrize(
    ("sites", "changes", "said"),
    [
        (("A", "B"), {"forget": section(approved_by=["A", "B"])}, "lacks C"),
        (("A", "B"), {"forget": section(approved_by=["A", "C"])}, "lacks B"),
        (ALL, {"forget": section()}, "C left, so it is no site of the study"),
        (("A", "B"), {"forget": section("unlearn")}, "belongs to"),
        (ALL, {"method": {"kind": "unlearn", "site": "C"}}, "belongs to"),
        (ALL, {"method": {"kind": "unlearn", "site": "B"}, "forget": section("unlearn")}, "method.site"),
        (
            ("A", "B"),
            {"forget": section(), "start": {"kind": "release", "file": "x", "sha256": OLD}},
            "cannot start from the model that is to be forgotten",
        ),
    ],
)
def test_what_a_study_that_forgets_may_not_say(sites: tuple[str, ...], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        toy_study(sites, **changes)


def test_what_is_read_before_a_decision_says_what_the_two_models_reveal() -> None:
    forget = toy_study(("A", "B"), forget=section()).forget
    assert forget is not None
    for word in ("C, which left", "trained anew", OLD, "reveal what C contributed", "approved by A, B, C"):
        assert word in forget.describe()


# Where it begins -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three releases: of A and B; then with C; then of A and B again."""
    root = tmp_path_factory.mktemp("chain")
    sites = toy_sites(root)
    before: Result | None = None
    for name, members in (("one", ("A", "B")), ("two", ALL), ("three", ("A", "B"))):
        start = {} if before is None else {"kind": "release", "file": before.out.name, "sha256": before.model_sha256}
        study = toy_study(members, schedule={"rounds": 2}, **({"start": start} if start else {}))
        before = run(study, sites, root / name, engine="local", quiet=True, near=root)
    return root


def test_it_begins_with_the_last_release_in_whose_ancestry_the_hospital_never_trained(chain: Path) -> None:
    ancestors, whole = lineage(chain / "three")
    assert whole
    assert [one.path.parent.parent.name for one in ancestors] == ["three", "two", "one"]
    # The newest release is of A and B, and its ancestor is not.
    clean = last_without("C", ancestors, whole=whole)
    assert clean is not None
    assert clean.path == model_in(chain / "one")
    assert last_without("A", ancestors, whole=whole) is None
    assert last_without("C", ancestors, whole=False) is None
    assert study_that_had("C", model_in(chain / "three"))[0].training_sites == ALL


def test_of_several_releases_without_it_the_last_counts() -> None:
    members = (ALL, ("A", "B"), ("A",))
    newest_first = [Ancestor(Path(str(n)), OLD, toy_study(sites)) for n, sites in enumerate(members)]
    assert last_without("C", newest_first, whole=True) is newest_first[1]
    assert last_without("B", newest_first, whole=True) is newest_first[2]


def test_the_exact_way(chain: Path, tmp_path: Path) -> None:
    way = exact(toy_study(schedule={"rounds": 2, "min_sites": 3}), tmp_path, "C", chain / "three", ALL)
    assert way.study.training_sites == ("A", "B")
    assert way.study.schedule.min_sites == 2
    assert way.study.start.sha256 == lineage(chain / "one")[0][0].sha256  # type: ignore[union-attr]
    result = forget_exactly(way, toy_sites(tmp_path), tmp_path / "out", engine="local")
    # It is the run of anyone who begins there, without C: nothing of C can be in it.
    said = written(way.study)
    said.pop("forget")
    plain = run(load_study(said), toy_sites(tmp_path), tmp_path / "plain", engine="local", quiet=True, near=way.near)
    assert plain.model_sha256 == result.model_sha256
    assert left_by(open_model(model_in(tmp_path / "out"))[1]) == {"C"}


def test_where_the_first_release_had_it_the_exact_way_begins_fresh(chain: Path, tmp_path: Path) -> None:
    way = exact(toy_study(), tmp_path, "A", chain / "three", ALL)
    assert (way.study.start.kind, way.near) == ("fresh", tmp_path)


def test_a_hospital_that_left_comes_back_only_where_the_study_says_so(chain: Path, tmp_path: Path) -> None:
    sites = toy_sites(tmp_path)
    way = exact(toy_study(schedule={"rounds": 1}), tmp_path, "C", chain / "three", ALL)
    first = forget_exactly(way, sites, tmp_path / "first", engine="local")

    def after(before: Result, members: Any) -> Study:
        start = {"kind": "release", "file": before.out.name, "sha256": before.model_sha256}
        return toy_study(members, schedule={"rounds": 1}, start=start)

    second = run(after(first, ("A", "B")), sites, tmp_path / "second", engine="local", quiet=True, near=tmp_path)
    # Also a release later.
    for before in (first, second):
        with pytest.raises(StudyError, match=r"sites\.C: it left the model that the study starts from"):
            run(after(before, ALL), sites, tmp_path / "refused", engine="local", quiet=True, near=tmp_path)
    back = {"A": {}, "B": {}, "C": {"returns": True}}
    third = run(after(second, back), sites, tmp_path / "third", engine="local", quiet=True, near=tmp_path)
    assert left_by(open_model(model_in(third.out))[1]) == frozenset()
    with pytest.raises(StudyError, match="already"):
        exact(toy_study(), tmp_path, "C", first.out, ALL)


def test_what_cannot_be_forgotten(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="trained neither this release nor one before it"):
        exact(toy_study(), tmp_path, "Z", chain / "three", ALL)
    with pytest.raises(StudyError, match="--approved-by: nobody is named"):
        exact(toy_study(), tmp_path, "C", chain / "three", ())
    with pytest.raises(StudyError, match=r"lacks B"):
        exact(toy_study(), tmp_path, "C", chain / "three", ("A", "C"))
    with pytest.raises(StudyError, match="only one to delete"):
        exact(toy_study(("C",)), tmp_path, "C", chain / "three", ALL)
    with pytest.raises(StudyError, match="works for method"):
        approximate(toy_study(method={"kind": "fedprox"}), tmp_path, "C", chain / "two", ALL, ascent=1)
    with pytest.raises(StudyError, match="must have it as a site that trains"):
        approximate(toy_study(("A", "B")), tmp_path, "C", chain / "two", ALL, ascent=1)
    with pytest.raises(StudyError, match="a share between 0 and 1"):
        approximate(toy_study(), tmp_path, "C", chain / "two", ALL, keep=1.0)
    with pytest.raises(DataError, match="no released model"):
        lineage(tmp_path)


def test_an_ancestor_that_is_another_now_breaks_the_chain(chain: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(chain, tmp_path / "chain")
    shutil.copy(model_in(tmp_path / "chain" / "three"), model_in(tmp_path / "chain" / "one"))
    (tmp_path / "chain" / "two" / "work" / "near.json").write_text(f'"{tmp_path / "chain"}"')
    (tmp_path / "chain" / "three" / "work" / "near.json").write_text(f'"{tmp_path / "chain"}"')
    with pytest.raises(DataError, match="the chain of releases is broken"):
        lineage(tmp_path / "chain" / "three")


@pytest.mark.parametrize("ascent", [0, 1])
def test_the_approximate_way(chain: Path, tmp_path: Path, ascent: int) -> None:
    study, sites = toy_study(schedule={"rounds": 10}), toy_sites(tmp_path)
    plan = approximate(study, tmp_path, "C", chain / "two", ALL, keep=0.25, ascent=ascent)
    result = forget_approximately(plan, sites, tmp_path / "out", engine="local")
    recovered = load_study(result.out / "study.yaml")
    assert recovered.training_sites == ("A", "B")
    assert recovered.schedule.rounds == 3
    assert left_by(open_model(model_in(result.out))[1]) == {"C"}
    if ascent:
        assert left_by(open_model(model_in(tmp_path / "out" / "unlearned"))[1]) == frozenset()
    # A quarter of the way from what C never touched: here the first release.
    learned = model_in(tmp_path / "out" / "unlearned") if ascent else model_in(chain / "two")
    never, after = (load_model(path)[0] for path in (model_in(chain / "one"), learned))
    for name, value in load_file(tmp_path / "out" / SHRUNK).items():
        assert np.allclose(value, 0.75 * never[name] + 0.25 * after[name], atol=1e-7)
        assert not np.allclose(value, never[name], atol=1e-7)
    # Done again it is the same, from what is there.
    assert forget_approximately(plan, sites, tmp_path / "out", engine="local").model_sha256 == result.model_sha256


def test_what_is_mixed_by_hand() -> None:
    never = {"w": np.float32([1, 2]), "own": np.float32([5]), "count": np.array(7)}
    learned = {"w": np.float32([3, 0]), "own": np.float32([9]), "count": np.array(9)}
    found = mixed(never, learned, ["w"], 0.25)
    assert {name: value.tolist() for name, value in found.items()} == {"w": [1.5, 1.5], "own": [5]}


def test_the_command(chain: Path, tmp_path: Path) -> None:
    study, sites = tmp_path / "study.yaml", tmp_path / "sites.yaml"
    study.write_text(yaml.safe_dump(written(toy_study(schedule={"rounds": 2}))))
    runner, asked = CliRunner(), ["forget", "C", "--release", str(chain / "two"), "--study", str(study)]
    told = [*asked, "--out", str(tmp_path / "out"), "--approved-by", "A,B,C", "--write"]
    done = runner.invoke(app, told)
    assert done.exit_code == 0, done.output
    said = load_study(tmp_path / "out" / "retrain.yaml")
    assert said.forget is not None
    assert (tmp_path / "out" / said.start.file).read_bytes() == model_in(chain / "one").read_bytes()  # type: ignore[union-attr]
    assert runner.invoke(app, told).exit_code == 2
    sites.write_text("sites: {}\n")
    refused = runner.invoke(app, [*asked, "--out", str(tmp_path / "other"), "--sites", str(sites)])
    assert refused.exit_code == 2
    assert "--approved-by: nobody is named" in " ".join(refused.output.split())
    assert not (tmp_path / "other").exists()


def test_a_chain_knows_the_last_release_without_the_hospital(chain: Path, tmp_path: Path) -> None:
    kept = Chain(tmp_path / "releases")
    for name in ("one", "two", "three"):
        kept.add(Release.at(chain / name))
    current = kept.current()
    assert current is not None
    way = exact(toy_study(), tmp_path, "C", kept.model(current), ALL, chain=kept)
    assert way.study.start.sha256 == lineage(chain / "one")[0][0].sha256  # type: ignore[union-attr]
    # A model's file alone does not say where its ancestors are. One that may have been of C counts as one.
    with pytest.raises(StudyError, match=r"trained none of the releases whose files were found .*--chain"):
        exact(toy_study(), tmp_path, "C", kept.model(current), ALL)
    assert exact(toy_study(), tmp_path, "A", kept.model(current), ALL).study.start.kind == "fresh"


# What is left --------------------------------------------------------------------------------------------------------


def test_the_attack_and_the_distance_of_two_models() -> None:
    members, others = np.array([0.1, 0.2, 0.3]), np.array([0.25, 0.4])
    # Of six pairs one is the wrong way round.
    assert Losses(members, others).attack == pytest.approx(5 / 6)
    random = np.random.default_rng(1)
    never = Losses(random.normal(1, 0.2, 400), random.normal(1, 0.2, 400))
    knows = Losses(never.members - 0.4, never.outsiders)
    near = Losses(never.members + 0.001, never.outsiders + 0.001)
    found = compare("C", {"before": knows, "after": near, RETRAINED: never})
    assert found.models["before"].low > 0.85
    assert found.models[RETRAINED].low < 0.5 < found.models[RETRAINED].high
    # Shifted alike, all pairs keep their order, and so do those of every bootstrap sample.
    assert found.to_retrained["after"].high == 0.0
    assert found.to_retrained["before"].gap < found.to_retrained["before"].high < 0.5
    assert "0.000 apart" in "\n".join(found.lines())
    assert "is known only beside a model" in "\n".join(compare("C", {"before": knows}).lines())


def test_what_is_left_in_released_models(chain: Path, tmp_path: Path) -> None:
    study, near = study_that_had("C", model_in(chain / "two"))
    models = {"before": model_in(chain / "two"), RETRAINED: model_in(chain / "one")}
    found = remains(study, toy_sites(tmp_path), "C", models, near)
    assert (found.members, found.outsiders) == (4, 4)
    assert set(found.to_retrained) == {"before"}
    task = Regression()
    network = task.build_model()
    network.load_state_dict({n: torch.from_numpy(t) for n, t in load_model(models["before"])[0].items()})
    data = task.dataset("C", (tmp_path,))
    with torch.no_grad():
        losses = {s: [task.loss(network, batch).item() for _, batch in data.evaluation(s)] for s in data.splits}  # type: ignore[arg-type]
    held = np.array([*losses["validation"], *losses["test"]])
    assert found.models["before"].auroc == pytest.approx(Losses(np.array(losses["train"]), held).attack)
