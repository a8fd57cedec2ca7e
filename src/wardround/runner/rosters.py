"""Who takes part in a secure sum on this machine: the roster that its sites enrol in, kept beside the arm's journal.

Across hospitals, a roster is what the sites agree on beforehand.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from wardround.errors import JournalError
from wardround.federation.store import SiteStore
from wardround.protection.identity import Roster
from wardround.wire.files import write_text


def roster_of(path: Path) -> Roster:
    """The public keys as the sites enrolled them; raises `JournalError` when they did not."""
    try:
        return Roster.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise JournalError("the roster of the run is lost; start again in another folder", detail=str(path)) from None


def enrolled(path: Path, stores: Mapping[str, Callable[[], SiteStore]]) -> Roster:
    """The roster at `path`; where there is none yet, every site makes its signing key in its own store first."""
    if not path.exists():
        keys: dict[str, bytes] = {}
        for site, opened in stores.items():
            store = opened()
            keys[site] = store.enrol().public
            store.close()
        # Sites hold on to the first roster they saw: without it the run could not go on.
        write_text(path, json.dumps(Roster(keys).to_json()), durable=True)
    return roster_of(path)
