"""Which training patients of a site train in a study that continues a release: new ones, and some to remember by."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from wardround.errors import DataError
from wardround.imaging.datasets.split import Parts, Role
from wardround.site.measured import folder_key, keyed
from wardround.site.splits import KEY, SPLITS
from wardround.study.update import Update


def renewed(
    site: str, names: Sequence[str], parts: Parts, role: Role, update: Update, old: Collection[str], history: Path
) -> Parts:
    """The parts of a deal with those training patients alone who train in an update.

    `old` are the names of those from whom the release, or one before it, learned. Validation and test stay as they
    are. A site that does not train has no examples. Raises `DataError` as `remembered` does.
    """
    if role != "train":
        return {**parts, "train": ()}
    mine = parts["train"]
    before = [number for number in mine if names[number] in old]
    match update.train_on:
        case "all":
            return parts
        case "old":
            chosen = set(before)
        case "new":
            kept = remembered(site, [names[number] for number in before], update.memory, history)
            chosen = {n for n in mine if names[n] not in old or names[n] in kept}
    return {**parts, "train": tuple(number for number in mine if number in chosen)}


def check_some(site: str, examples: int, update: Update | None) -> None:
    """Raise `DataError` where a site is to train in an update and has no examples for it."""
    if update is None or update.train_on == "all" or examples:
        return
    which = "learned from" if update.train_on == "old" else "has not learned from yet"
    raise DataError(
        f"site {site} trains and has no training patient whom the release {which} (update.train_on: "
        f"{update.train_on}); give it `role: evaluate`, or set update.train_on to all"
    )


def remembered(site: str, names: Sequence[str], share: float, history: Path) -> frozenset[str]:
    """The share of a site's old training patients who train again, at least one of any.

    Those with the least digests under the secret of the site's record of who trains (`history`), which is there where
    anybody has trained: nobody else can tell who they are, and each study draws the same; a patient more changes one
    at most. Raises `DataError` where the secret cannot be read.
    """
    count = min(len(names), max(1, round(share * len(names)))) if share > 0.0 else 0
    if not count:
        return frozenset()
    try:
        secret = folder_key(history, KEY, SPLITS)
    except OSError as error:
        raise DataError(
            "the site's record of who trains cannot be read, and with it whom it remembers a release by",
            detail=str(error),
        ) from error
    # Not the digests of that record: its lines, in their order, would say who they are.
    return frozenset(sorted(names, key=lambda name: keyed(secret, f"remembered/{site}/{name}"))[:count])
