"""A new hospital gets a model of its own from a release, at home: no other site trains, and nothing leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from wardround.errors import DataError, StudyError
from wardround.federation.coordinator import Release
from wardround.federation.release import (
    FORMAT,
    as_tensor_file,
    model_path,
    own_folder,
    save_frozen_part,
    save_release,
    scanners_of_arm,
    shared_sha256,
)
from wardround.imaging.datasets.split import SPLIT_NAMES
from wardround.learning.methods.build import build_method
from wardround.learning.methods.method import LocalRound, Method
from wardround.learning.methods.personal import Personal
from wardround.learning.model_context import parameters_of
from wardround.learning.policy import listed
from wardround.learning.training import Learner
from wardround.models.low_rank import LORA_LOCAL
from wardround.plan.arm_specs import ArmSpec, protocols_of
from wardround.plan.arms import FEDERATED
from wardround.plan.weights import frozen_part, model_sha256, save_frozen
from wardround.protection.rounding import study_root
from wardround.runs.machine import Machine
from wardround.runs.releases import ReleasedModel
from wardround.site.datasets import history_of
from wardround.site.evaluators import Released
from wardround.site.lineage import Lineage
from wardround.site.patients import results_of
from wardround.storage.journal import State
from wardround.storage.store import NOTHING, Memory
from wardround.study.hashes import written
from wardround.study.load import load_study
from wardround.study.methods import CustomMethod
from wardround.study.plugins import Plugins
from wardround.study.registry import default_kind
from wardround.study.schema import Study
from wardround.study.sites import SitesFile, load_sites
from wardround.tasks.build import build_task
from wardround.tasks.estimates import PatientEstimate, difference, estimate
from wardround.tasks.states import value_of
from wardround.tasks.task import Named
from wardround.wire.files import write_text
from wardround.wire.files import written as file_written

if TYPE_CHECKING:
    from torch import Tensor

    from wardround.plan.sums import PairedMean

Array = npt.NDArray[Any]
Rows = Mapping[str, Array]
What = Literal["auto", "all"]
Chosen = Literal["joined", "release"]
RESULT, START = "joining.json", "start.safetensors"
#: Rounds at home, after each of which validation patients are asked, and the steps of each.
ROUNDS, STEPS = 10, 10
# Of the study's rate, where a trained model goes on learning; a private part begins untrained and has all of it.
_GENTLY = 0.1


@dataclass(frozen=True)
class Compared:
    """A metric on the new hospital's test patients: the release, its joined model, and how much better that is."""

    release: PatientEstimate
    joined: PatientEstimate
    gain: PatientEstimate


@dataclass(frozen=True)
class Joined:
    """What became of a joining; `model` is what `predict` takes, with `--site SITE` where the hospital trained it.

    `validation` are the values of `metric`, by which its own validation patients chose; `pull` is Ditto's lambda.
    """

    site: str
    release: str
    trained: str
    chosen: Chosen
    round: int
    pull: float | None
    metric: str
    validation: dict[Chosen, float]
    validation_patients: int
    test: dict[str, Compared]
    model: Path

    def to_json(self) -> dict[str, Any]:
        """What `joining.json` holds: plain values, NaN as `null`."""
        values = asdict(self) | {"model": self.model.name}
        parsed: dict[str, Any] = json.loads(json.dumps(values), parse_constant=lambda _: None)
        return parsed


@dataclass(frozen=True)
class AtHome(Method):
    """One hospital goes on from a release by itself; with a `pull`, drawn to it as Ditto's own models are."""

    pull: float = 0.0

    def objective(self, local: LocalRound, loss: Tensor) -> Tensor:
        """The loss with pull/2 |v - release|^2, over all tensors that learn."""
        for name, tensor in local.trainable().items() if self.pull else ():
            loss = loss + 0.5 * self.pull * (tensor - local.initial[name]).square().sum()
        return loss


def join(
    release: str | Path,
    sites: SitesFile | str | Path,
    site: str,
    out: str | Path,
    *,
    train: What = "auto",
    rounds: int = ROUNDS,
    steps: int = STEPS,
    lr: float | None = None,
    overrides: Sequence[str] = (),
    plugins: Collection[str] = (),
    allow_code: bool = False,
    told: Callable[[str], None] = lambda _: None,
) -> Joined:
    """Fit a released model to a hospital that did not train it, with its own patients alone.

    `release` is a run's folder or a model's file. Of a personal method the private part alone learns, else what the
    release's study trains (adapters, where it has some); `train="all"` lets all of that learn in any case. After each
    of `rounds` of `steps` steps the hospital's validation patients are asked; the model is kept that they rank first by
    the task's first metric, and the release itself is the hospital's where none is better. `lr` is by default that of
    the release's study for a private part, a tenth of it otherwise. `overrides` are of the study at home
    (`sites.NEW.acquisition.kind=...`).

    Raises `StudyError` for a hospital that trained the release and for a release that does not go on, and `DataError`
    without validation patients.

    >>> found = join("out", "sites.yaml", "New", "new", rounds=2)  # doctest: +SKIP
    """
    out, place = Path(out), Path(release)
    path = model_path(place, FEDERATED) if place.is_dir() else place
    released = ReleasedModel.opened(path, plugins)
    if not isinstance(sites, SitesFile):
        sites = load_sites(sites)
    sites = sites.with_code() if allow_code else sites
    sites.of(site)
    _check(released.study, site)
    home = partial(_home, released, site, rounds, steps, lr, _begin(released, out), overrides, out)
    study = home(())
    own = _private(released, Plugins.of(study, sites)) if train == "auto" else ()
    study = home(own) if own else study
    host = Machine(study, sites, out, (), places=study.places(out, [sites.of(site)]))
    with closing(host):
        if not host.dataset(site).patients("validation"):
            raise DataError(
                f"site {site} has no validation patients, who choose between the release and its own model; give it "
                "more patients, or a larger share with --set task.split.validation=0.3"
            )
        host.datasets.settle(site)
        return _join(host, released, site, out, own, told)


def _check(study: Study, site: str) -> None:
    spectrum = study.method.spectrum
    if site in study.member_sites:
        raise StudyError(
            f"--site {site}: it trained the release, and has its part of it already; `wardround predict --site {site}` "
            "uses that"
        )
    if study.method.folds:
        raise StudyError(
            f"a release of method.kind={study.method.kind} has products folded into its weights, and no study of "
            "another method goes on from it; join a release of another method"
        )
    if spectrum is not None and spectrum.bank:
        raise StudyError(
            f"a release of method.kind={study.method.kind} holds amplitudes of each site that trained it, and has no "
            "place for those of another; join a release of another method"
        )


# What goes on at home -------------------------------------------------------------------------------------------------


def _served(released: ReleasedModel) -> Method:
    """The method of the release, or FedAvg for one of others' code: as `wardround predict` serves a stranger."""
    settings = released.study.method
    if isinstance(settings, CustomMethod) or settings.closed:
        return Method()
    return build_method(settings, protocols_of(released.study, released.study.member_sites))


def _private(released: ReleasedModel, plugins: Plugins) -> tuple[str, ...]:
    """The names of the part that each site has of its own; empty where the method shares all that learns."""
    study = plugins.opened(released.study)
    network = released.loaded(build_task(study, plugins=plugins).build_model, None, None)
    method = _served(released).within(study, len(study.training_sites), network)
    parameters = parameters_of(network, study.model.head_parts)
    found = tuple(
        p.name
        for p in parameters
        if (isinstance(method, Personal) and method.is_private(p))
        or any(fnmatchcase(p.name, pattern) for pattern in study.parts.local)
        or f"{LORA_LOCAL}." in p.name
    )
    learns = {p.name for p in parameters if p.trainable}
    return found if learns.intersection(found) else ()


def _begin(released: ReleasedModel, out: Path) -> str:
    """Write what a hospital gets that did not train, its frozen part too, as the file to start from; its hash."""
    tensors = {**released.tensors, **frozen_part(released.path, released.metadata)}
    metadata = {"format": FORMAT, "study": released.metadata["study"], "shared": " ".join(sorted(tensors))}
    with file_written(out / START) as file:
        file.write(save({name: np.array(tensors[name], order="C") for name in sorted(tensors)}, metadata=metadata))
    return model_sha256(tensors, metadata)


def _home(
    released: ReleasedModel,
    site: str,
    rounds: int,
    steps: int,
    lr: float | None,
    start: str,
    overrides: Sequence[str],
    out: Path,
    own: Collection[str],
) -> Study:
    """The study of one hospital that goes on from the release. Nothing leaves it, so that nothing protects it."""
    before = released.study
    rate = before.local.lr * (1.0 if own else _GENTLY) if lr is None else lr
    values = written(before)
    values.pop("update", None)
    known = values["sites"].get(site, {})
    learns = {p for p in released.tensors if p not in own} if own else set()
    if only := before.method.only:
        every = {*released.tensors, *frozen_part(released.path, released.metadata)}
        learns |= {name for name in every if not any(fnmatchcase(name, pattern) for pattern in only)}
    values |= {
        "description": f"{site} joins a release of {before.name}",
        "sites": {site: {key: known[key] for key in ("acquisition",) if key in known}},
        # An amplitude is a part of the network, which the release has.
        "method": values["method"] if before.method.spectrum else {"kind": default_kind("method"), "weights": "equal"},
        "start": {"kind": "release", "file": START, "sha256": start},
        "parts": {"frozen": [*before.parts.frozen, *sorted(learns)]},
        "schedule": {"rounds": rounds},
        "local": values.get("local", {})
        | {"steps": steps, "lr": rate, "schedule": "constant", "warmup": 0, "optimizer_state": "keep"},
        "protection": {},
    }
    alone = [f"{before.task.leave_one_out_key}=false"] if before.task.leaves_out else []
    return load_study(values, [*alone, *overrides], near=out)


@dataclass(frozen=True)
class _Candidate:
    rank: float
    value: float
    round: int
    pull: float | None
    public: Mapping[str, Array]


def _join(
    host: Machine, released: ReleasedModel, site: str, out: Path, own: Collection[str], told: Callable[[str], None]
) -> Joined:
    arm_spec, first = host.arm_spec(FEDERATED), host.task.metrics[0]
    path = model_path(out, FEDERATED)
    evaluator = Released(own_folder(path, site), out / "sites" / site / "pictures.npz", least=1)
    stranger, as_stranger = host.learner(replace(arm_spec, method=_served(released)), site), {"unseen_site": True}
    before = value_of(first, evaluator(stranger, {}, as_stranger, "validation")[first.name])
    told(f"the release: {first.name} {before:.4g} of validation patients")
    settings = released.study.method
    pulls = settings.pulls or (None,)
    best: _Candidate | None = None
    for pull in pulls:
        for found in _rounds(host, arm_spec, site, pull):
            told(f"round {found.round}{'' if pull is None else f', pull {pull:g}'}: {first.name} {found.value:.4g}")
            if best is None or found.rank > best.rank:
                best = found
    assert best is not None
    chosen: Chosen = "joined" if best.rank > first.rank(before) else "release"
    reference = evaluator(stranger, {}, as_stranger, "test")
    home = host.learner(replace(arm_spec, method=AtHome("equal")), site)
    joined = evaluator(home, arm_spec.method.release_for(None, best.public, {}), {}, "test")
    _write(host, arm_spec, released, path, best if chosen == "joined" else None)
    if chosen == "joined":
        _record(host, released, site, path)
    result = Joined(
        site=site,
        release=model_sha256(released.tensors, released.metadata),
        trained=listed(sorted(own)) if own else "adapters" if host.study.adapters.kind != "none" else "all",
        chosen=chosen,
        round=best.round if chosen == "joined" else 0,
        pull=best.pull,
        metric=first.name,
        validation={"joined": best.value, "release": before},
        validation_patients=host.dataset(site).patients("validation"),
        test=_rows(host, site, joined, reference),
        model=path,
    )
    write_text(out / RESULT, json.dumps(result.to_json(), indent=1) + "\n")
    return result


def _rounds(host: Machine, arm_spec: ArmSpec, site: str, pull: float | None) -> list[_Candidate]:
    """Train at home; the model after every round, with what validation patients say of it."""
    learner = host.learner(replace(arm_spec, method=AtHome("equal", pull=pull or 0.0)), site)
    public, _ = host.initial(arm_spec)
    memory, found = NOTHING, []
    for number in range(1, host.study.schedule.rounds + 1):
        learner.load(public, memory)
        trained = learner.train(number, public, memory)
        memory = Memory(trained.memory, {})
        moved = {f"{group}/{name}": c for group, part in trained.changes.items() for name, c in part.items()}
        public = {name: (tensor + moved[name]).astype(tensor.dtype) for name, tensor in public.items()}
        found.append(_candidate(host, learner, public, memory, number, pull))
    return found


def _candidate(
    host: Machine, learner: Learner, public: Mapping[str, Array], memory: Memory, number: int, pull: float | None
) -> _Candidate:
    first = host.task.metrics[0]
    learner.load(public, memory)
    value = value_of(first, learner.held_out.evaluate("validation")[first.name])
    return _Candidate(first.rank(value), value, number, pull, public)


def _rows(host: Machine, site: str, joined: Rows, reference: Rows) -> dict[str, Compared]:
    """Both on test patients, and the difference with its paired interval: for eyes at the hospital."""
    specs, root = host.task.metrics, study_root(host.study.seed)
    mine = results_of(site, specs, joined, reference, least=1, root=root)
    other: Mapping[str, PairedMean] = results_of(site, specs, reference, None, least=1, root=root)
    return {
        spec.name: Compared(
            release=estimate(other[spec.name].mean),
            joined=estimate(mine[spec.name].mean),
            gain=estimate(
                difference(
                    mine[spec.name].mean,
                    other[spec.name].mean,
                    mine[spec.name].paired,
                    larger_is_better=spec.larger_is_better,
                )
            ),
        )
        for spec in specs
    }


def _record(host: Machine, released: ReleasedModel, site: str, path: Path) -> None:
    """Put on the site's own record which of its patients the model was trained, chosen and tested with."""
    dataset, history = host.dataset(site), history_of(host.sites, host.out, site)
    if isinstance(dataset, Named) and history is not None:
        parts = {part: dataset.names(part) for part in SPLIT_NAMES}
        parent = model_sha256(released.tensors, released.metadata)
        Lineage(history).record(shared_sha256(path), parent, host.study_sha256, parts)


def _write(host: Machine, arm_spec: ArmSpec, released: ReleasedModel, path: Path, best: _Candidate | None) -> None:
    """The hospital's model: the joined one, or a copy of the release with its frozen part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if best is None:
        copyfile(released.path, path)
        frozen = frozen_part(released.path, released.metadata)
        if frozen:
            save_frozen(frozen, released.metadata["frozen_sha256"], host.out)
        return
    public, sha256 = as_tensor_file(best.public, host.out / "work" / "joined")
    nothing, _ = as_tensor_file({}, host.out / "work" / "nothing")
    state = State(best.round, public, sha256, nothing, "", {})
    save_frozen_part(host, host.out)
    save_release(host, arm_spec, Release(best.round, state), scanners_of_arm(host, arm_spec.arm, {}), path)
