"""The list of sites: only the root signs it, its serial only grows, and a site's own key in it stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wardround.errors import Rejected, WireError
from wardround.hospitals.roster import SignedRoster, admitted, take_over
from wardround.protection.identity import Identity, Roster

ROOT, OTHER_ROOT = Identity(b"r" * 32), Identity(b"q" * 32)
A, B, C = (Identity(bytes([n]) * 32).public for n in (1, 2, 3))
LIST = SignedRoster.sign("stroke", 3, {"B": B, "A": A}, ROOT)


def test_the_root_signs_a_list_that_any_party_verifies(tmp_path: Path) -> None:
    LIST.verify(ROOT.public)
    LIST.save(tmp_path / "roster.json")
    read = SignedRoster.load(tmp_path / "roster.json")
    assert read == SignedRoster.from_json(json.loads(json.dumps(LIST.to_json()))) == LIST
    read.verify(ROOT.public)
    assert read.sites == ("A", "B")
    assert SignedRoster.sign("stroke", 3, {"A": A, "B": B}, ROOT) == LIST
    SignedRoster.sign("stroke", 0, {}, ROOT).verify(ROOT.public)


@pytest.mark.parametrize(
    "change",
    [
        {"federation": "heart"},
        {"serial": 4},
        {"keys": {"A": A}},
        {"keys": {"A": B, "B": A}},
        {"keys": {"A": A, "B": B, "C": C}},
        {"keys": {"A": A, "B": C}},
        {"signature": bytes(64)},
        {"signature": b""},
    ],
)
def test_a_list_that_was_changed_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(Rejected, match="root did not sign"):
        replace(LIST, **change).verify(ROOT.public)


def test_a_list_of_another_root_is_refused() -> None:
    for key in (OTHER_ROOT.public, b"", bytes(31)):
        with pytest.raises(Rejected, match="root did not sign"):
            LIST.verify(key)


def test_no_two_sites_have_one_key() -> None:
    for make in (
        lambda: SignedRoster.sign("stroke", 1, {"A": A, "B": A}, ROOT),
        lambda: SignedRoster("stroke", 1, {"A": A, "B": A}, b""),
        lambda: admitted(LIST, "C", A, ROOT),
    ):
        with pytest.raises(Rejected, match="one key"):
            make()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: value.pop("serial"),
        lambda value: value.update(extra=1),
        lambda value: value.update(serial=-1),
        lambda value: value.update(serial=True),
        lambda value: value.update(serial="3"),
        lambda value: value.update(serial=1 << 64),
        lambda value: value.update(federation="../x"),
        lambda value: value["keys"].update({"A": "zz"}),
        lambda value: value["keys"].update({"A": A.hex()[:-2]}),
        lambda value: value["keys"].update({"../A": C.hex()}),
        lambda value: value.update(keys=[A.hex()]),
        lambda value: value.update(signature="00"),
    ],
)
def test_another_form_is_no_list(spoil: Any) -> None:
    value = LIST.to_json()
    spoil(value)
    with pytest.raises(WireError, match="not of the form"):
        SignedRoster.from_json(value)


def test_a_file_that_is_no_list_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(WireError, match="No such file"):
        SignedRoster.load(tmp_path / "roster.json")
    (tmp_path / "roster.json").write_bytes(b" " * ((4 << 20) + 1))
    with pytest.raises(WireError, match="longer than"):
        SignedRoster.load(tmp_path / "roster.json")
    (tmp_path / "roster.json").write_bytes(b"\xff")
    with pytest.raises(WireError):
        SignedRoster.load(tmp_path / "roster.json")


def test_the_hash_of_a_studys_sites_changes_with_their_keys_alone() -> None:
    both = LIST.sha256_of(["B", "A"])
    assert both == LIST.sha256_of(("A", "B")) == Roster({"A": A, "B": B}).sha256
    assert admitted(LIST, "C", C, ROOT).sha256_of(["A", "B"]) == both
    assert admitted(LIST, "B", C, ROOT, replace=True).sha256_of(["A", "B"]) != both
    with pytest.raises(Rejected, match="does not hold C"):
        LIST.sha256_of(["A", "C"])


def test_admitting_is_one_step_of_the_serial_and_says_no_to_a_second_key() -> None:
    third = admitted(LIST, "C", C, ROOT)
    third.verify(ROOT.public)
    assert (third.serial, third.sites) == (4, ("A", "B", "C"))
    assert admitted(LIST, "A", A, ROOT) is LIST
    with pytest.raises(Rejected, match="--replace"):
        admitted(LIST, "A", C, ROOT)
    assert admitted(LIST, "A", C, ROOT, replace=True).keys["A"] == C


def _take(new: SignedRoster, known: SignedRoster | None = LIST, site: str = "A", key: bytes = A) -> None:
    take_over(new, known, federation="stroke", root_key=ROOT.public, site=site, key=key)


def test_a_site_takes_a_newer_list_and_the_same_again() -> None:
    _take(LIST, None)
    _take(LIST)
    _take(admitted(LIST, "C", C, ROOT))
    _take(admitted(LIST, "B", C, ROOT, replace=True))


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (SignedRoster.sign("heart", 9, {"A": A}, ROOT), "federation heart; this site joined stroke"),
        (SignedRoster.sign("stroke", 9, {"A": A}, OTHER_ROOT), "root did not sign"),
        (SignedRoster.sign("stroke", 2, {"A": A, "B": B}, ROOT), "older one .serial 2; this site has 3"),
        (SignedRoster.sign("stroke", 3, {"A": A, "B": C}, ROOT), "two different lists with serial 3"),
        (SignedRoster.sign("stroke", 4, {"B": B}, ROOT), "does not hold A"),
        (SignedRoster.sign("stroke", 4, {"A": C, "B": B}, ROOT), "another key than its own"),
    ],
)
def test_a_site_refuses_every_other_list_and_says_why(new: SignedRoster, why: str) -> None:
    with pytest.raises(Rejected, match=why):
        _take(new)
