"""What a study starts from, by hash; and parts of a model that never change or never leave a site."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from tests.apart import apart, comparable
from tests.applied import reconstruct
from tests.federation.rig import Rig, assert_billed, recorded_sessions
from tests.mri_hospitals import head, make_hospitals, save, write_study
from tests.toys import Regression, make_task, toy_sites, toy_study
from wardround.audit.auditor import Auditor, Effort
from wardround.cli import app
from wardround.errors import DataError, Interrupted, StudyError
from wardround.federation.exchange import EVALUATE, TRAIN, UPDATE
from wardround.federation.facts import DELIVER
from wardround.federation.release import model_path, shared_sha256
from wardround.learning.device import Compute
from wardround.learning.frozen import train_mode
from wardround.plan.arm_specs import ArmSpecs
from wardround.plan.weights import file_sha256, frozen_part, load_model, save_frozen
from wardround.results.files import read_result, read_rounds
from wardround.results.schema import Bill, Started
from wardround.runs.explain import explain
from wardround.runs.inspection import inspect_model
from wardround.runs.machine import Machine
from wardround.runs.session import evaluate, open_host, run
from wardround.storage.store import NOTHING
from wardround.study.load import load_study
from wardround.study.places import Places
from wardround.study.plugins import Plugins
from wardround.study.schema import Study
from wardround.study.sites import load_sites
from wardround.study.start import Parts
from wardround.wire.tensors import tensors_sha256

Tensors = Mapping[str, Any]
CODE = Plugins(code=True)
NORM = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"norm": True}}
FROZEN = {"frozen": ["0.*", "1.*"]}
QUICK = {"rounds": 2}


def plans(study: Study, near: Path = Path()) -> ArmSpecs:
    return ArmSpecs(study, ("local", "pooled"), plugins=CODE, places=study.places(near))


def values(seed: int = 1, **options: Any) -> dict[str, Any]:
    """Values of the toy network that no study begins with."""
    torch.manual_seed(seed)
    return {name: tensor.numpy() for name, tensor in make_task(**options).build_model().state_dict().items()}


def weights(path: Path, tensors: Tensors, **changes: Any) -> dict[str, Any]:
    """A weights file beside a study, and the section of the study that starts from it."""
    save_file(dict(tensors), path)
    return {"kind": "weights", "file": path.name, "sha256": file_sha256(path), **changes}


def released(out: Path) -> dict[str, Any]:
    return load_model(model_path(out, "federated"))[0]


# Where a model begins -----------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_the_release_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: what the sites get in round 1 is what was released. The lint compares it with the site's own."""
    sites = toy_sites(tmp_path / "data")
    first = run(
        toy_study(schedule=QUICK, task=NORM), sites, tmp_path / "first", engine="local", near=tmp_path, quiet=True
    )
    assert first.start == Started()
    start = {"kind": "release", "file": "first", "sha256": first.model_sha256}
    sent = recorded_sessions(monkeypatch)
    study = toy_study(schedule=QUICK, task=NORM, start=start, seed=8)
    second = run(study, sites, tmp_path / "second", engine="local", near=tmp_path, quiet=True)
    expected = released(tmp_path / "first")
    shared = {name for name in expected if not name.endswith("num_batches_tracked")}
    asked = [s for s in sent if s.message.header.kind == TRAIN and s.message.header.round == 1]
    assert len(asked) == 3
    for each in asked:
        found, at = set(), 0
        for info in each.message.header.tensors:
            name = info.name.partition("/")[2]
            assert each.body[at : at + info.nbytes] == expected[name].tobytes()
            at += info.nbytes
            found.add(name)
        assert found == shared
    assert second.start == Started(kind="release", sha256=first.model_sha256)
    assert not any(json.loads(line)["missing"] for line in (second.out / "rounds.jsonl").read_text().splitlines())
    assert f"Started from: the released model {first.model_sha256}" in (second.out / "model_card.md").read_text()
    assert f"started from the released model {first.model_sha256}" in inspect_model(model_path(second.out, "federated"))


def test_a_weights_file_is_what_it_says(tmp_path: Path) -> None:
    known = values()
    whole = plans(toy_study(start=weights(tmp_path / "w.safetensors", known)), tmp_path).model_context.initial_values()
    assert all(np.array_equal(whole[name], known[name]) for name in known)
    fresh = plans(toy_study()).model_context.initial_values()

    part = {name: tensor for name, tensor in known.items() if name.startswith("0.")}
    begun = plans(
        toy_study(start=weights(tmp_path / "p.safetensors", part, partial=True)), tmp_path
    ).model_context.initial_values()
    inside = {name.removeprefix("0."): tensor.astype(np.float16) for name, tensor in part.items()}
    into = plans(
        toy_study(start=weights(tmp_path / "i.safetensors", inside, into="0")), tmp_path
    ).model_context.initial_values()
    for name in fresh:
        assert np.array_equal(begun[name], (part if name in part else fresh)[name])
        # Half precision is widened.
        assert np.array_equal(into[name], part[name].astype(np.float16) if name in part else fresh[name])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sha256": "ab" * 32}, r"start.file: .*w.safetensors is .*: its sha256 is {sha256}, and the study says abab"),
        ({"sha256": ""}, "start.sha256: is missing.*write `sha256: {sha256}`"),
        (
            {"file": "no/where.safetensors"},
            r"no/where.safetensors does not exist.*`start` in a site's entry",
        ),
        ({"into": "encoder"}, "holds values that the model lacks: encoder.0.bias, .*set `start.into`"),
        ({"kind": "release"}, "it is not a model that `wardround run` wrote"),
    ],
)
def test_another_file_is_one_clear_error(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    start = {**weights(tmp_path / "w.safetensors", values()), **changes}
    with pytest.raises(StudyError, match=reason.format(sha256=file_sha256(tmp_path / "w.safetensors"))):
        _ = plans(toy_study(start=start), tmp_path).model_context


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"0.weight": None}, r"has no values for 0.weight; set `start.partial: true`"),
        ({"9.weight": np.zeros(2, np.float32)}, r"holds values that the model lacks: 9.weight"),
        ({"0.bias": np.zeros(2, np.float32)}, r"has 0.bias of shape \[2\], and the model one of \[8\]"),
        ({"0.bias": np.zeros(8)}, r"has 0.bias as float64, which the model's float32 cannot hold"),
    ],
)
def test_values_that_do_not_fit_are_one_clear_error(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    tensors = {name: tensor for name, tensor in {**values(), **change}.items() if tensor is not None}
    with pytest.raises(StudyError, match=reason):
        _ = plans(toy_study(start=weights(tmp_path / "w.safetensors", tensors)), tmp_path).model_context


def test_only_what_the_study_names_is_taken_of_a_file(tmp_path: Path) -> None:
    """The rest of the file may be of any other network; what is named must be there on both sides."""
    known = values()
    fresh = plans(toy_study()).model_context.initial_values()
    other = {**known, "decoder.weight": np.zeros(3, np.float32), "0.bias": np.zeros(99, np.float32)}
    start = weights(tmp_path / "w.safetensors", other, only=["2.*", "?.weight"], partial=True)
    begun = plans(toy_study(start=start), tmp_path).model_context.initial_values()
    taken = {"0.weight", "2.weight", "2.bias"}
    assert taken < fresh.keys()
    assert all(np.array_equal(begun[name], (known if name in taken else fresh)[name]) for name in fresh)
    inside = {**{name.removeprefix("0."): known[name] for name in ("0.weight", "0.bias")}, "rest": known["2.bias"]}
    start = weights(tmp_path / "i.safetensors", inside, into="0", only=["weight", "bias"])
    begun = plans(toy_study(start=start), tmp_path).model_context.initial_values()
    assert all(np.array_equal(begun[name], (known if name.startswith("0.") else fresh)[name]) for name in fresh)


@pytest.mark.parametrize(
    ("only", "lacks", "reason"),
    [
        (["0.*", "9.*"], "", r"start.only: '9.\*' matches no value of w.safetensors, which has 0.bias, 0.weight, 2"),
        (["0.*"], "0.bias", "start.only: w.safetensors has no values for 0.bias, which the patterns name"),
        (["0.*", "2.*"], "2.bias", "start.only: w.safetensors has no values for 2.bias, which the patterns name"),
        (["*"], "", "holds values that the model lacks: decoder.weight"),
    ],
)
def test_what_is_taken_of_a_file_is_there_on_both_sides(
    tmp_path: Path, only: list[str], lacks: str, reason: str
) -> None:
    tensors = {name: value for name, value in values().items() if name != lacks}
    tensors["decoder.weight"] = np.zeros(3, np.float32)
    start = weights(tmp_path / "w.safetensors", tensors, only=only, partial=True)
    with pytest.raises(StudyError, match=reason):
        _ = plans(toy_study(start=start), tmp_path).model_context


@pytest.mark.parametrize("file", ["/etc/passwd", "../others/w.safetensors", "a/../../w.safetensors"])
def test_a_study_asks_for_nothing_outside_its_folder(file: str) -> None:
    """Whether a file is there, and which, is for a site to say: its own entry of the sites file names any place."""
    with pytest.raises(ValueError, match="no path below the study's folder"):
        toy_study(start={"kind": "weights", "file": file, "sha256": "ab" * 32})


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.safetensors")
    with pytest.raises(StudyError, match=r"w.safetensors is no file"):
        _ = plans(toy_study(start={"kind": "weights", "file": "w.safetensors"}), tmp_path).model_context


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"0.weight": torch.zeros(2)}, path)
    start = {"kind": "weights", "file": path.name, "sha256": file_sha256(path)}
    with pytest.raises(StudyError, match=r"must be a .safetensors file"):
        _ = plans(toy_study(start=start), tmp_path).model_context


def test_a_start_that_changed_stops_the_run_before_it_goes_on(tmp_path: Path) -> None:
    start = weights(tmp_path / "w.safetensors", values())
    study, sites = toy_study(schedule=QUICK, start=start), toy_sites(tmp_path / "data")
    run(study, sites, tmp_path / "out", engine="local", near=tmp_path, quiet=True)
    save_file(values(2), tmp_path / "w.safetensors")
    with pytest.raises(StudyError, match="is another file than the study's, or it changed"):
        run(study, sites, tmp_path / "out", engine="local", near=tmp_path, quiet=True)


def test_a_personal_release_says_what_its_hash_does_not_cover(tmp_path: Path) -> None:
    sites = toy_sites(tmp_path / "data")
    study = toy_study(schedule=QUICK, task=NORM, method={"kind": "fedbn"})
    first = run(study, sites, tmp_path / "first", engine="local", near=tmp_path, quiet=True)
    start = {"kind": "release", "file": "first", "sha256": first.model_sha256}
    with pytest.raises(StudyError, match=r"has no values for 1.weight, 1.bias"):
        _ = plans(toy_study(task=NORM, start=start), tmp_path).model_context
    begun = plans(toy_study(task=NORM, start={**start, "partial": True}), tmp_path).model_context.initial_values()
    assert np.array_equal(begun["0.weight"], released(tmp_path / "first")["0.weight"])


# Parts --------------------------------------------------------------------------------------------------------------


def test_what_is_frozen_moves_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in no message, no journal and no store, and on the disk once; the rest trains as without it."""
    known = values(norm=True)
    sites = toy_sites(tmp_path / "data")
    start = weights(tmp_path / "w.safetensors", known)
    sent = recorded_sessions(monkeypatch)
    study = toy_study(schedule=QUICK, task=NORM, start=start, parts=FROZEN)
    result = run(study, sites, tmp_path / "out", compare=("local", "pooled"), engine="local", near=tmp_path, quiet=True)
    assert_billed(result, sent)
    names = {name for name in known if name.startswith(("0.", "1."))}
    secret = known["0.weight"].tobytes()
    assert {s.message.header.kind for s in sent} >= {TRAIN, UPDATE, DELIVER}
    for each in sent:
        assert secret not in each.body
        assert not any(
            info.name.partition("/")[2] in names or info.name in names for info in each.message.header.tensors
        )
    holding = [path for path in result.out.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert holding == [result.out / "weights" / f"{result.frozen_sha256}.safetensors"]
    assert load_file(holding[0]).keys() == names

    free = run(
        toy_study(schedule=QUICK, task=NORM, start=start),
        sites,
        tmp_path / "free",
        engine="local",
        near=tmp_path,
        quiet=True,
    )
    for line in (*read_rounds(result.out), *result.traffic.arms.values(), result.traffic):
        bills = {name: bill for name, bill in line if isinstance(bill, Bill)}
        assert all((bill.up.base, bill.down.base) == (0, 0) for bill in bills.values())
    spared = sum(known[name].nbytes for name in names if not name.endswith("tracked"))
    # Each of 2 rounds and 3 sites: the model goes down and up as 32 bits a value; and there are less headers.
    assert free.traffic.bytes_up - result.traffic.bytes_up >= 6 * spared
    assert free.traffic.bytes_down - result.traffic.bytes_down >= 6 * spared
    model, metadata = load_model(model_path(result.out, "federated"))
    whole = {**model, **frozen_part(model_path(result.out, "federated"), metadata)}
    for name in known:
        assert np.array_equal(whole[name], known[name]) == (name in names)
    assert result.frozen_sha256 in (result.out / "model_card.md").read_text()
    assert evaluate(result.out, sites, engine="local", quiet=True, allow_code=True).metrics == result.metrics


def test_frozen_layers_stay_in_evaluation_mode_and_out_of_the_optimiser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(toy_study(task=NORM, parts=FROZEN, schedule=QUICK), tmp_path)
    model, modes = rig.host.model_context.model, []
    model.register_forward_hook(lambda m, *_: modes.append((m.training, m[1].training, m[2].training)))
    frozen = {name: rig.host.model_context.initial[name] for name in rig.host.model_context.frozen}
    # Held once: the model context has no copy of what never changes.
    assert all(tensor.data_ptr() == model.state_dict()[name].data_ptr() for name, tensor in frozen.items())
    before = {name: tensor.clone() for name, tensor in frozen.items()}
    rig.train()
    assert {(True, False, True)} <= set(modes) <= {(True, False, True), (False, False, False)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.items())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["3.weight", "3.bias"]


def test_frozen_batch_norm_under_fedbn_keeps_its_statistics_everywhere(tmp_path: Path) -> None:
    """A frozen layer is no private part, and a hospital that did not train does not estimate it anew."""
    task = NORM
    parts = {"frozen": ["1.*"]}
    policy = plans(toy_study(task=task, parts=parts)).arm_spec("federated").policy
    assert {policy.roles[f"1.{name}"] for name in ("weight", "bias", "running_mean", "num_batches_tracked")} == {
        "frozen"
    }
    study = toy_study(task=task, parts=parts, method={"kind": "fedbn"})
    found = plans(study).arm_spec("federated")
    assert found.policy.names("local") == ()
    model_context = plans(study).model_context
    model_context.model.eval()
    x = torch.randn(9, 6)
    with torch.no_grad():
        expected = model_context.model(x)
        with found.method.serving_unseen(model_context.model):
            assert torch.equal(model_context.model(x), expected)


class HalfTrained(Regression):
    """A task that trains a part of its network."""

    def build_model(self) -> torch.nn.Module:
        model = super().build_model()
        for parameter in model[0].parameters():  # type: ignore[index]
            parameter.requires_grad_(False)
        return model


def half_trained() -> HalfTrained:
    """The factory that the study below names."""
    return HalfTrained()


def test_what_a_task_freezes_is_in_no_message_of_the_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The study froze nothing, so that the model's file is whole; to a site that tests it, it goes without."""
    sent = recorded_sessions(monkeypatch)
    task = {"kind": "custom", "factory": "tests.runs.test_start:half_trained"}
    study = toy_study(task=task, schedule={"rounds": 1})
    result = run(study, toy_sites(tmp_path / "data"), tmp_path / "out", engine="local", quiet=True)
    names = [info.name.rpartition("/")[2] for s in sent for info in s.message.header.tensors]
    assert EVALUATE in {s.message.header.kind for s in sent}
    assert set(names) == {"2.weight", "2.bias"}
    assert released(result.out).keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert result.frozen_sha256 is None


def test_what_is_local_stays_at_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a personal method's part, by name; one party alone has no part of its own beside its model."""
    sites = toy_sites(tmp_path / "data")
    sent = recorded_sessions(monkeypatch)
    study = toy_study(schedule=QUICK, parts={"local": ["2.*"]})
    result = run(study, sites, tmp_path / "out", compare=("local", "pooled"), engine="local", near=tmp_path, quiet=True)
    federated = [s for s in sent if s.message.header.study == plans(study).arm_spec("federated").identity]
    tables = [info.name for s in federated if s.message.header.kind == TRAIN for info in s.message.header.tensors]
    assert set(tables) == {"model/0.weight", "model/0.bias"}
    assert set(result.local_sha256) == {"A", "B", "C"}
    own = load_file(result.out / "models" / "A" / "federated" / "local.safetensors")
    assert own.keys() == {"2.weight", "2.bias"}
    assert not np.array_equal(
        own["2.weight"], load_file(result.out / "models/B/federated/local.safetensors")["2.weight"]
    )
    fresh = plans(study).model_context.initial_values()
    assert np.array_equal(released(result.out)["2.weight"], fresh["2.weight"])
    pooled = load_model(model_path(result.out, "pooled"))[0]
    assert not np.array_equal(pooled["2.weight"], fresh["2.weight"])


def test_a_frozen_part_is_stored_by_value_whatever_its_strides(tmp_path: Path) -> None:
    turned = {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3).T}
    sha256 = tensors_sha256(turned)
    save_frozen(turned, sha256, tmp_path)
    found = frozen_part(tmp_path / "model.safetensors", {"frozen": "w", "frozen_sha256": sha256})
    assert np.array_equal(found["w"], turned["w"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parts": {"frozen": ["encoder.*"]}}, r"parts.frozen: 'encoder.\*' matches no name .* 0.weight, 0.bias"),
        ({"parts": {"local": ["3.*"]}}, r"parts.local: '3.\*' matches no name"),
        ({"parts": {"frozen": ["0.*"], "local": ["*.bias"]}}, "0.bias would be both frozen and local"),
        ({"parts": {"frozen": ["*"]}}, "nothing is left to train and share"),
        ({"parts": {"frozen": ["0.*"], "local": ["2.*"]}}, "nothing is left to train and share"),
        (
            {"task": NORM, "method": {"kind": "fedbn"}, "parts": {"frozen": ["0.*", "3.*"]}},
            "nothing is left to train and share with method.kind=fedbn",
        ),
    ],
)
def test_parts_that_make_no_sense_are_one_clear_error(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(StudyError, match=reason):
        plans(toy_study(**changes)).arm_spec("federated")


def test_noise_of_all_sites_covers_no_part_of_one() -> None:
    with pytest.raises(ValueError, match=r"parts.local: with protection.privacy.noise=distributed"):
        toy_study(
            parts={"local": ["2.*"]},
            local={"steps": 1, "optimizer": "sgd"},
            schedule={"release": "last"},
            method={"weights": "equal"},
            protection={"secure": True, "privacy": {"noise": "distributed", "patients_per_step": 2, "delta": 1e-5}},
        )


def test_frozen_batch_norm_is_fit_for_privacy(tmp_path: Path) -> None:
    """Its statistics are of no patient here: only a layer that learns from batches is refused."""
    changes = {"schedule": {"rounds": 1, "release": "last"}, "method": {"weights": "equal"}, "local": {"steps": 1}}
    # The noise is given: the search for it takes seconds.
    privacy = {"privacy": {"patients_per_step": 2, "noise_multiplier": 1.0, "epsilon": 1000.0}}
    study = toy_study(("A", "B"), task=NORM, parts=FROZEN, protection=privacy, **changes)
    host = Machine(study, toy_sites(tmp_path, ("A", "B")), tmp_path / "out", ())
    learner = host.learner(host.arm_spec("federated"), "A")
    public, _ = host.initial(host.arm_spec("federated"))
    learner.load(public, NOTHING)
    changes = learner.train(1, public, NOTHING).changes
    assert changes["model"].keys() == {"3.weight", "3.bias"}
    host.close()
    free = Machine(study.model_copy(update={"parts": Parts()}), host.sites, tmp_path / "free", ())
    learner = free.learner(free.arm_spec("federated"), "A")
    with pytest.raises(StudyError, match="keeps statistics over patients"):
        learner.train(1, public, NOTHING)
    free.close()


def test_a_bench_on_another_device_holds_what_is_frozen_once_too() -> None:
    model_context = plans(toy_study(task=NORM, parts=FROZEN)).model_context.on(Compute(torch.device("cpu"), "bf16"))
    state = model_context.model.state_dict()
    assert {n for n, t in model_context.initial.items() if t.data_ptr() == state[n].data_ptr()} == model_context.frozen
    train_mode(model_context.model)
    assert [module.training for module in model_context.model] == [False, False, True, True]  # type: ignore[union-attr]


def test_frozen_parts_under_masks_come_to_the_same_bits(tmp_path: Path) -> None:
    clear, masked = (
        run(
            toy_study(task=NORM, parts=FROZEN, schedule=QUICK, protection={"secure": secure}),
            toy_sites(tmp_path / "data"),
            tmp_path / str(secure),
            engine="local",
            quiet=True,
        )
        for secure in (False, True)
    )
    assert masked.model_sha256 == clear.model_sha256


# Whole runs ---------------------------------------------------------------------------------------------------------

WHOLE = {"schedule": {"rounds": 3}, "task": NORM, "method": {"kind": "fedbn"}, "parts": {"frozen": ["0.*"]}}


@pytest.mark.slow
def test_parties_apart_come_to_the_same_model(tmp_path: Path) -> None:
    """Each site has its own copy of the start, by its sites file."""
    start = weights(tmp_path / "w.safetensors", values(norm=True))
    study = toy_study({"A": {}, "B": {}, "N": {"role": "unseen"}}, start=start, **WHOLE)
    sites = toy_sites(tmp_path / "data", tuple(study.sites))
    own = {}
    for name, entry in sites.sites.items():
        copy = tmp_path / "data" / name / "base.safetensors"
        copy.write_bytes((tmp_path / "w.safetensors").read_bytes())
        own[name] = entry.model_copy(update={"start": copy})
    with_copies = sites.model_copy(update={"sites": own}).with_code()
    together = run(study, sites, tmp_path / "together", engine="local", near=tmp_path, quiet=True)
    parted = apart(study, with_copies, tmp_path / "apart", near=tmp_path)
    assert comparable(parted.values) == comparable(together.values)
    assert parted.model_sha256 == shared_sha256(tmp_path / "apart/hospitals/N/models/federated.safetensors")
    frozen = tmp_path / "apart/hospitals/N/weights" / f"{parted.frozen_sha256}.safetensors"
    assert np.array_equal(load_file(frozen)["0.weight"], values(norm=True)["0.weight"])


@pytest.mark.slow
def test_a_site_refuses_another_base(tmp_path: Path) -> None:
    """It never trains on what the study did not name, and says so without its path."""
    start = weights(tmp_path / "w.safetensors", values())
    sites = toy_sites(tmp_path / "data", ("A", "B"))
    other = tmp_path / "data" / "B" / "Doe.safetensors"
    save_file(values(2), other)
    places = {"A": tmp_path / "w.safetensors", "B": other}
    changed = {name: entry.model_copy(update={"start": places[name]}) for name, entry in sites.sites.items()}
    study = toy_study(("A", "B"), schedule={"rounds": 1}, start=start)
    result = apart(study, sites.model_copy(update={"sites": changed}).with_code(), tmp_path / "apart", near=tmp_path)
    line = json.loads((result.out / "rounds.jsonl").read_text())
    assert line["participants"] == ["A"]
    assert "is another file than the study's, or it changed" in line["missing"]["B"]
    assert "Doe" not in line["missing"]["B"]


def test_stopped_and_resumed_is_one_run(tmp_path: Path) -> None:
    start = weights(tmp_path / "w.safetensors", values(norm=True))
    study, sites = toy_study(start=start, **WHOLE), toy_sites(tmp_path / "data")
    whole = run(study, sites, tmp_path / "whole", engine="local", near=tmp_path, quiet=True)

    class Stops:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

        def round(self, report: Any) -> None:
            if report.round == 2:
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        run(study, sites, tmp_path / "out", engine="local", watcher=Stops(), near=tmp_path)  # type: ignore[arg-type]
    assert not (tmp_path / "out" / "models").exists()
    again = run(study, sites, tmp_path / "out", engine="local", near=tmp_path, quiet=True, resume=True)
    assert comparable(again.values) == comparable(whole.values)


def test_a_model_with_a_frozen_part_is_measured_and_applied_after_its_run(tmp_path: Path) -> None:
    hospitals = make_hospitals(tmp_path / "data")
    study, sites = write_study(tmp_path / "study", hospitals)
    network = Machine(
        load_study(study), toy_sites(tmp_path / "t", ()), tmp_path / "o", ()
    ).model_context.initial_values()
    first = "denoiser.stack.0.weight"
    start = {**weights(tmp_path / "study" / "w.safetensors", network), "file": "w.safetensors"}
    study, sites = write_study(
        tmp_path / "study",
        hospitals,
        start=start,
        parts={"frozen": [first]},
        schedule={"rounds": 1},
        local={"steps": 1},
    )
    said = explain(study, sites, (), ())
    assert f"weights of sha256 {start['sha256']}" in " ".join(said.split())
    assert f"{network[first].size:,} never change" in said
    base = tmp_path / "study" / "w.safetensors"
    command = ["run", study, "--sites", sites, "--out", tmp_path / "out", "--engine", "local", "--quiet"]
    said_by = CliRunner().invoke(app, [str(part) for part in command])
    assert said_by.exit_code == 0, said_by.output
    result = read_result(tmp_path / "out")
    assert evaluate(result.out, sites, engine="local", quiet=True).metrics == result.metrics
    worker = Machine.from_spec(open_host(study, sites, tmp_path / "out", (), (), None).spec())
    assert np.array_equal(worker.model_context.initial_values()[first], network[first])
    auditor = Auditor(
        load_study(study), load_sites(sites), "Alpha", Effort.of(quick=True), model=result.out, places=Places((base,))
    )
    assert auditor.lint == ()
    assert np.array_equal(auditor.tensors[first], network[first])

    # Applied from the run's folder, and elsewhere with the frozen part or not at all.
    image = tmp_path / "image.nii.gz"
    save(head(1, slices=1), image)
    model = model_path(result.out, "federated")
    reconstruct(model, image, tmp_path / "a.nii.gz")
    assert first not in load_file(model)
    away = tmp_path / "clinic" / "model.safetensors"
    away.parent.mkdir()
    away.write_bytes(model.read_bytes())
    with pytest.raises(DataError, match=f"put {result.frozen_sha256}.safetensors .* or name it with --weights"):
        reconstruct(away, image, tmp_path / "b.nii.gz")
    with pytest.raises(DataError, match="some are not in it"):
        reconstruct(away, image, tmp_path / "b.nii.gz", weights=away)
    # The file that the study started from holds the same values.
    reconstruct(away, image, tmp_path / "b.nii.gz", weights=tmp_path / "study" / "w.safetensors")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    save_file({first: network[first] + np.ones(1, np.float32)}, tmp_path / "study" / "w.safetensors")
    with pytest.raises(DataError, match="they have sha256"):
        reconstruct(away, image, tmp_path / "b.nii.gz", weights=tmp_path / "study" / "w.safetensors")
