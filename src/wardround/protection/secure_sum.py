"""The secure sum SA1: the coordinator learns the sum of the sites' updates, and which sites are in it; nothing else.

Double masking on a complete graph with signed keys and a consistency step (Bonawitz et al., CCS 2017, the variant
against an active server), over the rings of `wardround.wire.ring`. Two state machines without input and output:

    site                                   coordinator
    advertise() -> Advert          ->      advert(), roll() -> Roll
    share(Roll) -> Shares          ->      shares(), deals() -> Deal for each site
    mask(Deal) -> masks, upload    ->      uploaded(), announce() -> Announcement
    sign(Announcement) -> Consent  ->      consent(), quorum() -> Quorum
    reveal(Quorum) -> Reveal       ->      reveal(), unmask() -> masks that cancel what hides the sum

A site that finds a party breaking the protocol raises `Misbehaviour`, forgets its keys and says nothing more.
Threat model and proofs of what is used: docs/protection-details.md.
"""

from __future__ import annotations

from wardround.protection.agreement import COORDINATOR, Misbehaviour
from wardround.protection.identity import Identity, Roster
from wardround.protection.masking import KeyedMask, MaskStream
from wardround.protection.secure_coordinator import CoordinatorSession
from wardround.protection.secure_site import SiteSession
from wardround.protection.statements import (
    Advert,
    Announcement,
    Attempt,
    Consent,
    Deal,
    Quorum,
    Reveal,
    Roll,
    Shares,
)

__all__ = [
    "COORDINATOR",
    "Advert",
    "Announcement",
    "Attempt",
    "Consent",
    "CoordinatorSession",
    "Deal",
    "Identity",
    "KeyedMask",
    "MaskStream",
    "Misbehaviour",
    "Quorum",
    "Reveal",
    "Roll",
    "Roster",
    "Shares",
    "SiteSession",
]
