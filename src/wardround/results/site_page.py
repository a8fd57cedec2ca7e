"""A site's own page of a study: pictures of its patients, which no coordinator's report has, and the model's card."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from markupsafe import Markup

from wardround.results.html import resource, template
from wardround.results.pictures import ERROR_GAIN, own_gallery
from wardround.study.hashes import study_sha256
from wardround.study.schema import Study
from wardround.wire.files import write_text

PAGE = "report.html"
_CARD = "model_card.md"
_MODEL = Path("models") / "federated.safetensors"
# A longer card is none of ours.
_LONGEST_CARD = 1 << 20


def write_site_page(folder: Path, site: str, study: Study) -> Path:
    """Write `report.html` into a site's own folder of a study, from what lies there, and return its path.

    Reads the site's pictures, and the card if the released model came already. Raises `OSError` where the disk refuses.
    """
    path = folder / PAGE
    write_text(path, site_page(folder, site, study))
    return path


def site_page(folder: Path, site: str, study: Study) -> str:
    """The page: one file, readable without JavaScript and without a network."""
    card = ""
    with suppress(OSError), (folder / _CARD).open(encoding="utf-8", errors="replace") as file:
        card = file.read(_LONGEST_CARD)
    return template("pictures.html", "site_page.html").render(
        css=Markup(resource("style.css")),  # ours, not a result's
        site=site,
        study=study,
        study_sha256=study_sha256(study),
        model=str(_MODEL) if (folder / _MODEL).is_file() else "",
        gallery=own_gallery(folder, site),
        error_gain=ERROR_GAIN,
        card=card,
    )
