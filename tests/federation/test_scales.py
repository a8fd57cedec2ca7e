"""Scales and rounding between parties: what a site refuses and keeps to itself, and that neither costs learning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.federation.exact import exact_exchange
from tests.federation.rig import Rig
from tests.mri_hospitals import make_hospitals, write_study
from tests.toys import Regression, toy_study
from wardround.federation.exchange import ERROR, TRAIN, UPDATE
from wardround.protection.rounding import Draws, rounding, study_root
from wardround.runs import context, machine, session
from wardround.storage.database import Database
from wardround.storage.journal import State
from wardround.storage.store import SiteStore
from wardround.wire.message import Message
from wardround.wire.ring import levels
from wardround.wire.update import scale_key

NORM = {"kind": "custom", "factory": "tests.federation.test_scales:bright", "options": {"norm": True}}


class Bright(Regression):
    """Its inputs are large, so that what a batch norm keeps of them is far from where it starts."""

    def dataset(self, site: str, source: Any) -> Any:
        points = super().dataset(site, source)
        return replace(points, x=40.0 * points.x)


def bright(**options: Any) -> Bright:
    """The factory of the studies below."""
    return Bright(**options)


def asked(rig: Rig, state: State, number: int, site: str = "A") -> Message:
    """One site's answer to a request to train on a state."""
    call = rig.coordinator._call(TRAIN, state, number, {"keep": [], "validate": False}, rig.arm_spec.layout)
    return rig.sites[site].handle(call.message(site))


def body(reply: Message) -> bytes:
    return b"".join(bytes(chunk) for chunk in reply.body.chunks())


def scaled(state: State, factor: float) -> State:
    return replace(state, scales={name: factor * scale for name, scale in state.scales.items()})


def secretly(rig: Rig) -> Rig:
    """The rig with sites that were given no root, as an agent is."""
    for site in rig.sites.values():
        site.rules = replace(site.rules, rounding_root=None)
    return rig


# What a site refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lint", [True, False])
def test_a_site_refuses_scales_that_no_honest_rounds_come_to(tmp_path: Path, lint: bool) -> None:
    rig = Rig(toy_study(), tmp_path)
    site = rig.sites["A"]
    site._inspector = site._inspector if lint else None
    state = rig.start()
    for factor in (1.01, 3e8):
        reply = asked(rig, scaled(state, factor), 1)
        assert reply.header.kind == ERROR
        assert "the study's rounds come to 0.2 at most" in reply.header.meta["reason"]
    assert asked(rig, state, 1).header.kind == UPDATE
    assert "3.2 at most" in asked(rig, scaled(state, 16.1), 2).header.meta["reason"]
    # What it saw is in its store, and other rounds than those that were do not excuse a scale.
    again = Rig(toy_study(), tmp_path)
    assert "3.2 at most" in asked(again, scaled(state, 16.1), 2).header.meta["reason"]
    assert asked(again, scaled(state, 15.9), 2).header.kind == UPDATE
    # However many rounds lie in between: no change of such a model needs more.
    reason = asked(again, scaled(state, 3e8), 4).header.meta["reason"]
    assert "the study's rounds come to" in reason


def test_scales_of_a_request_that_was_never_answered_excuse_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The crash is between training and the transaction that holds the reply; a restarted site knows only that."""
    rig = Rig(toy_study(), tmp_path)
    state = rig.start()
    assert asked(rig, state, 1).header.kind == UPDATE
    with monkeypatch.context() as patched:
        patched.setattr(SiteStore, "finish", lambda *_, **__: (_ for _ in ()).throw(OSError("power cut")))
        assert asked(rig, scaled(state, 15.9), 2).header.kind == ERROR
    again = Rig(toy_study(), tmp_path)
    assert "come to 0.2 at most" in asked(again, scaled(state, 15.9), 1).header.meta["reason"]
    assert asked(again, scaled(state, 15.9), 2).header.kind == UPDATE


def test_a_round_is_one_transaction_of_a_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reply, the memory and the scales; what the lint saw is not in it, so it is off here."""
    rig, seen = Rig(toy_study(), tmp_path, lint=False), []
    state, transaction = rig.start(), Database.transaction

    def counted(self: Database, *, durable: bool = False) -> Any:
        seen.append(durable)
        return transaction(self, durable=durable)

    assert asked(rig, state, 1).header.kind == UPDATE
    monkeypatch.setattr(Database, "transaction", counted)
    assert asked(rig, state, 2).header.kind == UPDATE
    assert seen == [True]


def test_the_worst_tensor_of_a_round_is_reported(tmp_path: Path) -> None:
    """Averaged over the model, one saturated scalar would not be seen."""
    study = toy_study(task=NORM, protection={"initial_scale": 1e-3}, method={"kind": "fedavg", "weights": "equal"})
    rig = Rig(study, tmp_path)
    rig.train()
    first = rig.journal.reports()[0]
    assert first.saturated > 1e-4
    assert first.saturated > first.saturated_share
    assert any("its scale grows" in note for note in first.notes)
    assert first.to_json()["saturated"] == first.saturated


# Rounding ------------------------------------------------------------------------------------------------------------


def test_a_root_of_the_sites_own_is_in_no_message_and_survives_a_restart(tmp_path: Path) -> None:
    rig = secretly(Rig(toy_study(), tmp_path))
    rig.train()
    roots = [site._rounding_root for site in rig.sites.values()]
    assert len(set(roots)) == 3
    assert study_root(rig.study.seed) not in roots
    sent = b"".join(message.data for message in rig.engine.sent)
    assert all(root not in sent and root.hex().encode() not in sent for root in roots)
    again = secretly(Rig(toy_study(), tmp_path))
    assert [site._rounding_root for site in again.sites.values()] == roots


def test_equal_roots_give_equal_bits_and_no_public_number_does(tmp_path: Path) -> None:
    replies = {}
    for name in ("one", "two", "secret"):
        rig = Rig(toy_study(), tmp_path / name)
        # The model; how long training took stands behind it.
        replies[name] = body(asked(secretly(rig) if name == "secret" else rig, rig.start(), 1))[:260]
    assert replies["one"] == replies["two"]
    assert replies["secret"] != replies["one"]
    # The same values all the same: each is off by less than a step.
    one, secret = (np.frombuffer(replies[name], "<i4").astype(np.int64) for name in ("one", "secret"))
    assert np.abs(one - secret).max() == 1


def test_other_scales_or_models_have_other_draws() -> None:
    def drawn(*about: Any) -> list[float]:
        return list(rounding(*about).random(7))

    about: tuple[Any, ...] = (bytes(32), "A", 3, {"w": 0.2}, "0" * 64)
    assert drawn(*about) == drawn(*about)
    for index, other in enumerate((bytes(31) + b"\1", "B", 4, {"w": 0.20001}, "1" * 64)):
        assert drawn(*about) != drawn(*about[:index], other, *about[index + 1 :])


def test_draws_are_uniform_below_one() -> None:
    draws = Draws(bytes(32)).random(100_001)
    assert draws.dtype == np.float32
    assert draws.shape == (100_001,)
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    # Five standard deviations of mean and variance.
    assert abs(draws.mean() - 0.5) < 5 * np.sqrt(1 / 12 / draws.size)
    assert abs(draws.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / draws.size)


# What the codec may not cost -----------------------------------------------------------------------------------------


def test_running_statistics_are_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch norm whose variance stays where it started makes nothing of what it normalises."""
    equal, slow = {"kind": "fedavg", "weights": "equal"}, {"steps": 3, "batch": 2, "optimizer": "sgd", "lr": 1e-4}
    study = toy_study(task=NORM, method=equal, local=slow, schedule={"rounds": 10, "validate_every": 0})
    with_codec = Rig(study, tmp_path / "codec").train()
    with monkeypatch.context() as patched:
        exact = Rig(study, tmp_path / "exact", protocol=exact_exchange(patched)).train()
    found, expected = (state.public["buffers/1.running_var"] for state in (with_codec, exact))
    assert expected.min() > 30.0
    assert found == pytest.approx(expected, rel=0.05)


def test_a_study_learns_the_same_with_the_codec_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values differ by no more than the steps of the codec in all rounds, and what training makes of them."""
    study = toy_study(task={**NORM, "options": {}}, local={"steps": 1, "batch": 4, "optimizer": "sgd", "lr": 0.001})
    rig = Rig(study, tmp_path / "codec")
    coded = list(rig.states())
    with monkeypatch.context() as patched:
        exact = Rig(study, tmp_path / "exact", protocol=exact_exchange(patched)).train()
    layout = rig.arm_spec.layout
    for info in layout.groups[0].tensors:
        key = scale_key("model", info.name)
        # The weighted mean of roundings, each below one step of max_weight over the sites' smallest weight.
        steps = sum(state.scales[key] for state in coded[:-1]) / levels(layout.bits_of(layout.groups[0]))
        bound = steps * layout.max_weight / len(rig.learner("A").dataset)
        off = np.abs(coded[-1].public[key] - exact.public[key]).max()
        assert off <= 2.0 * bound + 1e-5, (key, off, bound)


@pytest.mark.slow
def test_images_are_as_good_with_the_codec_as_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 0.05 dB, or what three roots of rounding differ by, for MoDL with its one learned weight."""
    data = make_hospitals(tmp_path / "data")
    study, sites = write_study(
        tmp_path, data, local={"steps": 5, "lr": 0.005}, schedule={"rounds": 5, "validate_every": 0, "release": "last"}
    )

    def psnr(name: str) -> float:
        return session.run(study, sites, tmp_path / name, engine="local").metric("federated")

    def rooted(number: int) -> float:
        with monkeypatch.context() as patched:
            patched.setattr(machine, "study_root", lambda _: bytes([number]) * 32)
            return psnr(f"root-{number}")

    coded = [rooted(number) for number in range(3)]
    with monkeypatch.context() as patched:
        patched.setattr(context, "PlainSum", exact_exchange(patched))
        exact = psnr("exact")
    assert abs(np.mean(coded) - exact) <= max(0.05, max(coded) - min(coded)), (coded, exact)
