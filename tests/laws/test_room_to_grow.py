"""The law of room to grow: toys of what is still to come run through the real coordinator, sites and journal."""

from __future__ import annotations

import os
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from tests.chain import chain_study
from tests.federation.rig import Rig
from tests.toys import Regression, toy_study
from wardround.errors import NotEnoughSites
from wardround.federation.exchange import TRAIN, UPDATE, Call, Exchange, PlainSum
from wardround.learning.methods.method import Changes, LocalRound, Method, Writers, state_name
from wardround.learning.policy import Parameter, Role
from wardround.site.protocol import SiteReply
from wardround.site.site import Site
from wardround.wire.message import EmptyBody, Message
from wardround.wire.tensors import TensorInfo
from wardround.wire.update import Aggregate, Group

Array = npt.NDArray[Any]
HERE = "tests.laws.test_room_to_grow"
EQUAL = {"kind": "fedavg", "weights": "equal"}


def study_of(factory: str, rounds: int = 4, sites: int = 3, **changes: Any) -> Any:
    names = "ABCDE"[:sites]
    options = changes.pop("options", {})
    return toy_study(
        names,
        method={"kind": "custom", "factory": f"{HERE}:{factory}", "options": options},
        schedule={"rounds": rounds, "validate_every": 0, "keep": rounds + 1, "release": "last"},
        **changes,
    )


# (a) Control variates: a second group, a broadcast that is not the model, private state at the site ------------------


@dataclass(frozen=True)
class Scaffold(Method):
    """Two groups, model and control (Karimireddy et al., ICML 2020, algorithm 1, option II), full participation."""

    CONTROL = "control"

    def groups(self, shared: tuple[Parameter, ...], ring_bits: int) -> tuple[Group, ...]:
        groups = super().groups(shared, ring_bits)
        trainable = next(g for g in groups if g.name == "model")
        return (*groups, Group(self.CONTROL, trainable.tensors, ring_bits))

    def initial(
        self, groups: tuple[Group, ...], shared: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        public, private = super().initial(groups, shared)
        for name in public:
            if name.startswith(self.CONTROL):
                public[name] = np.zeros_like(public[name])
        return public, private

    def _controls(self, local: LocalRound, name: str) -> tuple[Tensor, Tensor]:
        ours = local.memory.get(name)
        c = local.received(state_name(self.CONTROL, name))
        return c, torch.zeros_like(c) if ours is None else ours

    def gradients(self, local: LocalRound) -> None:
        for name, tensor in local.trainable().items():
            c, ours = self._controls(local, name)
            assert tensor.grad is not None
            tensor.grad += c - ours

    def changes(self, local: LocalRound) -> Changes:
        changes = super().changes(local)
        changes[self.CONTROL] = {}
        for name, tensor in local.trainable().items():
            c, ours = self._controls(local, name)
            new = ours - c + (local.anchor[name] - tensor.detach()) / (local.steps * local.learning_rate)
            changes[self.CONTROL][name] = new - ours
            local.memory[name] = new
        return changes


def make_scaffold() -> Method:
    return Scaffold("equal")


def _plain_gradients(model: dict[str, Array], x: Array, y: Array) -> dict[str, Array]:
    """Gradients of mean((W2 tanh(W1 x + b1) + b2 - y)^2), by hand."""
    hidden = np.tanh(x @ model["0.weight"].T + model["0.bias"])
    error = 2.0 * (hidden @ model["2.weight"].T + model["2.bias"] - y) / y.size
    inner = (error @ model["2.weight"]) * (1.0 - hidden**2)
    return {
        "0.weight": inner.T @ x,
        "0.bias": inner.sum(0),
        "2.weight": error.T @ hidden,
        "2.bias": error.sum(0),
    }


def test_scaffold_is_a_method(tmp_path: Path) -> None:
    study = study_of("make_scaffold", rounds=5, protection={"initial_scale": 64.0, "max_sites": 4})
    rig = Rig(study, tmp_path)
    steps, batch, rate = study.local.steps, study.local.batch, study.local.lr
    states = rig.states()
    first = next(states)
    names = [t.name for t in rig.arm_spec.layout.groups[0].tensors]
    x = {n: first.public[f"model/{n}"].astype(np.float64) for n in names}
    c = {n: np.zeros_like(x[n]) for n in names}
    ours = {site: {n: np.zeros_like(x[n]) for n in names} for site in study.sites}
    for number, state in enumerate(states, start=1):
        deltas, controls = [], []
        for site in study.sites:
            learner, local = rig.learner(site), {n: v.copy() for n, v in x.items()}
            indices = learner._examples.of_round(number, steps * batch)
            for step in range(steps):
                bx, by = learner.dataset.batch(indices[step * batch : (step + 1) * batch], np.random.default_rng())
                gradients = _plain_gradients(local, bx.double().numpy(), by.double().numpy())
                for n in names:
                    local[n] -= rate * (gradients[n] + c[n] - ours[site][n])
            new = {n: ours[site][n] - c[n] + (x[n] - local[n]) / (steps * rate) for n in names}
            deltas.append({n: local[n] - x[n] for n in names})
            controls.append({n: new[n] - ours[site][n] for n in names})
            ours[site] = new
        x = {n: x[n] + np.mean([d[n] for d in deltas], axis=0) for n in names}
        c = {n: c[n] + np.mean([d[n] for d in controls], axis=0) for n in names}
        for n in names:
            assert np.allclose(state.public[f"model/{n}"], x[n], atol=5e-5)
            assert np.allclose(state.public[f"control/{n}"], c[n], atol=5e-4)
            kept = [rig.sites[s].store.memory(number).tensors[f"method/{n}"].astype(np.float64) for s in study.sites]
            # c is the mean of the c_i, but for the fixed point of every round that made it.
            assert np.abs(sum(kept) - len(kept) * state.public[f"control/{n}"]).max() < 1e-4
    assert number == 5
    assert max(np.abs(v).max() for v in c.values()) > 1e-2
    released = rig.method.release_for(None, state.public, state.private)
    assert set(released) == set(names)


# (b) A masked sum: two phases, secrets that live for one attempt -----------------------------------------------------

SEEDS = "seeds"


class MaskedSum(Exchange):
    """Phase 1 gathers a seed for every pair, phase 2 the masked updates. A toy: the coordinator sees the seeds."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._seeds: dict[str, dict[str, int]] = {}
        self._uploads: PlainSum | None = None
        self._requests: dict[str, str] = {}

    def open(self) -> list[Message]:
        messages = []
        for site in self._call.sites:
            header = replace(self._call.message(site).header, kind=SEEDS, tensors=(), body_nbytes=0)
            header = replace(header, body_sha256=Message(header).header.body_sha256, meta={})
            messages.append(Message(header, EmptyBody()))
        self._requests = {m.header.site: m.id for m in messages}
        return messages

    def accept(self, reply: Message) -> None:
        if self._uploads is None:
            assert reply.header.reply_to == self._requests[reply.header.site]
            self._seeds[reply.header.site] = {str(k): int(v) for k, v in reply.header.meta["seeds"].items()}
        else:
            self._uploads.accept_unchecked(reply)

    def close(self) -> list[Message]:
        if self._uploads is not None:
            # Masks of a site that is gone do not cancel: the toy cannot go on without it.
            if self._uploads.receipts.keys() != self._seeds.keys():
                raise NotEnoughSites("a site left between the phases")
            return []
        sites = tuple(self._seeds)
        self._uploads = _Uploads(replace(self._call, sites=sites))
        return self._uploads.open_with(
            {site: {o: s[site] for o, s in self._seeds.items() if site in s} for site in sites}
        )

    @property
    def present(self) -> Set[str]:
        return self._seeds.keys() if self._uploads is None else self._uploads.receipts.keys()

    @property
    def receipts(self) -> Mapping[str, str]:
        return {} if self._uploads is None else self._uploads.receipts

    def aggregate(self) -> Aggregate:
        assert self._uploads is not None
        return self._uploads.aggregate()


class _Uploads(PlainSum):
    def open_with(self, seeds: Mapping[str, Mapping[str, int]]) -> list[Message]:
        messages = []
        for site in self._call.sites:
            plain = self._call.message(site)
            meta = {**plain.header.meta, "seeds": dict(seeds[site]), "sites": list(self._call.sites)}
            messages.append(Message(replace(plain.header, phase=1, meta=meta), plain.body))
        self._requests = {m.header.site: m.id for m in messages}
        return messages

    def accept_unchecked(self, reply: Message) -> None:
        # A masked update is uniform: only a clear one has a range to check.
        assert reply.header.kind == UPDATE
        assert reply.header.reply_to == self._requests[reply.header.site]
        data = b"".join(bytes(c) for c in reply.body.chunks())
        self._total.add(data, 0)
        self._receipts[reply.header.site] = reply.header.body_sha256


class MaskedUpload:
    """The site's side: hands a fresh seed to every later site, then masks its update with all its pairs' streams."""

    kinds = frozenset({SEEDS, TRAIN})
    replies = frozenset({SEEDS})

    def __init__(self, name: str, names: tuple[str, ...]) -> None:
        self._name, self._later = name, names[names.index(name) + 1 :]
        self._given: dict[str, int] = {}

    def admit(self, request: Message, site: Site) -> None:
        """Nothing is refused."""

    def answer(self, request: Message, site: Site) -> SiteReply:
        if request.header.kind == SEEDS:
            self._given = {other: int.from_bytes(os.urandom(8), "big") for other in self._later}
            return SiteReply(request.reply(SEEDS, meta={"seeds": self._given}))
        chunks, memory, keep = site.work(request)
        layout = site.rules.layout
        data, at, masked = b"".join(bytes(c) for c in chunks), 0, []
        streams = [(1, self._given[o]) for o in self._later if o in request.header.meta["sites"]]
        streams += [(-1, int(seed)) for seed in request.header.meta["seeds"].values()]
        generators = [(sign, np.random.default_rng(seed)) for sign, seed in streams]
        for size, ring in layout.segments:
            elements = ring.unpack(data[at : at + size]).astype(np.int64)
            for sign, random in generators:
                elements = elements + sign * random.integers(0, 1 << ring.bits, elements.size)
            masked.append(bytes(ring.pack((elements % (1 << ring.bits)).astype(ring.dtype))))
            at += size
        return SiteReply(site.reply_with(request, UPDATE, iter(masked), layout), memory, keep)


@pytest.mark.parametrize("ring_bits", [16, 24, 32])
def test_a_masked_sum_is_the_plain_sum_bit_for_bit(tmp_path: Path, ring_bits: int) -> None:
    study = toy_study(
        method=EQUAL,
        schedule={"rounds": 3, "validate_every": 0, "min_sites": 3},
        protection={"ring_bits": ring_bits, "max_sites": 4},
    )
    names = tuple(study.sites)
    plain = Rig(study, tmp_path / "plain")
    masked = Rig(study, tmp_path / "masked", protocol=MaskedSum, site_protocol=lambda name: MaskedUpload(name, names))
    expected, found = plain.train(), masked.train()
    assert found.public_sha256 == expected.public_sha256
    assert found.scales == expected.scales
    told = [r.loss for r in masked.journal.reports()]
    assert told == [r.loss for r in plain.journal.reports()]
    clear = {s.body for s in plain.engine.sent if s.message.header.kind == UPDATE}
    assert not clear & {s.body for s in masked.engine.sent}
    assert [s.message.header.phase for s in masked.engine.sent[:12]] == [0] * 6 + [1] * 6


def test_a_masked_sum_without_one_of_its_sites_stops(tmp_path: Path) -> None:
    study = toy_study(method=EQUAL, schedule={"rounds": 2, "validate_every": 0})
    names = tuple(study.sites)

    class Leaves(MaskedUpload):
        def answer(self, request: Message, site: Site) -> SiteReply:
            if site.name == "B" and request.header.kind == TRAIN:
                raise RuntimeError("gone")
            return super().answer(request, site)

    rig = Rig(study, tmp_path, protocol=MaskedSum, site_protocol=lambda name: Leaves(name, names))
    with pytest.raises(NotEnoughSites):
        rig.train()
    assert rig.journal.reports() == []


# (c) Adapters of different rank: slots of one tensor, products that average exactly ----------------------------------


class Adapted(nn.Module):
    """y = (W + B A) x with W frozen at home and adapters of the largest rank."""

    def __init__(self, features: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, features) * 0.1, requires_grad=False)
        self.left = nn.Parameter(torch.randn(4, rank) * 0.3)
        self.right = nn.Parameter(torch.randn(rank, features) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ (self.weight + self.left @ self.right).T).sum(1, keepdim=True)


@dataclass(frozen=True)
class AdapterTask(Regression):
    rank: int = 3

    def build_model(self) -> nn.Module:
        return Adapted(self.features, self.rank)


def make_adapter_task(**options: Any) -> AdapterTask:
    return AdapterTask(**options)


@dataclass(frozen=True)
class StackedAdapters(Method):
    """Sites of different rank write their factors into slots of their own; the server adds the product to the base.

    (After FLoRA, Wang et al., NeurIPS 2024: stacking makes sum_i p_i B_i A_i exact, averaging factors does not.) The
    weight goes into one factor only. `average_factors` is the wrong way, for the test.
    """

    ranks: tuple[tuple[str, int], ...] = ()
    average_factors: bool = False

    def _slot(self, site: str) -> slice:
        start = 0
        for name, rank in self.ranks:
            if name == site:
                return slice(start, start + rank)
            start += rank
        raise KeyError(site)

    def role(self, parameter: Parameter) -> Role:
        return "shared"

    def groups(self, shared: tuple[Parameter, ...], ring_bits: int) -> tuple[Group, ...]:
        out, features = next(p.info.shape for p in shared if p.name == "weight")
        total = sum(rank for _, rank in self.ranks)
        if self.average_factors:
            total = max(rank for _, rank in self.ranks)
        left, right = TensorInfo("left", "float32", (out, total)), TensorInfo("right", "float32", (total, features))
        return Group("left", (left,), ring_bits), Group("right", (right,), ring_bits)

    def initial(
        self, groups: tuple[Group, ...], shared: Mapping[str, Array]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        return {name: shared[name] for name in ("weight", "left", "right")}, {}

    def gradients(self, local: LocalRound) -> None:
        rank = dict(self.ranks)[local.site]
        for name, part in (("left", np.s_[:, rank:]), ("right", np.s_[rank:, :])):
            gradient = local.shared[name].grad
            assert gradient is not None
            gradient[part] = 0.0

    def begin(self, local: LocalRound) -> None:
        rank = dict(self.ranks)[local.site]
        with torch.no_grad():
            local.shared["left"][:, rank:] = 0.0
            local.shared["right"][rank:] = 0.0

    def changes(self, local: LocalRound) -> Changes:
        rank, slot = dict(self.ranks)[local.site], self._slot(local.site)
        if self.average_factors:
            slot = slice(0, rank)
        total = slot.stop if self.average_factors else sum(r for _, r in self.ranks)
        total = max(r for _, r in self.ranks) if self.average_factors else total
        left = local.shared["left"].new_zeros(local.shared["left"].shape[0], total)
        right = local.shared["right"].new_zeros(total, local.shared["right"].shape[1])
        left[:, slot] = local.shared["left"].detach()[:, :rank]
        right[slot] = local.shared["right"].detach()[:rank]
        return {"left": {"left": left}, "right": {"right": right}}

    def apply(
        self, public: Mapping[str, Array], private: Mapping[str, Array], aggregate: Aggregate, write: Writers
    ) -> None:
        left, right = aggregate.mean("left", "left"), aggregate.mean("right", "right")
        if not self.average_factors:
            # Slots do not overlap: the mean over sites times their number is each site's own factor.
            right = right * aggregate.contributors
        change = left @ right
        write.public("weight", (public["weight"] + change).astype(np.float32))
        write.public("left", public["left"])
        write.public("right", public["right"])
        write.private("change", change)

    def release_for(
        self, site: str | None, public: Mapping[str, Array], private: Mapping[str, Array]
    ) -> dict[str, Array]:
        return {name: public[name] for name in ("weight", "left", "right")}


def make_adapters(ranks: dict[str, int], average_factors: bool = False) -> Method:
    return StackedAdapters("equal", tuple(ranks.items()), average_factors)


@pytest.mark.parametrize("average_factors", [False, True])
def test_the_mean_of_products_of_mixed_ranks_is_exact(tmp_path: Path, average_factors: bool) -> None:
    ranks = {"A": 1, "B": 3, "C": 2}
    study = study_of(
        "make_adapters",
        rounds=1,
        options={"ranks": ranks, "average_factors": average_factors},
        task={"kind": "custom", "factory": f"{HERE}:make_adapter_task", "options": {}},
        protection={"initial_scale": 4.0, "max_sites": 4},
    )
    rig = Rig(study, tmp_path)
    before, after = list(rig.states())
    products = []
    for site, rank in ranks.items():
        learner = rig.learner(site)
        learner.load(before.public, rig.sites[site].store.memory(0))
        learner.train(1, before.public, rig.sites[site].store.memory(0))
        state = learner.model.state_dict()
        products.append((state["left"][:, :rank].double() @ state["right"][:rank].double()).numpy())
    error = np.abs(after.private["change"] - np.mean(products, axis=0)).max()
    if average_factors:
        assert error > 1e-2
    else:
        assert error < 1e-6
        assert np.allclose(after.public["weight"], before.public["weight"] + after.private["change"], atol=1e-6)


# (d) A chain of two stages -------------------------------------------------------------------------------------------


def test_a_chain_of_two_stages_is_a_task(tmp_path: Path) -> None:
    """Two networks with a loss each, the first trained before both are (see `test_stages`)."""
    phases = [{"rounds": 2, "train": ["reconstruct"]}, {"train": ["reconstruct", "segment"]}]
    local = {"steps": 16, "batch": 4, "optimizer": "adam", "lr": 0.02}
    rig = Rig(chain_study(local=local, schedule={"rounds": 4, "phases": phases}), tmp_path)
    rig.train()
    first, *_, last = (report.validation for report in rig.journal.reports())
    assert first is not None
    assert last is not None
    assert last["mse"] < 0.5 * first["mse"]
    assert last["dice"] > first["dice"]
