"""Asks every site how its images look, and says how unlike they are. Opens nothing of a site."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from wardround.errors import WireError
from wardround.federation.exchange import ERROR, Engine
from wardround.federation.facts import PLAN, parsed
from wardround.federation.statistics import (
    STATISTICS,
    SiteStatistics,
    Sums,
    added,
    check_statistics,
)
from wardround.results.shift import Channel, Drawn, SharedLandmarks, Shift, SiteProfile, Spread, distances
from wardround.runs.context import Context
from wardround.study.normalise import PERCENTILES, ZScore
from wardround.tasks.looks import BINS, HIGH, LOW, RADII, Quantity, Subject, subject_of
from wardround.wire.message import Header, Message

log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]
_CENTRES = LOW + (np.arange(BINS) + 0.5) * (HIGH - LOW) / BINS
_WANTED = (5, 25, 50, 75, 95)


def ask_shift(host: Context, engine: Engine) -> Shift:
    """What every site of a study says of its images; a site that gives no answer is in `failed`."""
    subject, said, failed = subject_of(host.task), dict[str, SiteStatistics](), dict[str, str]()
    meta = {PLAN: host.plan_sha256}
    sites = host.remaining(host.study.sites)
    asked = [Message(Header(STATISTICS, host.study_sha256, site, meta=meta)) for site in sites]
    for reply in engine.exchange(asked):
        header = reply.header
        try:
            if header.kind == ERROR:
                raise WireError(str(header.meta.get("reason", "no reason given")))
            said[header.site] = check_statistics(parsed(SiteStatistics, header.meta), subject)
        except WireError as error:
            log.warning("site %s gave no statistics: %s", header.site, error)
            failed[header.site] = str(error)
    return shift_of(host, {site: said[site] for site in sites if site in said}, failed)


def shift_of(host: Context, said: Mapping[str, SiteStatistics], failed: Mapping[str, str]) -> Shift:
    """The sums of sites as means, deviations and distances."""
    study, subject = host.study, subject_of(host.task)
    profiles = {site: profile_of(statistics, subject) for site, statistics in said.items()}
    normalise = getattr(study.task, "normalise", ZScore())
    return Shift(
        study=study.name,
        images=_names(getattr(study.task, "images", ()), subject.channels),
        normalised=normalise.formula(),
        low=LOW,
        high=HIGH,
        sites=profiles,
        distances=distances(profiles),
        landmarks=shared_landmarks(said, study.training_sites, subject),
        failed=dict(failed),
    )


def _names(images: Sequence[str], channels: int) -> tuple[str, ...]:
    """A name for each channel: the file's pattern where each file is one."""
    if len(images) == channels:
        return tuple(images)
    if channels == 3:
        return ("red", "green", "blue")
    return tuple(f"channel {number + 1}" for number in range(channels))


def shared_landmarks(
    said: Mapping[str, SiteStatistics], training: Sequence[str], subject: Subject
) -> SharedLandmarks | None:
    """The mean over the training patients of all sites that give their sums; exact, whatever the order of sites."""
    giving = {s: said[s] for s in training if s in said and "landmarks" in said[s].quantities}
    whole = added(giving, "landmarks")
    if whole is None:
        return None
    means = _mean(whole, subject.quantities["landmarks"]).reshape(subject.channels, len(PERCENTILES))
    values = tuple(tuple(round(float(value), 4) for value in row) for row in means)
    return SharedLandmarks(percentiles=PERCENTILES, values=values, patients=whole.n, sites=tuple(giving))


def profile_of(said: SiteStatistics, subject: Subject) -> SiteProfile:
    """What a site's sums come to."""
    quantities = subject.quantities

    def mean(name: str) -> Floats | None:
        return None if (sums := said.quantities.get(name)) is None else _mean(sums, quantities[name])

    def spreads(name: str) -> tuple[Spread, ...]:
        return () if (sums := said.quantities.get(name)) is None else spread_of(sums, quantities[name])

    noise = spreads("noise")
    intensity, spectrum = mean("intensity"), mean("spectrum")
    shown = said.quantities.keys() & {"intensity", "spectrum", "noise"}
    channels = tuple(
        Channel(
            **({} if intensity is None else _described(intensity.reshape(-1, BINS)[number])),
            spectrum=() if spectrum is None else tuple(map(float, spectrum.reshape(-1, RADII)[number])),
            noise=noise[number] if noise else None,
        )
        for number in range(subject.channels if shown else 0)
    )
    return SiteProfile(
        split=said.split,
        patients=said.patients,
        channels=channels,
        matrix=spreads("matrix"),
        spacing=spreads("spacing"),
        structures={name: drawn for name in subject.structures if (drawn := _drawn(name, spreads)) is not None},
        classes=dict(said.classes),
        withheld=dict(said.withheld),
    )


def _drawn(name: str, spreads: object) -> Drawn | None:
    assert callable(spreads)
    share, slices, volume = (
        next(iter(spreads(f"{what} {name}")), None) for what in ("share of", "slices with", "volume of")
    )
    return (
        None
        if share is None and slices is None and volume is None
        else Drawn(share=share, slices=slices, volume_ml=volume)
    )


def _mean(sums: Sums, quantity: Quantity) -> Floats:
    found: Floats = np.array(sums.total, np.float64) * quantity.step / sums.n
    return found


def spread_of(sums: Sums, quantity: Quantity) -> tuple[Spread, ...]:
    """Mean and standard deviation over patients of each number; 0 of one patient."""
    means = _mean(sums, quantity)
    squares = np.array(sums.squares, np.float64) * quantity.step**2 / sums.n
    variance = np.maximum(squares - np.square(means), 0.0) * (sums.n / max(sums.n - 1, 1))
    return tuple(Spread(mean=float(m), std=float(v**0.5)) for m, v in zip(means, variance, strict=True))


def _described(shares: Floats) -> dict[str, object]:
    """Mean, deviation and percentiles of a histogram; a value lies anywhere in its bin."""
    total = float(shares.sum())
    if total <= 0:
        return {}
    shares = shares / total
    mean = float(shares @ _CENTRES)
    edges = np.concatenate([[0.0], np.cumsum(shares)])
    places = np.interp([each / 100.0 for each in _WANTED], edges, np.linspace(LOW, HIGH, BINS + 1))
    return {
        "histogram": tuple(map(float, shares)),
        "mean": mean,
        "std": float(np.sqrt(shares @ np.square(_CENTRES - mean))),
        "percentiles": {f"p{which}": float(place) for which, place in zip(_WANTED, places, strict=True)},
    }
