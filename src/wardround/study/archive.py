"""Where a site's images are fetched from: an archive (PACS) that speaks DICOMweb. In a site's entry, in no study."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from wardround.study.base import Config

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def _keyword(name: str) -> str:
    from pydicom.datadict import tag_for_keyword

    if tag_for_keyword(name) is None:
        raise ValueError("not a DICOM keyword; write it as in the standard's dictionary: `StudyDate`, `Modality`")
    return name


Keyword = Annotated[str, AfterValidator(_keyword)]
#: A folder within each patient's; studies name it in their patterns.
SeriesName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
# YAML reads a date of digits as a number.
Wanted = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if type(value) is int else value),
    Field(min_length=1, max_length=256),
]


class Archive(Config):
    """What `wardround site fetch` asks of an archive by DICOMweb, and where it puts the answer."""

    url: str = Field(
        description="the root of the archive's DICOMweb service, as in `https://pacs.example.org/dicom-web`"
    )
    folder: Path = Field(
        description="where the images are kept, a folder a patient; without `data` it is the site's data folder"
    )
    series: dict[SeriesName, dict[Keyword, Wanted]] = Field(
        min_length=1,
        max_length=16,
        description="the series of a patient, each with the folder that it gets: "
        "`{flair: {Modality: MR, SeriesDescription: '*flair*'}}`. `*` and `?` stand for any text and any letter, and "
        "capitals do not count. A patient is fetched who has one study with exactly one series for each",
    )
    query: dict[Keyword, Wanted] = Field(
        default_factory=dict,
        description="which studies are looked for, as the archive takes it: "
        "`{ModalitiesInStudy: MR, StudyDate: 20200101-20231231}`",
    )
    patients: Path | None = Field(
        None, description="a text file of PatientIDs, one a line: of these alone studies are looked for"
    )
    study: Literal["first", "last"] = Field(
        "first", description="which study of a patient is taken where several have all series: by their date and time"
    )
    dates: Literal["remove", "shift"] = Field(
        "remove",
        description="what becomes of dates: removed with the times, or moved back by 1 to 3650 days, by another number "
        "for each patient",
    )
    keys: Path | None = Field(
        None,
        description="the folder of the key that pseudonyms are made with, and of the table that says whose they are; "
        "both stay at the site. Default: beside `folder`, with `.keys` after its name",
    )
    login: str | None = Field(
        None, description="`${VARIABLE}` or a file that only this user may read, with `user:password`"
    )
    token: str | None = Field(
        None, description="`${VARIABLE}` or such a file with a token that is sent as `Authorization: Bearer`"
    )
    ca: Path | None = Field(
        None, description="a file with the certificates (PEM) that the archive's is checked against; default: the usual"
    )
    plain_http: bool = Field(
        False, description="whether `http:` may reach another machine: patients' names then cross the network in clear"
    )
    studies: int = Field(1000, ge=1, le=1_000_000, description="the most studies that the query may find")
    gb: float = Field(100.0, gt=0.0, description="the most GB that `folder` may come to hold")
    timeout: float = Field(60.0, gt=0.0, description="seconds until an archive that says nothing is given up")

    @model_validator(mode="after")
    def _can_be_reached(self) -> Archive:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError("`url`: not of the form https://HOST/PATH")
        if parts.username or parts.password:
            raise ValueError("`url`: holds a login; give it as `login`")
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK and not self.plain_http:
            raise ValueError("`url`: `http:` sends patients' names in clear; use `https:`, or set `plain_http: true`")
        if self.login is not None and self.token is not None:
            raise ValueError("give `login` or `token`, not both")
        if not self.query and self.patients is None:
            raise ValueError("give `query` or `patients`: without either all patients of the archive would be fetched")
        if any(re.search(r"[\x00-\x1f\\]", value) for value in self.query.values()):
            raise ValueError("`query`: a value holds a control character or a backslash")
        return self

    @property
    def keys_folder(self) -> Path:
        """Where key and table of the pseudonyms are."""
        return self.keys or self.folder.with_name(f"{self.folder.name}.keys")
