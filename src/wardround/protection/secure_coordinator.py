"""The coordinator's side of the secure sum (see `wardround.protection.secure_sum`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import chain, combinations, islice

from wardround.errors import NotEnoughSites, WardroundError
from wardround.protection.agreement import (
    CONSENT,
    Misbehaviour,
    commitment,
    consent_fields,
    dealers_sha256,
    implied_peers,
    pair_mask,
    public_key,
    roll_sha256,
    shared_secret,
)
from wardround.protection.identity import Roster
from wardround.protection.masking import MASK_KEY_BYTES, KeyedMask
from wardround.protection.secure_site import verified
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

# Subsets of revealing sites that are tried when a share is wrong: enough for one or two liars among 50.
MAX_SUBSETS = 1500


class Unrecoverable(WardroundError):
    """The shares that came do not give back what hides the sum."""


class CoordinatorSession:
    """Relays, counts and, at the end, finds the masks that cancel. What it refuses, it refuses naming the site.

    A site whose statement is refused, or does not come, is not in the next phase. `NotEnoughSites` is raised where
    fewer than the threshold are left before the survivor list is announced, `Unrecoverable` after.
    """

    def __init__(self, roster: Roster, context: Attempt) -> None:
        self._roster = roster
        self.context = context
        self.adverts: dict[str, Advert] = {}
        self.dealt: dict[str, Shares] = {}
        self.uploads: set[str] = set()
        self.consents: dict[str, Consent] = {}
        self.reveals: dict[str, Reveal] = {}
        self.liars: dict[str, str] = {}
        self._roll: Roll | None = None
        self._order: list[str] = []
        self._dealers = b""
        self._announcement: Announcement | None = None

    def advert(self, advert: Advert) -> None:
        """Take a site's keys; raises `Misbehaviour`."""
        site = advert.site
        if not verified(self._roster, self.context, advert):
            raise Misbehaviour(site[:40], "did not sign its keys for this study, round, attempt and model")
        if self.adverts.get(site, advert) != advert:
            raise Misbehaviour(site, "sent two different adverts")
        mine = {advert.mask_key, advert.share_key}
        for other in self.adverts.values():
            if other.site != site and mine & {other.mask_key, other.share_key}:
                raise Misbehaviour(site, f"advertised a key that site {other.site} advertised too")
        if len(mine) < 2:
            raise Misbehaviour(site, "advertised one key for two purposes")
        self.adverts[site] = advert

    def roll(self) -> Roll:
        """The sites that began, to all of them."""
        self._need(len(self.adverts), "sent their keys")
        self._order = sorted(self.adverts)
        self._roll = Roll(tuple(self.adverts[site] for site in self._order))
        return self._roll

    def shares(self, shares: Shares) -> None:
        """Take a site's sealed shares; raises `Misbehaviour`."""
        site = shares.site
        if site not in self.adverts:
            raise Misbehaviour(site[:40], "deals shares without being on the roll")
        implied = implied_peers(self._order, site, self.context.threshold)
        if shares.sealed.keys() != set(self._order) - {site, *implied}:
            raise Misbehaviour(site, "did not deal a share to every site on the roll")
        self.dealt[site] = shares

    def deals(self) -> Mapping[str, Deal]:
        """To each site that dealt: who dealt, and its own shares."""
        self._need(len(self.dealt), "dealt their shares")
        dealers = tuple(sorted(self.dealt))
        assert self._roll is not None
        self._dealers = dealers_sha256(roll_sha256(self.context, self._roll.adverts), dealers)
        return {
            site: Deal(dealers, {d: self.dealt[d].sealed[site] for d in dealers if site in self.dealt[d].sealed})
            for site in dealers
        }

    def uploaded(self, site: str) -> None:
        """Note that a site's masked update came whole and is in the sum; raises `Misbehaviour`."""
        if site not in self.dealt:
            raise Misbehaviour(site[:40], "sent a masked update without having dealt shares")
        self.uploads.add(site)

    def announce(self) -> Announcement:
        """The survivor list. It must be on record before anybody sees it."""
        self._need(len(self.uploads), "sent their masked updates")
        self._announcement = Announcement(tuple(sorted(self.uploads)), tuple(sorted(self.dealt.keys() - self.uploads)))
        return self._announcement

    def consent(self, consent: Consent) -> None:
        """Take a survivor's signature; raises `Misbehaviour`."""
        announcement = self._announced()
        fields = consent_fields(self._dealers, announcement)
        known = consent.site in announcement.survivors
        if not known or not self._roster.verify(consent.site, consent.signature, CONSENT, *fields):
            raise Misbehaviour(consent.site[:40], "did not sign the survivor list that was announced")
        self.consents[consent.site] = consent

    def quorum(self) -> Quorum:
        """The signatures, to all who signed."""
        self._still(len(self.consents), "signed the survivor list")
        return Quorum(tuple(self.consents[site] for site in sorted(self.consents)))

    def reveal(self, reveal: Reveal) -> None:
        """Take a site's shares; raises `Misbehaviour`."""
        announcement = self._announced()
        site = reveal.site
        if site not in self.consents:
            raise Misbehaviour(site[:40], "reveals shares without having signed")
        if (len(reveal.seeds), len(reveal.keys)) != (len(announcement.survivors), len(announcement.lost)):
            raise Misbehaviour(site, "did not reveal exactly one share of every site")
        self.reveals[site] = reveal

    def unmask(self) -> tuple[KeyedMask, ...]:
        """The masks that, added to the sum, cancel those that are in it.

        Raises `Unrecoverable` when too few shares came or too many are wrong. Sites caught with a wrong share, where
        the others sufficed, are in `liars`.
        """
        announcement = self._announced()
        self._still(len(self.reveals), "revealed their shares")
        masks: list[KeyedMask] = []
        recovery = _Recovery(self._order, self.context.threshold, self.liars)
        for index, site in enumerate(announcement.survivors):
            values = {who: reveal.seeds[index] for who, reveal in self.reveals.items()}
            seed = recovery.find(site, values, MASK_KEY_BYTES, partial(self._is_seed, site))
            masks.append(KeyedMask(seed).opposite)
        for index, site in enumerate(announcement.lost):
            values = {who: reveal.keys[index] for who, reveal in self.reveals.items()}
            private = recovery.find(site, values, 32, partial(self._is_mask_key, site))
            for survivor in announcement.survivors:
                secret = shared_secret(private, self.adverts[survivor].mask_key, survivor)
                masks.append(pair_mask(secret, self._dealers, survivor, site).opposite)
        return tuple(masks)

    def _is_seed(self, site: str, seed: bytes) -> bool:
        return commitment(self.context, site, seed) == self.adverts[site].commitment

    def _is_mask_key(self, site: str, private: bytes) -> bool:
        return public_key(private) == self.adverts[site].mask_key

    def _announced(self) -> Announcement:
        if self._announcement is None:
            raise Unrecoverable("secure sum: a reply to a survivor list that was never announced")
        return self._announcement

    def _need(self, count: int, did: str) -> None:
        if count < self.context.threshold:
            raise NotEnoughSites(
                f"secure sum: {count} sites {did} and the threshold is {self.context.threshold}; nothing was revealed. "
                "Mend the cause and run again with --resume"
            )

    def _still(self, count: int, did: str) -> None:
        if count < self.context.threshold:
            raise Unrecoverable(
                f"secure sum: {count} sites {did} and the threshold is {self.context.threshold}; this round is aborted"
            )


class _Recovery:
    """Secrets from shares, some of which may be wrong: the right ones are those that fit what the dealer advertised."""

    def __init__(self, order: list[str], threshold: int, liars: dict[str, str]) -> None:
        self._order = order
        self._threshold = threshold
        self._liars = liars
        self._bases: dict[tuple[str, ...], tuple[Basis, tuple[int, ...]]] = {}

    def find(self, dealer: str, values: Mapping[str, int], size: int, fits: Callable[[bytes], bool]) -> bytes:
        """The secret that the shares give and that fits; notes whose share does not belong to it."""
        honest = sorted(site for site in values if site not in self._liars)
        for subset in self._subsets(honest):
            basis, weights = self._basis(subset)
            found = combine(weights, [values[site] for site in subset])
            if found >> (8 * size) == 0 and fits(found.to_bytes(size, "big")):
                self._blame(dealer, basis, subset, values)
                return found.to_bytes(size, "big")
        raise Unrecoverable(
            f"secure sum: the shares of site {dealer} do not give what it advertised: it dealt wrong ones, or too many "
            "sites revealed wrong ones; this round is aborted"
        )

    def _subsets(self, sites: list[str]) -> Iterable[tuple[str, ...]]:
        """Stretches of a circle first: wherever one liar stands, some stretch passes it by."""
        size, count = self._threshold, len(sites)
        circle = sites + sites
        stretches = (tuple(sorted(circle[at : at + size])) for at in range(count if count > size else count == size))
        return chain(stretches, islice(combinations(sites, size), MAX_SUBSETS))

    def _blame(self, dealer: str, basis: Basis, subset: tuple[str, ...], values: Mapping[str, int]) -> None:
        if len(values) == len(subset):
            return
        known = [values[site] for site in subset]
        for site in values.keys() - set(subset) - self._liars.keys():
            if combine(basis.weights(self._point(site)), known) != values[site]:
                self._liars[site] = (
                    f"the share of a secret of site {dealer} that site {site} revealed is wrong: one of the two lies"
                )

    def _basis(self, subset: tuple[str, ...]) -> tuple[Basis, tuple[int, ...]]:
        if subset not in self._bases:
            basis = Basis(tuple(self._point(site) for site in subset))
            self._bases[subset] = basis, basis.weights(0)
        return self._bases[subset]

    def _point(self, site: str) -> int:
        return 1 + self._order.index(site)
