"""Compressed updates through the real coordinator, sites and stores: clear, masked, and asked twice."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.examples import quickly
from tests.federation.rig import Rig
from tests.protection.test_secure_rounds import SecureRig, losing
from tests.toys import toy_sites, toy_study
from wardround.errors import StudyError
from wardround.federation.exchange import UPDATE
from wardround.protection.compression import Codec, TopKCodec
from wardround.runs.machine import Machine
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.wire.message import Message

WIDE = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"features": 40}}


def study_of(kind: str, sites: str = "ABC", **protection: Any) -> Study:
    ratio = {"subspace": {"ratio": 0.25}, "top_k": {"ratio": 0.1}}.get(kind, {})
    compression = {"kind": kind, **ratio}
    return toy_study(sites, task=WIDE, protection={"compression": compression, "initial_scale": 8.0, **protection})


@pytest.mark.parametrize("kind", ["rotation", "subspace", "top_k"])
@pytest.mark.parametrize("ring_bits", [16, 24])
def test_rounds_are_trained_and_the_bytes_are_those_of_the_study(kind: str, ring_bits: int, tmp_path: Path) -> None:
    rig = Rig(study_of(kind, ring_bits=ring_bits, max_sites=4), tmp_path)
    state = rig.train()
    codec, layout = rig.arm_spec.codec, rig.arm_spec.layout
    updates = [s for s in rig.engine.sent if s.message.header.kind == UPDATE and s.message.header.round == state.round]
    sizes = {len(s.body) for s in updates if s.message.header.meta["layout"] == codec.sent(layout).sha256}
    assert sizes == {codec.form.nbytes(codec.sent(layout))}
    assert all(np.isfinite(tensor).all() for tensor in state.public.values())
    reports = rig.journal.reports()
    assert reports[-1].loss < reports[0].loss
    if kind != "rotation":
        assert codec.form.nbytes(codec.sent(layout)) < layout.nbytes
        residual = rig.sites["A"].store.memory(state.round).tensors["residual/model/0.weight"]
        assert np.abs(residual).max() > 0.0
        assert all(residual.tobytes() not in s.data for s in rig.engine.sent)


def test_rotation_at_full_width_trains_the_same_model_up_to_rounding(tmp_path: Path) -> None:
    plain, turned = (Rig(study_of(kind), tmp_path / kind).train() for kind in ("none", "rotation"))
    for name, tensor in plain.public.items():
        assert np.allclose(tensor, turned.public[name], atol=1e-3), name


@pytest.mark.parametrize("kind", ["subspace", "top_k"])
def test_a_site_that_dies_after_training_says_the_same_again(kind: str, tmp_path: Path) -> None:
    """What is sent and what waits are one transaction: asked again, it neither adds its residual twice nor drops it."""
    straight = Rig(study_of(kind), tmp_path / "straight").train()
    rig = Rig(study_of(kind), tmp_path / "bumpy")
    finish = rig.sites["A"].store.finish
    died = []

    def dying(reply: Message, *state: Any, **named: Any) -> None:
        if reply.header.round == 2 and not died:
            died.append("before the transaction")
            raise OSError("the site is gone")
        finish(reply, *state, **named)

    rig.sites["A"].store.finish = dying  # type: ignore[method-assign]
    handle = rig.sites["A"].handle

    def twice(request: Message) -> Message:
        answer = handle(request)
        return handle(request) if answer.header.kind in ("error", "update") else answer

    rig.sites["A"].handle = twice  # type: ignore[method-assign]
    bumpy = rig.train()
    assert died
    assert bumpy.public_sha256 == straight.public_sha256


def test_comparisons_of_one_site_are_not_compressed(tmp_path: Path) -> None:
    host = Machine(study_of("top_k"), toy_sites(tmp_path), tmp_path / "out", ("local", "pooled"))
    assert isinstance(host.arm_spec("federated").codec, TopKCodec)
    assert type(host.arm_spec("local/A").codec) is type(host.arm_spec("pooled").codec) is Codec


def test_places_cannot_be_summed_under_masks() -> None:
    study = toy_study().model_dump()
    study["protection"] = {"secure": True, "compression": {"kind": "top_k"}}
    with pytest.raises(StudyError, match="top_k` cannot be summed under masks"):
        load_study(study)


@pytest.mark.parametrize(("kind", "ring_bits"), quickly(product(("rotation", "subspace"), (16, 32)), 0, 3))
def test_masks_change_no_bit_of_a_compressed_sum(kind: str, ring_bits: int, tmp_path: Path) -> None:
    study = study_of(kind, "ABCD", ring_bits=ring_bits, max_sites=4)
    plain = Rig(study, tmp_path / "plain").train()
    masked = SecureRig(study, tmp_path / "masked").train()
    assert masked.public_sha256 == plain.public_sha256


def test_what_waits_survives_a_site_that_misses_a_masked_round(tmp_path: Path) -> None:
    rig = SecureRig(study_of("subspace", "ABCD"), tmp_path)
    rig.line.lose, rig.line.heard = losing("D", "train", 2), False
    state = rig.train()
    assert [len(r.participants) for r in rig.journal.reports() if r.participants] == [4, 3, 4, 4]
    assert all(np.isfinite(tensor).all() for tensor in state.public.values())


def test_averages_of_batch_norm_travel_whole(tmp_path: Path) -> None:
    task = {"kind": "custom", "factory": "tests.toys:make_task", "options": {"features": 40, "norm": True}}
    rig = Rig(study_of("subspace").model_copy(update={"task": toy_study(task=task).task}), tmp_path)
    groups = {g.name: g for g in rig.arm_spec.codec.sent(rig.arm_spec.layout).groups}
    assert groups["buffers"] == rig.arm_spec.layout.groups[1]
    assert groups["model"].size < rig.arm_spec.layout.groups[0].size
