"""What a site does with a model it received before it trains on it: look whether it was built to leak."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from wardround.errors import Rejected
from wardround.federation.exchange import TRAIN
from wardround.learning.known_model import KnownModel
from wardround.learning.methods.method import MODEL
from wardround.protection.compression import Codec
from wardround.protection.drift import UNKNOWN, Seen, Sketcher, UpdateBound, drift, witnessed
from wardround.protection.lint import Finding, lint_against
from wardround.storage.store import SiteStore
from wardround.wire.ring import levels
from wardround.wire.scales import GROWTH, headroom
from wardround.wire.update import Layout, limits, scale_key

Array = npt.NDArray[Any]
_SECRET, _SEEN = "lint/secret", "lint/seen"


class Inspector:
    """Looks at the models that one site receives in one arm; what it remembers of them lies in the site's store.

    Where a `codec` sends a part of a change rounds later, it cannot be said how far one round moves. `initial_scale` is
    the study's. `note` writes a record of an event into the site's log. `catch_up` is how many rounds without the site
    its operator lets explain a move: that they took place is the coordinator's word.
    """

    def __init__(
        self,
        site: str,
        store: SiteStore,
        layout: Layout,
        codec: Codec,
        initial_scale: float,
        note: Callable[[str, Mapping[str, Any]], None],
        catch_up: int = 0,
    ) -> None:
        self._site = site
        self._store = store
        self._layout = layout
        self._codec = codec
        self._initial_scale = initial_scale
        self._note = note
        self._catch_up = catch_up
        self._approved: dict[str, Array] = {}
        self._alike: dict[str, int] = {}
        self._largest_scales: dict[str, float] = {}

    def check(self, number: int, public: Mapping[str, Array], agreed: KnownModel) -> Seen:
        """What to remember of the model of round `number`; raises `Rejected` where it looks like one made to leak."""
        if not self._approved:
            self._approved = agreed.approved()
        tensors = agreed.received(public)
        findings = list(lint_against(tensors, self._approved, self._alike))
        if findings:
            raise self._refusal(number, findings[0])
        sketcher = self._sketcher
        self._largest_scales = self._honest_scales(tensors, agreed.own_bound)
        sketch = cache(lambda name: sketcher.sketch(name, tensors[name]))
        known = self._seen(agreed, sketcher)
        update_bound = self._update_bound(agreed, known, tensors)
        believed = min(number, known.round + 1 + self._catch_up)
        for finding in drift(known, tensors, believed, update_bound, sketch):
            limit = f"in {1 + self._catch_up} round{'s' if self._catch_up else ''}"
            raise self._refusal(number, self._unwitnessed(finding, limit, number - known.round))
        if update_bound == UNKNOWN and not known.own and number > believed:
            # It never saw how far a round goes, and is told of several.
            for finding in drift(known, tensors, known.round, UpdateBound(), sketch):
                told = f"moved since round {known.round}"
                limit = "and how far a round of this study goes cannot be said"
                finding = Finding("drift", finding.tensor, told)
                raise self._refusal(number, self._unwitnessed(finding, limit, number - known.round))
        if self._catch_up:
            # What its operator agreed to all the same is put on record.
            for finding in drift(known, tensors, min(number, known.round + 1), update_bound, sketch):
                said = f"{finding.tensor} {finding.text} in 1 round; {number - known.round} are said to lie in between"
                self._note("security", {"kind": TRAIN, "round": number, "reason": said})
                break
        if number <= known.round and self._store.fact(_SEEN) is not None:
            # Many requests of one round must not walk a model further than one.
            return known
        names = agreed.trained | agreed.folded
        sketches = {name: sketch(name) for name in tensors if name in names}
        return Seen(number, sketches, known.rounding, known.own)

    def _update_bound(
        self, agreed: KnownModel, known: Seen, tensors: Mapping[str, Array]
    ) -> UpdateBound | dict[str, UpdateBound]:
        """How far a round goes: as the study's optimisers say, or where they have no limit as the site's own training
        showed.
        """
        if self._codec.lags:
            return UNKNOWN
        sizes = {name: int(np.asarray(tensors[name]).size) for name in known.sketches}
        if (bound := agreed.update_bound) != UNKNOWN:
            bounds = dict.fromkeys(sizes, bound)
        elif known.own:
            own = {name: length for name, length in known.own.items() if name in sizes}
            bounds = {name: agreed.bound_after(witnessed(own, sizes, name)) for name in sizes}
        else:
            return UNKNOWN
        if UNKNOWN in bounds.values():
            return bounds

        def reach(name: str) -> float:
            length = float(np.linalg.norm(np.asarray(tensors[name], np.float64)))
            return bounds[name].of(sizes[name], length) + known.rounding.get(name, 0.0) * math.sqrt(sizes[name])

        moves = {name: UpdateBound(norm=length) for name, length in agreed.other_moves(reach).items()}
        return {**bounds, **moves} if moves or bound == UNKNOWN else bound

    def _unwitnessed(self, finding: Finding, limit: str, between: int) -> Finding:
        """A finding, with what the site's operator can do where the coordinator says that the site was away."""
        missed = between - 1
        if missed <= self._catch_up:
            return finding
        agreed = f"of these the site lets {self._catch_up} explain a move" if self._catch_up else "none is believed"
        told = (
            f"{finding.text} {limit}; {missed} without this site are said to lie in between, and {agreed}: if it was "
            f"away for as long, set catch_up: {missed} in its sites file"
        )
        return Finding(finding.check, finding.tensor, told)

    def remember(
        self,
        seen: Seen,
        scales: Mapping[str, float],
        weights: Mapping[str, float],
        changes: Mapping[str, Array],
    ) -> None:
        """Keep what `check` returned, once the round's weights are known: they say how coarse its sum is.

        `changes` are the site's own, which say how far a round goes. Where its training failed there is neither: the
        model was seen all the same.

        Not durably: after a power cut an older memory stands, and more rounds lie in between.
        """
        lengths = {
            n: float(np.linalg.norm(np.asarray(t, np.float64))) for n, t in changes.items() if n in seen.sketches
        }
        own = {n: max(length, seen.own.get(n, 0.0)) for n, length in lengths.items() if math.isfinite(length)}
        seen = replace(seen, own={**seen.own, **own})
        if MODEL in weights:
            rounding = self._rounding(scales, weights)
            seen = replace(seen, rounding={n: v for n, v in rounding.items() if n in seen.sketches})
        self._store.set_fact(_SEEN, json.dumps(seen.to_json()), durable=False)

    @cached_property
    def _sketcher(self) -> Sketcher:
        return Sketcher(bytes.fromhex(self._store.write_once(_SECRET, 0, secrets.token_hex(32))))

    def _seen(self, agreed: KnownModel, sketcher: Sketcher) -> Seen:
        fact = self._store.fact(_SEEN)
        if fact is not None:
            return Seen.from_json(json.loads(fact))
        # The model of round 1 is the one that the site makes itself of the study.
        names = agreed.trained | agreed.folded
        sketches = {n: sketcher.sketch(n, t) for n, t in self._approved.items() if n in names}
        # Of the rounds since then it has heard nothing: their sums were no coarser than the first.
        scales = {
            scale_key(group.name, info.name): self._initial_scale
            for group in self._layout.groups
            for info in group.tensors
        }
        rounding = self._rounding(scales, agreed.least_weights)
        return Seen(1, sketches, {n: v for n, v in rounding.items() if n in sketches})

    def _honest_scales(self, tensors: Mapping[str, Array], own: UpdateBound) -> dict[str, float]:
        """The largest scale that `next_scales` can come to for a tensor, when all sites do what the study says.

        The headroom over the peak of a sum of as many changes as sites fit, twice that for what grows within a round,
        the jump of a scale below a change, and the noise of the roundings before: what a coordinator announces beyond
        is its own word, and makes no sum coarser. 0 where steps have no limit: a model whose move is bounded all the
        same is so whatever sites send.
        """
        found, sites = {}, self._layout.max_sites
        for group in self._layout.groups:
            bits = self._layout.bits_of(group)
            for info in group.tensors if group.name == MODEL else ():
                room = headroom(info.size, bits)
                noise = 3.0 * room * math.sqrt(sites) / levels(bits)
                length = float(np.linalg.norm(np.asarray(tensors[info.name], np.float64)))
                one = own.of(info.size, length) if self._codec.turns else own.of_one(length)
                if math.isinf(one):
                    found[info.name] = 0.0
                    continue
                # So few bits that roundings may feed on themselves: nobody can say.
                most = max(self._initial_scale, 2.0 * room * sites * one, GROWTH * one)
                found[info.name] = most / (1.0 - noise) if noise < 1.0 else math.inf
        return found

    def _rounding(self, scales: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
        """Six standard deviations of the sum of as many roundings as sites fit, over this site's own weight."""
        honest = {scale_key(MODEL, name): scale for name, scale in self._largest_scales.items()}
        largest = limits(self._layout, {key: min(s, honest.get(key, s)) for key, s in scales.items()}, weights)
        found = {}
        for group in self._layout.groups:
            step = 2.0 ** (1 - self._layout.bits_of(group))
            for info in group.tensors if group.name == MODEL else ():
                found[info.name] = 3.0 * math.sqrt(self._layout.max_sites) * step * largest[scale_key(MODEL, info.name)]
        return found

    def _refusal(self, number: int, finding: Finding) -> Rejected:
        return Rejected(
            f"site {self._site} does not train on the model of round {number}: its tensor {finding.tensor} "
            f"{finding.text} ({finding.check}). If the study explains that, the site can set lint: false in its sites "
            "file"
        )
