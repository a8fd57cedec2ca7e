"""A site in an arm that it does not train in, and whose validation patients count in the choice of the round."""

from __future__ import annotations

from wardround.errors import Rejected
from wardround.federation.exchange import EVALUATE, RELEASE, TRAIN
from wardround.federation.measuring import RELEASED
from wardround.site.alone import own_results
from wardround.site.protocol import SiteReply
from wardround.site.site import Site
from wardround.wire.message import Message


class Validates:
    """It validates the model of a round, one a round, tests the released one, and answers nothing else."""

    kinds = frozenset({TRAIN, EVALUATE, RELEASE})
    replies = frozenset[str]()

    def admit(self, request: Message, site: Site) -> None:
        """Refuse all but a validation and a test."""
        if request.header.kind != EVALUATE:
            raise Rejected(f"site {site.name} does not train in this arm: it only validates and tests the model")

    def answer(self, request: Message, site: Site) -> SiteReply:
        """Sums over validation patients of a round's model, or the site's own results, where its rules let them out.

        What a round's model is at a site that has no part in it, the request carries whole: it is served as a released
        one is to a hospital that did not train.
        """
        meta = request.header.meta
        if meta.get("split") != "validation":
            return own_results(request, site)
        if meta.get("evaluator") != RELEASED or meta.get("unseen_site") is not True or not request.header.body_nbytes:
            raise Rejected(f"site {site.name} validates the model that a request carries, as one that it did not train")
        return site.evaluate(request)
