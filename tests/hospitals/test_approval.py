"""A hospital's decision counts for what it was made on, and for nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.toys import toy_study
from wardround.errors import Rejected, StudyError, WardroundError, WireError
from wardround.hospitals.proposal import (
    LARGEST_STUDY,
    Decision,
    Proposal,
    proposal_in,
    proposal_message,
    proposal_of,
    proposed_study,
)
from wardround.hospitals.site.approval import Binding
from wardround.protection.identity import Identity
from wardround.study.hashes import plan_sha256, study_sha256
from wardround.study.load import load_study
from wardround.study.schema import Study
from wardround.wire.canonical import digest
from wardround.wire.message import EMPTY, Header, Message

IDENTITY = Identity(b"a" * 32)


@dataclass(frozen=True)
class Keys:
    keys: Mapping[str, bytes]

    def sha256_of(self, sites: Iterable[str]) -> str:
        return digest({site: self.keys[site].hex() for site in sites})


ROSTER = Keys({name: name.encode() * 32 for name in "ABCD"})


def proposed(study: Study, **changes: Any) -> Proposal:
    return proposal_of(study, (), plan_sha256(study), {}).model_copy(update=changes)


def binding(proposal: Proposal, roster: Keys = ROSTER) -> Binding:
    study = proposed_study(proposal)
    return Binding.of("A", study_sha256(study), study, proposal, roster)


def test_an_approval_counts_until_something_changes() -> None:
    proposal = proposed(toy_study())
    bound = binding(proposal)
    assert bound.standing(None, IDENTITY.public).state == "pending"
    decision = Decision.model_validate(bound.decide("approved", IDENTITY).model_dump(mode="json"))
    assert bound.standing(decision, IDENTITY.public).state == "approved"
    others: dict[str, Binding] = {
        "to compare": binding(proposal.model_copy(update={"compare": ("local",)})),
        "other defaults": binding(proposal.model_copy(update={"plan_sha256": "1" * 64})),
        "Wardround 0": replace(bound, package="0.0.1"),
        "other base weights": replace(bound, start_sha256="2" * 64),
        "another model": replace(bound, teacher_sha256="2" * 64),
        "plug-in": replace(bound, plugins={**bound.plugins, "more": ""}),
        "another key": binding(proposal, Keys({**ROSTER.keys, "B": b"x" * 32})),
    }
    for word, changed in others.items():
        standing = changed.standing(decision, IDENTITY.public)
        assert standing.state == "pending"
        assert word in standing.reason.replace(bound.package, "0")
        assert "decide again" in standing.reason
    # A hospital that joined and takes no part in this study changes nothing.
    assert binding(proposal, Keys({**ROSTER.keys, "E": b"y" * 32})).standing(decision, IDENTITY.public).decision


def test_a_refusal_stays_one() -> None:
    bound = binding(proposed(toy_study()))
    decision = bound.decide("refused", IDENTITY, "no time")
    standing = replace(bound, package="9").standing(decision, IDENTITY.public)
    assert (standing.state, standing.reason) == ("refused", "no time")


@pytest.mark.parametrize(
    "change",
    [{"site": "B"}, {"state": "approved"}, {"roster_sha256": "0" * 64}, {"signature": ""}, {"signature": "0" * 128}],
)
def test_a_decision_that_was_edited_or_forged_counts_nothing(change: dict[str, Any]) -> None:
    bound = binding(proposed(toy_study()))
    edited = bound.decide("refused", IDENTITY).model_copy(update=change)
    with pytest.raises(Rejected, match="not signed"):
        bound.standing(edited, IDENTITY.public)


def test_a_decision_of_another_key_or_study_counts_nothing() -> None:
    bound = binding(proposed(toy_study()))
    with pytest.raises(Rejected, match="not signed"):
        bound.standing(bound.decide("approved", Identity(b"b" * 32)), IDENTITY.public)
    other = binding(proposed(toy_study(seed=4)))
    with pytest.raises(Rejected, match="another study"):
        bound.standing(other.decide("approved", IDENTITY), IDENTITY.public)


def test_a_proposal_travels_whole() -> None:
    study = toy_study()
    message = proposal_message(proposed(study), "A")
    again = Message(Header.from_bytes(message.header.to_bytes()), EMPTY)
    proposal, read = proposal_in(again)
    assert message.header.study == study_sha256(study) == study_sha256(read)
    assert proposal == proposed(study)


@pytest.mark.parametrize("kind", ["segmentation", "prompted_segmentation", "pretraining", "reconstruction"])
def test_a_study_that_is_read_closed_has_the_same_hash(kind: str) -> None:
    study = load_study({"name": "x", "sites": {"A": {}, "B": {}}, "task": {"kind": kind}})
    assert study_sha256(proposed_study(proposed(study))) == study_sha256(study)


def test_hostile_proposals_are_refused() -> None:
    study = toy_study()
    message = proposal_message(proposed(study), "A")

    def sent(**changes: Any) -> Message:
        return Message(replace(message.header, **changes))

    meta = dict(message.header.meta)
    long = {**meta["study"], "description": "x" * LARGEST_STUDY}
    hostile: dict[str, tuple[Message, type[WardroundError]]] = {
        "hash": (sent(study="0" * 64), Rejected),
        "path": (sent(study="../../etc"), Rejected),
        "long": (sent(meta={**meta, "study": long}), Rejected),
        "body": (sent(body_nbytes=3), Rejected),
        "key": (sent(meta={**meta, "more": 1}), WireError),
        "pooled": (sent(meta={**meta, "compare": ["pooled"]}), WireError),
        "weights": (sent(meta={**meta, "start_sha256": "0" * 64}), Rejected),
        "no study": (sent(meta={**meta, "study": {"name": "../x"}}), StudyError),
        "a file elsewhere": (
            sent(meta={**meta, "study": {**meta["study"], "start": {"kind": "weights", "file": "/etc/passwd"}}}),
            StudyError,
        ),
        "another way to say it": (sent(meta={**meta, "study": {**meta["study"], "start": {}}}), WardroundError),
    }
    for request, error in hostile.values():
        with pytest.raises(error):
            proposal_in(request)


def test_base_weights_need_their_hash() -> None:
    start = {"kind": "weights", "file": "w.safetensors"}
    with pytest.raises(StudyError, match=r"start\.sha256"):
        proposed(toy_study(start=start))
    with_hash = proposed(toy_study(start={**start, "sha256": "3" * 64}))
    assert binding(with_hash).start_sha256 == "3" * 64
