"""Hospitals that left a model which a study goes on from: they do not come back by accident."""

from __future__ import annotations

import json
from collections.abc import Mapping

from wardround.errors import DataError, StudyError
from wardround.plan.weights import open_model, place_of
from wardround.study.places import Places
from wardround.study.schema import Study
from wardround.study.start import FromRelease

#: Key of a released model's metadata: the sites that left it or one that it goes on from.
LEFT = "left"


def left_by(metadata: Mapping[str, str]) -> frozenset[str]:
    """The sites that left a released model, or one before it, and did not come back; none where it does not say."""
    try:
        study = json.loads(metadata["study"])
        forget, sites = study.get("forget"), study["sites"]
        back = {name for name, site in sites.items() if site.get("returns")}
    except (KeyError, ValueError, AttributeError):
        return frozenset()
    own = {str(forget["site"])} if forget and forget["how"] != "unlearn" else set()
    return frozenset(own.union(metadata.get(LEFT, "").split()) - back)


def left_before(study: Study, places: Places) -> frozenset[str]:
    """The sites that left what a study starts from.

    Raises `StudyError` where one of them is back in the study without a word of it, or the released model is not there.
    """
    if not isinstance(study.start, FromRelease):
        return frozenset()
    try:
        left = left_by(open_model(place_of(study.start, places))[1])
    except DataError:
        # What is wrong with the file is said where it is read as a whole.
        return frozenset()
    for name, site in study.sites.items():
        if name in left and not site.returns:
            raise StudyError(
                f"sites.{name}: it left the model that the study starts from, and was forgotten; take it out of the "
                f"study, or, where it comes back of its own will, set `sites.{name}.returns: true`"
            )
    return left - study.sites.keys()
