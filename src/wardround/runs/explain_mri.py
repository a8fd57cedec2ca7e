"""What an MRI study assumes of phase, and how its training scans differ from its scanners': a section of `check`.

Of simulated scans, Cartesian or not, and of raw data.
"""

from __future__ import annotations

from collections.abc import Iterator

from wardround.runs.columns import entry
from wardround.study.acquisition import MRIAcquisition, MRIVariety
from wardround.study.schema import Study

_REAL = (
    "real: the network takes the phase from coil maps that are estimated from the middle of k-space, which halves the "
    "unknowns. Simulated scans with smooth phase gain by it; on real scans phase that the middle does not resolve "
    "(vessels, air, fat, bleeding) becomes an error. For real scanners set model.image: complex"
)
_COMPLEX = "complex: nothing is assumed of the phase"
_COULD_BE_REAL = (
    ". model.image: real halves the unknowns where the phase is as smooth as the middle of k-space resolves, as in "
    "simulated scans without acquisition.phase_detail"
)


def explain_scanners(study: Study) -> str:
    """Phase, references and varied training scans."""
    return "\n".join(("Scans and images", *_lines(study)))


def _lines(study: Study) -> Iterator[str]:
    if not study.model.closed:
        complex_ = _COMPLEX + _COULD_BE_REAL * hasattr(study.model, "image")
        yield entry("images", _REAL if study.model.real_images else complex_)
    scanners = {site: study.acquisition_of(site) for site in study.sites}
    noisy = [site for site, a in scanners.items() if isinstance(a, MRIAcquisition) and a.reference == "scan"]
    if noisy:
        yield entry(
            "references",
            f"at {', '.join(noisy)} the scan with all lines and its noise, which is learned and scored against",
        )
    varied = {site: a.vary for site, a in scanners.items() if isinstance(a, MRIAcquisition) and a.vary is not None}
    for variety in dict.fromkeys(varied.values()):
        sites = ", ".join(
            site for site, each in varied.items() if each == variety and study.sites[site].role == "train"
        )
        if sites:
            yield entry(
                "varied", f"training scans at {sites} are drawn anew, others are as the scanner says: {said(variety)}"
            )


def said(variety: MRIVariety) -> str:
    """What varies, in a line."""
    ranges = {name: getattr(variety, name) for name in type(variety).model_fields}
    return ", ".join(
        f"new tones of {value:.0%}" if name == "tones" else f"{name.replace('_', ' ')} {_ends(value)}"
        for name, value in ranges.items()
        if value not in (None, (), False, 0.0)
    )


def _ends(value: object) -> str:
    if value is True:
        return "in quarters"
    if isinstance(value, tuple):
        text = [each if isinstance(each, str) else f"{each:g}" for each in value]
        return " or ".join(text) if isinstance(value[0], str) else " to ".join(text)
    return f"up to {value:g}"
