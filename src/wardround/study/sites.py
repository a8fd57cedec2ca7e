"""The sites file: where the data of each site lie. It is no part of the study and of no hash."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field, PrivateAttr, field_validator, model_validator

from wardround.errors import StudyError
from wardround.study.archive import Archive
from wardround.study.base import Config
from wardround.study.groups import Groups
from wardround.study.load import validate
from wardround.study.schema import SiteName
from wardround.study.yaml_text import read_yaml

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
Identifiers: TypeAlias = Literal["refuse", "warn", "allow"]
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)\}")


class Egress(Config):
    """What a site lets out besides summed updates."""

    per_site_results: bool = Field(True, description="whether sums over its own test patients leave the site")
    metrics: Literal["all"] | tuple[str, ...] = Field(
        "all",
        description="metrics that may leave; a study that asks for another gets none of them. Of statistics of images "
        "(`site_statistics`) those that it lists leave: intensity, landmarks, spectrum, noise, matrix, spacing, masks, "
        "classes",
    )
    minimum_cohort: int = Field(
        1, ge=1, description="counts and sums over fewer patients are withheld; across hospitals use 11"
    )
    scanner_facts: bool = Field(
        True,
        description="whether a released model's file may list which scanners, tube voltages, slice thicknesses and "
        "kernels the headers of the training images name: as sets, of values that at least `minimum_cohort` patients "
        "have. The site gives them once, in its answer to `facts`, and no update holds them. Also whether statistics "
        "of images hold their resolution",
    )


class SiteData(Config):
    """A site's data folders, one or several, and its rules.

    In the file, `data` and other paths may hold `${VARIABLE}` and `~` and are relative to the file; `load_sites` makes
    them absolute.
    """

    data: tuple[Path, ...] = Field(min_length=1, description="a folder, or a list of them; default: `archive.folder`")
    archive: Archive | None = Field(
        None,
        description="the archive (PACS) from which `wardround site fetch` brings images into a data folder; no study "
        "reaches it. Default: images are there",
    )
    identifiers: Identifiers | None = Field(
        None,
        description="what happens where headers and tables of the data still tell who patients are (`wardround site "
        "lint`): `refuse` takes part in no study, `warn` says so in the log, `allow` does not look. Default: `refuse` "
        "in a federation of hospitals, `allow` where one machine holds all data",
    )
    patients: Path | None = Field(
        None,
        description="a text file with the names of this site's patients, one a line, for a folder that several sites "
        "share (`wardround partition` writes them); default: all patients in `data`",
    )
    egress: Egress = Egress()
    embeddings: Path | None = Field(
        None,
        description="a .npz or .safetensors file with a vector for each patient's folder name, or one named `all`: for "
        "studies with `model.anatomy`; it is read at the site and is in no message",
    )
    groups: Groups | None = Field(
        None,
        description="columns of a table of the site's patients: its results of test patients are given by group, too; "
        "default: they are not",
    )
    start: Path | None = Field(
        None,
        description="the site's own copy of the file that the study starts from (`start` in the study, which names its "
        "hash); default: the study's `start.file`",
    )
    weights: tuple[Path, ...] = Field(
        (),
        description="folders with weights, one or several: where the file that a study starts from is not at its "
        "place, it is searched by its hash here, in the folders of the variable WARDROUND_WEIGHTS and in the Hugging "
        "Face hub's cache of this machine. Nothing is fetched",
    )
    teacher: Path | None = Field(
        None,
        description="the site's own copy of the released model that teaches (`task.teacher` in the study, which names "
        "its hash): the run's folder or the model's file; default: the study's `task.teacher.file`",
    )
    device: str = Field(
        "cpu",
        pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$",
        description="where the site computes: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` for the first CUDA device and "
        "else the CPU. It changes the speed and the last digits",
    )
    precision: Precision = Field(
        "fp32",
        description="what the layers of a network compute in; parameters, losses, metrics, physics and what leaves the "
        "site stay in 32 bits",
    )
    threads: int = Field(
        1, ge=1, description="torch threads of the site on the CPU. Their number changes the speed and the last digits"
    )
    memory: float | None = Field(
        None,
        gt=0.0,
        description="GB that the site's device has for training: a study whose step takes more is refused before it "
        "starts (`wardround plan` says how much it takes); default: it is not looked at",
    )
    lint: bool = Field(
        True, description="whether to refuse, before training, a received model that looks like one built to leak"
    )
    catch_up: int = Field(
        0,
        ge=0,
        description="how many rounds without this site may explain how far a received model moved since it last took "
        "part; that they took place is the coordinator's word. 0: a model that moved further than one round explains "
        "is refused",
    )
    plugins: tuple[str, ...] = Field(
        (),
        description="names of the installed entry points (groups `wardround.tasks`, `wardround.models`, "
        "`wardround.methods`, `wardround.acquisitions`, `wardround.baselines`) whose code a study may have called "
        "here; a study that names another is refused. Also the endings (without the dot) of image files that an "
        "installed reader (group `wardround.readers`) may read",
    )
    encryption_key: str | None = Field(
        None,
        description="`${VARIABLE}` or a file with 32 bytes in hex: encrypts what the site keeps of a run; make one "
        "with `openssl rand -hex 32`",
    )
    quarantine: float = Field(
        0.05,
        ge=0.0,
        le=1.0,
        description="the share of patients that the site goes on without where their files cannot be read or do not "
        "fit together; with more it stops. Tasks that begin with images; every other stops at the first",
    )
    ledger: Path | None = Field(
        None,
        description="the file in which this site counts what its patients' privacy has cost, over all studies; "
        "default: one of the run's own",
    )
    roster_sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="the hash of the list of sites and their keys with which this site sums under masks "
        "(`protection.secure`), as the hospitals compared it; any other list is refused",
    )
    history: Path | None = Field(
        None,
        description="the folder in which this site records, over all studies, which masked rounds it joined and which "
        "patients it measured; default: one of the run's own. Give every study on the same patients the same folder",
    )

    @model_validator(mode="before")
    @classmethod
    def _an_archive_has_a_folder(cls, value: Any) -> Any:
        if isinstance(value, dict) and "data" not in value and isinstance(value.get("archive"), dict):
            folder = value["archive"].get("folder")
            return value if folder is None else {**value, "data": folder}
        return value

    @field_validator("data", "weights", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | Path) else value


class SitesFile(Config):
    """Every site known on this machine."""

    sites: dict[SiteName, SiteData]
    # No key of the file: it is asked for each time, by who starts a run.
    _code: bool = PrivateAttr(default=False)

    @property
    def allows_code(self) -> bool:
        """Whether whatever a study names may be called (`with_code`)."""
        return self._code

    def with_code(self) -> SitesFile:
        """The same sites, on a machine whose owner lets a study name any code (`--allow-code`)."""
        found = self.model_copy()
        found._code = True
        return found

    def of(self, site: str) -> SiteData:
        """Return a site's entry. Raises StudyError where the file does not name the site."""
        if site not in self.sites:
            raise StudyError(f"the sites file has no entry for site {site}; add `sites.{site}.data`")
        return self.sites[site]

    def threads(self, site: str) -> int:
        """On how many threads a site computes; one for a site without an entry."""
        return self.sites[site].threads if site in self.sites else 1

    def key(self, site: str) -> bytes | None:
        """A site's encryption key, read where it is needed and never written: nothing when it has none."""
        entry = self.sites.get(site)
        return None if entry is None or entry.encryption_key is None else _read_key(entry.encryption_key, site)


def load_sites(path: str | Path, *, fetching: bool = False) -> SitesFile:
    """Read a sites file and resolve its folders to absolute paths.

    With `fetching` the folder of an archive need not be there yet. Raises StudyError for unknown keys, a variable that
    is not set and a folder that does not exist, naming the key.

    >>> sites = load_sites("sites.yaml")
    >>> sorted(sites.sites)
    ['Alpha', 'Beta']
    >>> sites.of("Alpha").data[0].is_absolute()
    True
    """
    raw = validate(SitesFile, read_yaml(path, "sites"), "sites", show_values=False)
    base = Path(path).absolute().parent
    return SitesFile(sites={name: _resolved(entry, name, base, fetching) for name, entry in raw.sites.items()})


def _resolved(entry: SiteData, site: str, base: Path, fetching: bool) -> SiteData:
    key, embeddings, ledger = f"sites.{site}", entry.embeddings, entry.ledger
    archive = entry.archive and _resolved_archive(entry.archive, f"{key}.archive", base)
    history, start, patients, groups = entry.history, entry.start, entry.patients, entry.groups
    return entry.model_copy(
        update={
            "encryption_key": _key_place(entry.encryption_key, site, base),
            "data": tuple(_data(path, f"{key}.data", base, archive, fetching) for path in entry.data),
            "archive": archive,
            "patients": patients and _existing(patients, f"{key}.patients", base, folder=False),
            "embeddings": embeddings and _existing(embeddings, f"{key}.embeddings", base, folder=False),
            "groups": groups
            and groups.model_copy(update={"file": _existing(groups.file, f"{key}.groups.file", base, folder=False)}),
            "start": start and _absolute(start, f"{key}.start", base),
            "weights": tuple(_existing(path, f"{key}.weights", base, folder=True) for path in entry.weights),
            "teacher": entry.teacher and _absolute(entry.teacher, f"{key}.teacher", base),
            "ledger": ledger and _absolute(ledger, f"{key}.ledger", base),
            "history": history and _absolute(history, f"{key}.history", base),
        }
    )


def _data(path: Path, key: str, base: Path, archive: Archive | None, fetching: bool) -> Path:
    found = _absolute(path, key, base)
    if archive is None or found != archive.folder or found.is_dir():
        return _existing(path, key, base, folder=True)
    if fetching:
        return found
    raise StudyError(
        f"{key}: the folder of the archive's images does not exist; run `wardround site fetch` first", detail=str(found)
    )


def _resolved_archive(archive: Archive, key: str, base: Path) -> Archive:
    """The archive with absolute paths. Logins are read where they are needed, and never written."""

    def secret(value: str | None, name: str) -> str | None:
        if value is None or _VARIABLE.fullmatch(value):
            return value
        return str(_absolute(Path(value), f"{key}.{name}", base))

    return archive.model_copy(
        update={
            "folder": _absolute(archive.folder, f"{key}.folder", base),
            "keys": archive.keys and _absolute(archive.keys, f"{key}.keys", base),
            "patients": archive.patients and _existing(archive.patients, f"{key}.patients", base, folder=False),
            "ca": archive.ca and _existing(archive.ca, f"{key}.ca", base, folder=False),
            "login": secret(archive.login, "login"),
            "token": secret(archive.token, "token"),
        }
    )


def _existing(path: Path, key: str, base: Path, *, folder: bool) -> Path:
    found = _absolute(path, key, base)
    if not (found.is_dir() if folder else found.is_file()):
        what = "folder" if folder else "file"
        raise StudyError(f"{key}: the {what} does not exist; correct the path", detail=str(found))
    return found


def _absolute(path: Path, key: str, base: Path) -> Path:
    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if not os.environ.get(name):
            raise StudyError(f"{key}: the environment variable {name} is not set; set it or write the path out")
        return os.environ[name]

    try:
        return (base / Path(_VARIABLE.sub(value, str(path))).expanduser()).resolve()
    except RuntimeError as error:
        raise StudyError(f"{key}: `~` has no home folder on this machine; write the path out") from error


def _key_place(place: str | None, site: str, base: Path) -> str | None:
    """Where the key is, for any folder a process works in; it is read once to find mistakes at the start."""
    if place is None:
        return None
    if _VARIABLE.fullmatch(place) is None:
        place = str(_absolute(Path(place), f"sites.{site}.encryption_key", base))
    _read_key(place, site)
    return place


def _read_key(place: str, site: str) -> bytes:
    key = f"sites.{site}.encryption_key"
    variable = _VARIABLE.fullmatch(place)
    try:
        text = os.environ[variable.group(1)] if variable else Path(place).read_text(encoding="ascii")
    except KeyError:
        raise StudyError(f"{key}: the environment variable is not set") from None
    except (OSError, ValueError):
        raise StudyError(f"{key}: the key file cannot be read; correct the path", detail=place) from None
    try:
        value = bytes.fromhex(text.strip())
    except ValueError:
        value = b""
    if len(value) != 32:
        raise StudyError(f"{key}: not a key of 32 bytes in hex (64 digits); make one with `openssl rand -hex 32`")
    return value
