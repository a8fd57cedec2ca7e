"""The worker process of a hospital's study: the site's agent, and the site's own page once the released model is there.

Nothing here is imported by the resident process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from wardround.deidentify import describe_error
from wardround.federation.exchange import DONE, Party
from wardround.federation.facts import DELIVER
from wardround.study.base import at
from wardround.study.hashes import study_sha256
from wardround.study.schema import Study
from wardround.wire.message import Header, Message

log = logging.getLogger(__name__)


def agent_finder(spec: dict[str, Any], progress: Any = None) -> Callable[[Header], Party]:
    """As `wardround.site.process.agent_finder`, and raises what that does."""
    find = cast("Callable[[Header], Party]", at("wardround.site.process:agent_finder")(spec, progress))
    studies = [(Study.model_validate(each["study"]), Path(each["folder"])) for each in spec["studies"]]
    known = {study_sha256(study): (study, folder) for study, folder in studies}
    site = str(spec["site"])

    def found(header: Header) -> Party:
        party = find(header)
        if header.kind != DELIVER or header.study not in known:
            return party
        study, folder = known[header.study]
        return _Delivered(party, lambda: _write_page(folder, site, study))

    return found


class _Delivered:
    """A site that takes a released model, and does something once it has it."""

    def __init__(self, party: Party, then: Callable[[], None]) -> None:
        self._party, self._then = party, then

    def handle(self, request: Message) -> Message:
        """The site's answer."""
        reply = self._party.handle(request)
        if reply.header.kind == DONE:
            self._then()
        return reply


def _write_page(folder: Path, site: str, study: Study) -> None:
    """A page that cannot be written is no reason not to have the model."""
    try:
        from wardround.results.site_page import write_site_page

        write_site_page(folder, site, study)
    except Exception as error:
        log.warning("the site's page could not be written: %s", describe_error(error))
        log.debug("detail", exc_info=True)
