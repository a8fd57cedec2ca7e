"""What a site does with a model it received before it trains on it: look whether it was built to leak."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wardround.errors import Rejected
from wardround.federation.exchange import TRAIN
from wardround.federation.methods.method import MODEL
from wardround.federation.store import SiteStore
from wardround.protection.compression import Codec
from wardround.protection.drift import UNKNOWN, Reach, Seen, Sketcher, drift
from wardround.protection.lint import Finding, lint_against
from wardround.wire.ring import levels
from wardround.wire.scales import GROWTH, headroom
from wardround.wire.update import Layout, limits, scale_key

Array = npt.NDArray[Any]
_SECRET, _SEEN = "lint/secret", "lint/seen"
# A site that was away for longer says so in its log where the model moved further than so many rounds explain.
_AWAY = 4


class Agreed(Protocol):
    """What a site knows of the model of a study without asking anybody; a `Learner` does."""

    @property
    def trained(self) -> frozenset[str]:
        """The shared tensors that gradients reach."""
        ...

    @property
    def reach(self) -> Reach:
        """How far a round can move them."""
        ...

    @property
    def own_reach(self) -> Reach:
        """How far the steps of one site go in a round."""
        ...

    @property
    def least_weights(self) -> dict[str, float]:
        """The smallest weights that the site can have in a round."""
        ...

    def approved(self) -> dict[str, Array]:
        """The shared tensors before round 1."""
        ...

    def received(self, public: Mapping[str, Array]) -> dict[str, Array]:
        """The shared tensors of a global state."""
        ...


class Inspector:
    """Looks at the models that one site receives in one arm; what it remembers of them lies in the site's store.

    Where a `codec` sends a part of a change rounds later, nobody can say how far one round moves. `initial_scale` is
    the study's. `note` writes a record of an event into the site's log.
    """

    def __init__(
        self,
        site: str,
        store: SiteStore,
        layout: Layout,
        codec: Codec,
        initial_scale: float,
        note: Callable[[str, Mapping[str, Any]], None],
    ) -> None:
        self._site = site
        self._store = store
        self._layout = layout
        self._codec = codec
        self._initial_scale = initial_scale
        self._note = note
        self._approved: dict[str, Array] = {}
        self._largest_scales: dict[str, float] = {}

    def check(self, number: int, public: Mapping[str, Array], agreed: Agreed) -> Seen:
        """What to remember of the model of round `number`; raises `Rejected` where it looks like one made to leak."""
        if not self._approved:
            self._approved = agreed.approved()
        tensors = agreed.received(public)
        findings = list(lint_against(tensors, self._approved))
        if findings:
            raise self._refusal(number, findings[0])
        sketcher = Sketcher(bytes.fromhex(self._store.promise(_SECRET, 0, secrets.token_hex(32))))
        reach = UNKNOWN if self._codec.lags else agreed.reach
        self._largest_scales = self._honest_scales(tensors, agreed.own_reach)
        known = self._seen(agreed, sketcher)
        for finding in drift(known, tensors, number, reach, sketcher):
            raise self._refusal(number, finding)
        # Only the coordinator says how long the site was away. An honest one may be right: it is put on record.
        for finding in drift(known, tensors, min(number, known.round + _AWAY), reach, sketcher):
            said = (
                f"{finding.tensor} {finding.text} in {_AWAY} rounds; {number - known.round} are said to lie in between"
            )
            self._note("security", {"kind": TRAIN, "round": number, "reason": said})
            break
        names = agreed.trained
        return Seen(number, {name: sketcher.sketch(name, tensors[name]) for name in tensors if name in names}, {})

    def remember(self, seen: Seen, scales: Mapping[str, float], weights: Mapping[str, float]) -> None:
        """Keep what `check` returned, once the round's weights are known: they say how coarse its sum is.

        Not durably: after a power cut an older memory stands, and more rounds lie in between.
        """
        if MODEL in weights:
            rounding = self._rounding(scales, weights)
            seen = Seen(seen.round, seen.sketches, {n: v for n, v in rounding.items() if n in seen.sketches})
        self._store.set_fact(_SEEN, json.dumps(seen.to_json()), durable=False)

    def _seen(self, agreed: Agreed, sketcher: Sketcher) -> Seen:
        fact = self._store.fact(_SEEN)
        if fact is not None:
            return Seen.from_json(json.loads(fact))
        # The model of round 1 is the one that the site makes itself of the study.
        names = agreed.trained
        sketches = {n: sketcher.sketch(n, t) for n, t in self._approved.items() if n in names}
        # Of the rounds since then it has heard nothing: their sums were no coarser than the first.
        scales = {
            scale_key(group.name, info.name): self._initial_scale
            for group in self._layout.groups
            for info in group.tensors
        }
        rounding = self._rounding(scales, agreed.least_weights)
        return Seen(1, sketches, {n: v for n, v in rounding.items() if n in sketches})

    def _honest_scales(self, tensors: Mapping[str, Array], own: Reach) -> dict[str, float]:
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
