"""A site's side of the secure sum (see `wardround.protection.secure_sum`)."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum

from wardround.protection.agreement import (
    ADVERT,
    CONSENT,
    COORDINATOR,
    Misbehaviour,
    commitment,
    consent_fields,
    dealers_sha256,
    implied_pair,
    implied_peers,
    pair_mask,
    partition_fault,
    public_key,
    roll_sha256,
    seal,
    shared_secret,
    unseal,
)
from wardround.protection.identity import Entropy, Identity, Roster, frame_sha256
from wardround.protection.masking import MASK_KEY_BYTES, KeyedMask
from wardround.protection.shamir import Basis, combine
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

Remember = Callable[[str], str]


class Stage(IntEnum):
    """How far a site is in an attempt."""

    NEW = 0
    ADVERTISED = 1
    SHARED = 2
    MASKED = 3
    SIGNED = 4
    OVER = 5


@dataclass
class _Secrets:
    """What must be forgotten when an attempt is over."""

    mask_key: bytes
    share_key: bytes
    seed: bytes
    pairs: dict[str, bytes] = field(default_factory=dict)
    shares: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __repr__(self) -> str:
        return "_Secrets(...)"


class SiteSession:
    """A site in one attempt. Its keys are made here, held in memory only, and forgotten when it ends."""

    def __init__(
        self,
        site: str,
        identity: Identity,
        roster: Roster,
        context: Attempt,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        if roster.keys.get(site) != identity.public:
            raise Misbehaviour(COORDINATOR, f"gave a roster that does not hold the key of site {site}")
        if context.roster != roster.sha256:
            raise Misbehaviour(COORDINATOR, "asks under another roster than the study's")
        self.site = site
        self.context = context
        self._identity = identity
        self._roster = roster
        self._secrets: _Secrets | None = _Secrets(entropy(32), entropy(32), entropy(MASK_KEY_BYTES))
        self._stage = Stage.NEW
        self._adverts: dict[str, Advert] = {}
        self._roll = b""
        self._dealers = b""
        self._members: frozenset[str] = frozenset()
        self._announcement = Announcement((), ())

    def advertise(self) -> Advert:
        """Phase 1: fresh public keys, signed."""
        with self._step(Stage.NEW) as own:
            advert = Advert(
                self.site,
                public_key(own.mask_key),
                public_key(own.share_key),
                commitment(self.context, self.site, own.seed),
                b"",
            )
            signature = self._identity.sign(ADVERT, self.context.sha256, *advert.signed)
            advert = Advert(advert.site, advert.mask_key, advert.share_key, advert.commitment, signature)
            self._adverts = {self.site: advert}
            return advert

    def share(self, roll: Roll) -> Shares:
        """Phase 2: check everybody's keys, then deal shares of one's own two secrets.

        The polynomial goes through the secret and the t - 1 values that the dealer and one peer each derive from
        their pair key; only the other peers need theirs sent.
        """
        with self._step(Stage.ADVERTISED) as own:
            adverts = self._checked(roll)
            order = sorted(adverts)
            self._roll = roll_sha256(self.context, roll.adverts)
            peers = [peer for peer in order if peer != self.site]
            own.pairs = {p: shared_secret(own.share_key, adverts[p].share_key, p) for p in peers}
            implied = implied_peers(order, self.site, self.context.threshold)
            basis = Basis((0, *(1 + order.index(peer) for peer in implied)))
            values = [implied_pair(own.pairs[peer], self._roll, self.site, peer) for peer in implied]
            seeds = [int.from_bytes(own.seed, "big"), *(seed for seed, _ in values)]
            keys = [int.from_bytes(own.mask_key, "big"), *(key for _, key in values)]
            sealed: dict[str, bytes] = {}
            for index, peer in enumerate(order):
                if peer in implied:
                    continue
                weights = basis.weights(1 + index)
                pair = combine(weights, seeds), combine(weights, keys)
                if peer == self.site:
                    own.shares[peer] = pair
                else:
                    sealed[peer] = seal(own.pairs[peer], self._roll, self.site, peer, pair)
            self._adverts = adverts
            return Shares(self.site, sealed)

    def mask(self, deal: Deal) -> tuple[KeyedMask, ...]:
        """Phase 3: take the peers' shares; the masks to put onto the update, one's own and one a peer."""
        with self._step(Stage.SHARED) as own:
            members = frozenset(deal.dealers)
            if not members <= self._adverts.keys() or self.site not in members:
                raise Misbehaviour(COORDINATOR, "names dealers that are not on the roll, or leaves this site out")
            if len(members) < self.context.threshold:
                raise Misbehaviour(COORDINATOR, f"goes on with {len(members)} sites, fewer than the threshold")
            order = sorted(self._adverts)
            for dealer in sorted(members - {self.site}):
                sent = deal.sealed.get(dealer)
                implied = self.site in implied_peers(order, dealer, self.context.threshold)
                if implied == (sent is not None):
                    raise Misbehaviour(COORDINATOR, f"did not relay the shares of site {dealer} as they are dealt")
                if sent is None:
                    own.shares[dealer] = implied_pair(own.pairs[dealer], self._roll, dealer, self.site)
                else:
                    own.shares[dealer] = unseal(own.pairs[dealer], self._roll, dealer, self.site, sent)
            if not deal.sealed.keys() <= members:
                raise Misbehaviour(COORDINATOR, "relays shares of a site that it does not name as a dealer")
            self._members = members
            self._dealers = dealers_sha256(self._roll, members)
            masks = [KeyedMask(own.seed)]
            for peer in sorted(members - {self.site}):
                secret = shared_secret(own.mask_key, self._adverts[peer].mask_key, peer)
                masks.append(pair_mask(secret, self._dealers, self.site, peer))
            return tuple(masks)

    def sign(self, announcement: Announcement, remember: Remember) -> Consent:
        """Phase 4: sign the survivor list, once for this round.

        `remember` writes the list's hash durably before anything is signed, unless the round already has one, and
        returns what the record says.
        """
        with self._step(Stage.MASKED):
            fault = partition_fault(announcement, self._members, self.context.threshold)
            if fault is None and self.site not in announcement.survivors:
                fault = "asks a site to sign a survivor list that it is not on"
            if fault is not None:
                raise Misbehaviour(COORDINATOR, fault)
            fields = consent_fields(self._dealers, announcement)
            write_once = frame_sha256(CONSENT, *fields).hex()
            if remember(write_once) != write_once:
                raise Misbehaviour(COORDINATOR, "announced a second survivor list for a round that has one")
            self._announcement = announcement
            return Consent(self.site, self._identity.sign(CONSENT, *fields))

    def reveal(self, quorum: Quorum) -> Reveal:
        """Phase 5: with enough signatures on the same list, reveal of each site one share: seed or mask key."""
        with self._step(Stage.SIGNED) as own:
            fields = consent_fields(self._dealers, self._announcement)
            signers = set()
            for consent in quorum.consents:
                known = consent.site in self._announcement.survivors and consent.site not in signers
                if not known:
                    raise Misbehaviour(COORDINATOR, "counts a signature twice, or one of a site that is no survivor")
                if not self._roster.verify(consent.site, consent.signature, CONSENT, *fields):
                    raise Misbehaviour(consent.site, "did not sign the survivor list that this site signed")
                signers.add(consent.site)
            if len(signers) < self.context.threshold:
                raise Misbehaviour(COORDINATOR, f"asks for shares with {len(signers)} signatures, too few")
            reveal = Reveal(
                self.site,
                tuple(own.shares[peer][0] for peer in sorted(self._announcement.survivors)),
                tuple(own.shares[peer][1] for peer in sorted(self._announcement.lost)),
            )
            self._secrets = None
            return reveal

    def abort(self) -> None:
        """Forget the keys; every later step is refused."""
        self._secrets = None
        self._stage = Stage.OVER

    @contextmanager
    def _step(self, expected: Stage) -> Iterator[_Secrets]:
        """One step: in order, at most once, and nothing after a failed one."""
        own = self._secrets
        if own is None or self._stage is not expected:
            self.abort()
            raise Misbehaviour(COORDINATOR, "asks for a step out of order, or again")
        try:
            yield own
        except BaseException:
            self.abort()
            raise
        self._stage = Stage(expected + 1)

    def _checked(self, roll: Roll) -> dict[str, Advert]:
        adverts = {advert.site: advert for advert in roll.adverts}
        if len(adverts) != len(roll.adverts) or not adverts.keys() <= self._roster.keys.keys():
            raise Misbehaviour(COORDINATOR, "relays a roll with a site twice, or one that is not on the roster")
        if adverts.get(self.site) != self._adverts[self.site]:
            raise Misbehaviour(COORDINATOR, "relays another advert for this site than it sent")
        if len(adverts) < self.context.threshold:
            raise Misbehaviour(COORDINATOR, f"goes on with {len(adverts)} sites, fewer than the threshold")
        for site in sorted(adverts):
            if not verified(self._roster, self.context, adverts[site]):
                raise Misbehaviour(site, "did not sign its keys for this study, round, attempt and model")
        owner: dict[bytes, str] = {}
        for site in sorted(adverts):
            for key in (adverts[site].mask_key, adverts[site].share_key):
                if key in owner:
                    raise Misbehaviour(site, f"advertised a key that site {owner[key]} advertised too")
                owner[key] = site
        return adverts


def verified(roster: Roster, context: Attempt, advert: Advert) -> bool:
    """Whether an advert is signed by its site for this context."""
    return roster.verify(advert.site, advert.signature, ADVERT, context.sha256, *advert.signed)
