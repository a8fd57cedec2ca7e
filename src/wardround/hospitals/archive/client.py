"""The archive's end of the line: what is asked by QIDO-RS and WADO-RS, with limits, and errors that name no patient."""

from __future__ import annotations

import logging
import os
import re
import stat
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom.datadict import tag_for_keyword
from pydicom.dataset import FileDataset

from wardround.errors import DataError, MissingExtra, StudyError, WardroundError
from wardround.study.archive import Archive

_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)\}")
_PAGE = 200
_MOST_INSTANCES = 20_000
_MOST_SERIES = 5_000
#: The most bytes of an answer to a question, of one image, and of a series of them.
ANSWER, IMAGE, SERIES = 1 << 26, 1 << 29, 1 << 35
_CHUNK = 1 << 18
# Its file is unpacked whole before its size is known.
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_AS_STORED = (("application/dicom", "*"),)
_NO_ANSWER = "the archive's answer is not DICOMweb, or cut short"
_ATTEMPTS, _PAUSE = 3, 500  # of a busy archive; milliseconds, doubled each time


class Unreachable(DataError):
    """The archive did not answer, or not as DICOMweb says; asking again may help."""


class Refused(DataError):
    """What the archive sent is not taken; asking again does not help."""


@dataclass(frozen=True)
class FoundStudy:
    """A study of the archive. All of it stays at the site."""

    uid: str
    patient: str
    issuer: str
    when: str


@dataclass(frozen=True)
class FoundSeries:
    """A series of a study, with the values (by keyword) that the archive says of it."""

    uid: str
    values: Mapping[str, tuple[str, ...]]


class DicomWeb:
    """An archive. Raises `Unreachable` for what may pass, `Refused` for what will not, `MissingExtra` and `StudyError`.

    No message holds an address, an identifier or a text of the archive's.
    """

    def __init__(self, archive: Archive) -> None:
        try:
            import requests
            from dicomweb_client.web import DICOMwebClient
        except ModuleNotFoundError as error:
            raise MissingExtra("fetching images by DICOMweb", "dicomweb") from error
        # They name patients and studies in what they log.
        for name in ("dicomweb_client", "pydicom", "requests", "urllib3"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        session = requests.Session()
        # No proxy, login or certificate of this user's other programs.
        session.trust_env = False
        session.max_redirects = 0
        session.get_adapter("https://").send = _plain(session.get_adapter("https://").send)
        session.get_adapter("http://").send = _plain(session.get_adapter("http://").send)
        session.headers["Accept-Encoding"] = "identity"
        session.verify = True if archive.ca is None else str(archive.ca)
        if archive.login is not None:
            user, colon, password = secret_of(archive.login, "login").partition(":")
            if not colon:
                raise StudyError("archive.login: not of the form user:password")
            session.auth = (user, password)
        elif archive.token is not None:
            session.headers["Authorization"] = f"Bearer {secret_of(archive.token, 'token')}"
        self._session = session
        self._most = ANSWER
        self._client = DICOMwebClient(
            archive.url.rstrip("/"),
            session=session,
            callback=self._bounded,
            chunk_size=_CHUNK,
            timeout=archive.timeout,
        )
        self._client.set_http_retry_params(max_attempts=_ATTEMPTS, wait_exponential_multiplier=_PAUSE)

    def close(self) -> None:
        """Close the connection."""
        self._session.close()

    def studies(self, query: Mapping[str, str], most: int) -> Iterator[FoundStudy]:
        """The studies that a query finds; raises `StudyError` beyond `most`."""
        fields = ["PatientID", "IssuerOfPatientID", "StudyDate", "StudyTime"]

        def ask(offset: int) -> list[Any]:
            found: list[Any] = self._client.search_for_studies(
                limit=_PAGE, offset=offset, fields=fields, search_filters=dict(query)
            )
            return found

        for count, found in enumerate(self._paged(ask, "StudyInstanceUID")):
            if count >= most:
                raise StudyError(
                    f"archive: the query finds more than {most:,} studies; ask for fewer, or raise `archive.studies`"
                )
            when = _one(found, "StudyDate") + _one(found, "StudyTime")
            uid, patient = _one(found, "StudyInstanceUID"), _one(found, "PatientID")
            yield FoundStudy(uid, patient, _one(found, "IssuerOfPatientID"), when)

    def series(self, study: str, keywords: Sequence[str]) -> list[FoundSeries]:
        """The series of a study, with what the archive says of these keywords."""

        def ask(offset: int) -> list[Any]:
            found: list[Any] = self._client.search_for_series(study, limit=_PAGE, offset=offset, fields=list(keywords))
            return found

        listed = self._paged(ask, "SeriesInstanceUID", _MOST_SERIES)
        return [
            FoundSeries(_one(found, "SeriesInstanceUID"), {name: _values(found, name) for name in keywords})
            for found in listed
        ]

    def instances(self, study: str, series: str) -> list[str]:
        """The identifiers of a series' images."""

        def ask(offset: int) -> list[Any]:
            found: list[Any] = self._client.search_for_instances(study, series, limit=_PAGE, offset=offset)
            return found

        return [_one(found, "SOPInstanceUID") for found in self._paged(ask, "SOPInstanceUID", _MOST_INSTANCES)]

    def images(self, study: str, series: str) -> Generator[FileDataset]:
        """All images of a series, one after the other, as the archive has them stored."""
        with _guard():
            self._most = SERIES
            found = iter(self._client.iter_series(study, series, media_types=_AS_STORED))
        while True:
            with _guard():
                image = next(found, None)
            if image is None:
                return
            yield image

    def image(self, study: str, series: str, instance: str) -> FileDataset:
        """One image."""
        with _guard():
            self._most = IMAGE
            found: FileDataset = self._client.retrieve_instance(study, series, instance, media_types=_AS_STORED)
            return found

    def _paged(self, ask: Callable[[int], list[Any]], key: str, most: int | None = None) -> Iterator[Mapping[str, Any]]:
        """All that is found, page by page; an archive that ignores the page's number gives nothing new."""
        seen: set[str] = set()
        while True:
            with _guard():
                self._most = ANSWER
                page = ask(len(seen))
            if not all(isinstance(found, dict) for found in page):
                raise Unreachable(_NO_ANSWER)
            new = [found for found in page if _one(found, key) not in seen]
            for found in new:
                uid = _one(found, key)
                if len(uid) > 64 or not _UID.fullmatch(uid):
                    raise Refused(f"the archive names a {key} that is none")
                if uid not in seen:
                    seen.add(uid)
                    yield found
                if most is not None and len(seen) > most:
                    raise Refused(
                        f"the archive lists more than {most:,} of a kind where one series or study is asked for"
                    )
            if not new:
                return

    def _bounded(self, response: Any, *_: Any, **__: Any) -> Any:
        """Let an answer come to so many bytes and no more, before any of it is kept."""
        if 300 <= response.status_code < 400:
            raise Refused("the archive sends to another address, and that is not followed; correct `archive.url`")
        response.iter_content = _Bounds(response, self._most).chunks
        return response


@dataclass
class _Bounds:
    """The bytes of an answer: no more than `most`, of a part no more than an image's, and to the last one."""

    response: Any
    most: int

    def __post_init__(self) -> None:
        self._chunks = self.response.iter_content
        kind = str(self.response.headers.get("Content-Type", ""))
        found = re.search(r'boundary="?([^";]+)', kind)
        self._mark = f"--{found.group(1)}".encode() if found and kind.lower().startswith("multipart/") else b""

    def chunks(self, chunk_size: int = 1, decode_unicode: bool = False) -> Iterator[bytes]:
        total = part = 0
        tail = b""
        for chunk in self._chunks(chunk_size=chunk_size):
            joined = tail + chunk
            if _DEFLATED in joined:
                raise Refused("the archive sends deflated DICOM, which is not taken; let it send another encoding")
            at = joined.rfind(self._mark) if self._mark else -1
            part = len(joined) - at if at >= 0 else part + len(chunk)
            total += len(chunk)
            if total > self.most or part > IMAGE:
                raise Refused("the archive's answer is larger than any that is taken")
            tail = joined[-256:]
            yield chunk
        if self._mark and not tail.rstrip().endswith(self._mark + b"--"):
            raise Unreachable("the archive's answer is cut short")


def _plain(send: Callable[..., Any]) -> Callable[..., Any]:
    """Send `*` and `?` of a query as they are, as RFC 3986 permits: some archives (Orthanc 1.10) decode nothing."""

    def sends(request: Any, *arguments: Any, **options: Any) -> Any:
        path, mark, query = request.url.partition("?")
        request.url = path + mark + query.replace("%2A", "*").replace("%3F", "?")
        return send(request, *arguments, **options)

    return sends


@contextmanager
def _guard() -> Iterator[None]:
    """Turn whatever the client, the network or a parser raises into an error in fixed words."""
    import requests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # pydicom only warns of a file that ends too early.
        warnings.filterwarnings("error", message="End of file")
        try:
            yield
        except WardroundError:
            raise
        except requests.exceptions.HTTPError as error:
            raise _of_status(0 if error.response is None else error.response.status_code) from None
        except requests.exceptions.SSLError:
            raise Refused("the archive's certificate is not trusted; name its authority's as `archive.ca`") from None
        except requests.exceptions.Timeout:
            raise Unreachable("the archive does not answer in time (`archive.timeout`)") from None
        except (requests.exceptions.RequestException, OSError):
            raise Unreachable("the archive cannot be reached, or the connection is cut") from None
        # An answer of other bytes than DICOMweb's makes the client and pydicom raise nearly every class of error.
        except Exception as error:
            if type(error).__name__ == "RetryError":
                raise Unreachable("the archive is busy, and stayed so when it was asked again") from None
            raise Unreachable(
                "the archive's answer is not DICOMweb, or cut short", detail=type(error).__name__
            ) from None


def _of_status(status: int) -> DataError:
    match status:
        case 401 | 403:
            return Unreachable("the archive refuses the login; see `archive.login` and `archive.token`")
        case 404:
            return Refused("the archive has nothing at this address; see `archive.url`")
        case 406 | 415:
            return Refused("the archive cannot send an image as it is stored")
        case _ if 400 <= status < 500 and status not in (408, 429):
            return Refused(f"the archive refuses what it is asked (HTTP {status}); see `archive.query`")
        case _:
            return Unreachable(f"the archive has a fault of its own (HTTP {status})")


def secret_of(place: str, name: str) -> str:
    """A login or token: of a variable, or of a file that no other user may read. Raises StudyError; never shows it."""
    key, variable = f"archive.{name}", _VARIABLE.fullmatch(place)
    if variable is not None:
        value = os.environ.get(variable.group(1), "")
    else:
        try:
            if stat.S_IMODE(os.stat(place).st_mode) & 0o077:
                raise StudyError(f"{key}: other users may read the file; `chmod 600` it", detail=place)
            value = Path(place).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise StudyError(f"{key}: the file cannot be read; correct the path", detail=place) from None
    value = value.strip()
    if not value or not value.isprintable():
        raise StudyError(f"{key}: empty, or more than one line")
    return value


def _values(found: Mapping[str, Any], keyword: str) -> tuple[str, ...]:
    """What an answer (DICOM JSON, PS3.18 F.2) says of a keyword, as texts."""
    element = found.get(f"{tag_for_keyword(keyword) or 0:08X}")
    values = element.get("Value") if isinstance(element, dict) else None
    texts: list[str] = []
    for value in values if isinstance(values, list) else []:
        if isinstance(value, dict):
            value = value.get("Alphabetic")
        if isinstance(value, str | int | float):
            texts.append(str(value).strip()[:1024])
    return tuple(texts)


def _one(found: Mapping[str, Any], keyword: str) -> str:
    values = _values(found, keyword)
    return values[0] if values else ""
