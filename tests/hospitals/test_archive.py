"""Fetching from an archive that fails, lies or attacks: what is kept is whole and names no patient, nor do errors."""

from __future__ import annotations

import json
import logging
import os
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PrivateFormat
from cryptography.x509.oid import NameOID

pytest.importorskip("dicomweb_client", reason="dicomweb-client is not installed (extra dicomweb)")

from tests.hospitals.fake_archive import Fake, encoded, image, read, series, serving
from wardround.errors import DataError, StudyError
from wardround.hospitals.archive import client
from wardround.hospitals.archive.fetch import Fetch, Fetched
from wardround.hospitals.archive.pseudonyms import KEY, TABLE
from wardround.imaging.identifiers.lint import lint_folders
from wardround.imaging.readers.cases import Patterns, sort_cases
from wardround.imaging.readers.dicom_image import read_image_series
from wardround.study.archive import Archive

FLAIR = {"flair": {"Modality": "MR", "SeriesDescription": "*FLAIR*"}}
# What no message may hold.
SECRETS = ("PAT-", "MUELLER", "1.2.999", "ACC77", "19510423", "127.0.0.1", "hunter2")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(client, "_PAUSE", 1)
    monkeypatch.setattr(client, "_CHUNK", 256)
    with serving(Fake()) as server:
        yield server


def _archive(fake: Fake, tmp_path: Path, **changes: Any) -> Archive:
    values = {"url": fake.address, "folder": tmp_path / "cache", "series": FLAIR, "query": {"Modality": "MR"}}
    return Archive.model_validate({**values, **changes})


def _fetch(fake: Fake, tmp_path: Path, **changes: Any) -> Fetched:
    return Fetch(_archive(fake, tmp_path, **changes)).run()


def _patients(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "cache"
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def _told(error: BaseException) -> str:
    return f"{error} {getattr(error, 'detail', '')}"


def _names_none(text: str) -> bool:
    return not any(secret in text for secret in SECRETS)


def test_patients_arrive_whole_without_identifiers_and_are_not_fetched_twice(fake: Fake, tmp_path: Path) -> None:
    for number in (1, 2):
        fake.images += series(f"PAT-{number}", f"1.2.999.{number}")
        fake.images += series(f"PAT-{number}", f"1.2.999.{number}", 2, SeriesDescription="localizer")
    assert _fetch(fake, tmp_path).new == 2

    first = fake.images[0]
    found = _patients(tmp_path)
    assert len(found) == 2
    for folder in found:
        assert [path.name for path in folder.iterdir()] == ["flair"]
        assert len(list((folder / "flair").iterdir())) == 3
        assert read_image_series(folder / "flair").data.shape == (8, 6, 3)
    held = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*.dcm"))
    for secret in (
        b"PAT-",
        b"MUELLER",
        b"HOUSE",
        b"Elsewhere",
        b"ACC77",
        b"19510423",
        b"20200131",
        b"1.2.999.1",
        b"flair",
    ):
        assert secret not in held
    names = [read(path) for path in sorted(found[0].rglob("*.dcm"))]
    assert {one.PatientID for one in names} == {found[0].name}
    assert len({one.SeriesInstanceUID for one in names}) == 1
    pixels = {one.PixelData for one in names}
    assert first.PixelData in pixels
    assert len(sort_cases(tmp_path / "cache", "A", Patterns(images=("flair",))).cases) == 2
    assert not lint_folders([tmp_path / "cache"], everything=True).findings.counts

    asked = len(fake.asked)
    again = _fetch(fake, tmp_path)
    assert (again.new, again.there, again.images) == (0, 2, 0)
    assert len(fake.asked) - asked == 2  # the two pages of the query


def test_the_key_and_the_table_stay_in_a_folder_of_the_sites_own(fake: Fake, tmp_path: Path) -> None:
    fake.images += series("PAT-1", "1.2.999.1")
    _fetch(fake, tmp_path)
    keys = tmp_path / "cache.keys"
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    for name in (KEY, TABLE):
        assert stat.S_IMODE((keys / name).stat().st_mode) == 0o600
    pseudonym = _patients(tmp_path)[0].name
    assert (keys / TABLE).read_text().splitlines()[1] == f"{pseudonym},PAT-1,,1.2.999.1"

    (keys / KEY).unlink()
    with pytest.raises(DataError, match="restore it"):
        _fetch(fake, tmp_path)


def test_a_cut_transfer_goes_on_with_what_is_missing(fake: Fake, tmp_path: Path) -> None:
    fake.images += series("PAT-1", "1.2.999.1", count=4)
    fake.cut = 2 * len(encoded(fake.images[0])) + 400
    first = _fetch(fake, tmp_path)
    assert (first.new, sum(first.again.values()), first.images) == (0, 1, 2)
    assert not _patients(tmp_path)

    fake.cut, fake.asked = None, []
    assert (_fetch(fake, tmp_path)).images == 2
    assert sum("/instances/" in path for path in fake.asked) == 2
    assert len(list(_patients(tmp_path)[0].rglob("*.dcm"))) == 4
    assert not list((tmp_path / "cache" / ".incoming").iterdir())


@pytest.mark.slow
def test_a_killed_fetch_leaves_whole_patients_and_goes_on(fake: Fake, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        fake.images += series(f"PAT-{number}", f"1.2.999.{number}")
    sites = tmp_path / "sites.yaml"
    archive = _archive(fake, tmp_path).model_dump(mode="json", exclude_defaults=True)
    sites.write_text(yaml.safe_dump({"sites": {"A": {"archive": archive}}}))
    command = [sys.executable, "-c", "from wardround.cli import main; main()", "site", "fetch", str(sites)]
    held, reached = threading.Event(), threading.Event()
    counted: list[str] = []

    def hold(path: str, files: list[bytes]) -> list[bytes]:
        counted.append(path)
        if len(counted) == 2:
            reached.set()
            held.wait(60)
        return files

    fake.parts = hold
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert reached.wait(60)
    finally:
        process.kill()
        process.communicate()
        held.set()
    (first,) = _patients(tmp_path)
    assert len(list(first.rglob("*.dcm"))) == 3
    assert len((tmp_path / "cache.keys" / TABLE).read_text().splitlines()) == 2

    fetched = _fetch(fake, tmp_path)
    assert (fetched.there, fetched.new) == (1, 2)
    assert all(len(list(folder.rglob("*.dcm"))) == 3 for folder in _patients(tmp_path))
    assert len((tmp_path / "cache.keys" / TABLE).read_text().splitlines()) == 4
    assert not list(tmp_path.rglob("*.draft"))


def test_a_disk_that_is_full_ends_the_fetch_in_one_error(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.images += series("PAT-1", "1.2.999.1")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(DataError, match="make room"):
        _fetch(fake, tmp_path)
    assert not _patients(tmp_path)


def test_a_transfer_without_its_end_is_not_whole(fake: Fake, tmp_path: Path) -> None:
    fake.images += series("PAT-1", "1.2.999.1", count=2)
    fake.end = b""
    fetched = _fetch(fake, tmp_path)
    assert list(fetched.again) == ["the archive's answer is cut short"]
    assert not _patients(tmp_path)


def test_an_archive_that_fails_for_each_patient_stops_the_fetch(
    fake: Fake, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for number in range(5):
        fake.images += series(f"PAT-{number}", f"1.2.999.{number}")
    fake.status = lambda path: 500 if "/series" in path else 200
    with pytest.raises(DataError, match=r"HTTP 500.*3 patients one after the other") as raised:
        _fetch(fake, tmp_path)
    assert _names_none(_told(raised.value))
    assert _names_none(caplog.text)


def test_one_that_is_busy_is_asked_again(fake: Fake, tmp_path: Path) -> None:
    fake.images += series("PAT-1", "1.2.999.1")
    left = [2]

    def busy(path: str) -> int:
        left[0] -= 1
        return 503 if left[0] >= 0 else 200

    fake.status = busy
    assert _fetch(fake, tmp_path).new == 1


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "refuses the login"), (404, "nothing at this address"), (400, "HTTP 400"), (302, "another address")],
)
def test_a_refusal_is_said_in_words(fake: Fake, tmp_path: Path, status: int, said: str) -> None:
    fake.status, fake.location = lambda path: status, "http://127.0.0.1:9/elsewhere"
    with pytest.raises(DataError, match=said) as raised:
        _fetch(fake, tmp_path)
    assert _names_none(_told(raised.value))


@pytest.mark.parametrize(
    "body",
    [b"<html>", b'"text"', b"[" * 100_000, b'[{"0020000D": {"Value": [["a"]]}}, 5]', b"\xff\xfe", b'{"a": NaN}'],
)
def test_an_answer_that_is_no_listing_is_one_error(fake: Fake, tmp_path: Path, body: bytes) -> None:
    fake.listing = lambda path, _: body
    with pytest.raises(DataError, match="the archive"):
        _fetch(fake, tmp_path)


@pytest.mark.parametrize("uid", ["../../etc/passwd", "1.2/3", "", "1.2\n", "9" * 65])
def test_identifiers_that_are_none_are_not_followed(fake: Fake, tmp_path: Path, uid: str) -> None:
    found = [{"0020000D": {"vr": "UI", "Value": [uid]}, "00100020": {"vr": "LO", "Value": ["PAT-1"]}}]
    fake.listing = lambda path, _: json.dumps(found).encode()
    if uid == "1.2\n":  # space around a value is no part of it
        fake.listing = lambda path, body: json.dumps(found).encode() if path.endswith("/studies") else body
        assert _fetch(fake, tmp_path).new == 0
        return
    with pytest.raises(DataError, match="that is none") as raised:
        _fetch(fake, tmp_path)
    assert _names_none(_told(raised.value))


@pytest.mark.parametrize("patient", ["../../PAT-1", "PAT-1\\..", "PAT-1=CMD()", "Müller / Anna", "*"])
def test_a_number_of_a_patient_names_no_folder(fake: Fake, tmp_path: Path, patient: str) -> None:
    fake.images += series(patient, "1.2.999.1", SpecificCharacterSet="ISO_IR 192")
    assert _fetch(fake, tmp_path).new == 1
    assert all(path.name.startswith("p-") and path.name[2:].isalpha() for path in _patients(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "cache.keys"}


def test_listings_and_images_that_are_too_large_are_refused(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.images += series("PAT-1", "1.2.999.1")
    monkeypatch.setattr(client, "IMAGE", 500)
    assert list(_fetch(fake, tmp_path).left_out) == ["the archive's answer is larger than any that is taken"]
    monkeypatch.setattr(client, "ANSWER", 100)
    with pytest.raises(DataError, match="larger than any"):
        _fetch(fake, tmp_path)


def test_a_deflated_file_is_not_unpacked(fake: Fake, tmp_path: Path) -> None:
    fake.images += series("PAT-1", "1.2.999.1")
    fake.parts = lambda path, files: [
        file.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99", 1) for file in files
    ]
    assert "deflated" in next(iter(_fetch(fake, tmp_path).left_out))


def test_an_image_of_another_patient_is_not_taken(fake: Fake, tmp_path: Path) -> None:
    fake.images += series("PAT-1", "1.2.999.1")
    other = encoded(image("PAT-2", "1.2.999.1", "1.2.999.1.1", 1))
    fake.parts = lambda path, files: [*files[:1], other]
    assert "another patient" in next(iter(_fetch(fake, tmp_path).left_out))
    assert not _patients(tmp_path)
    assert not list((tmp_path / "cache" / ".incoming").iterdir())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"PixelData": b"\0" * 20}, "fewer pixels"),
        ({"BurnedInAnnotation": "YES"}, "shows text"),
        ({"Rows": 60_000}, "fewer pixels"),
    ],
)
def test_images_that_are_cut_or_show_text_leave_the_patient_out(
    fake: Fake, tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    fake.images += series("PAT-1", "1.2.999.1", **values)
    fetched = _fetch(fake, tmp_path)
    assert said in next(iter({**fetched.left_out, **fetched.again}))
    assert not _patients(tmp_path)


def test_random_bytes_in_place_of_an_image_are_one_error(fake: Fake, tmp_path: Path) -> None:
    fake.images += series("PAT-1", "1.2.999.1")
    fake.parts = lambda path, files: [os.urandom(2000) for _ in files]
    assert list(_fetch(fake, tmp_path).again) == ["the archive's answer is not DICOMweb, or cut short"]


def test_a_patient_without_exactly_one_series_is_left_out(fake: Fake, tmp_path: Path) -> None:
    fake.images += series("PAT-1", "1.2.999.1") + series("PAT-1", "1.2.999.1", 2)
    fake.images += series("PAT-2", "1.2.999.2", SeriesDescription="t1")
    assert sorted(_fetch(fake, tmp_path).left_out) == [
        "no study with all series of `archive.series`",
        "several series of one study fit the same entry of `archive.series`; make it narrower",
    ]


def test_the_first_or_the_last_study_of_a_patient_is_taken(fake: Fake, tmp_path: Path) -> None:
    fake.images += series("PAT-1", "1.2.999.1", count=2, StudyDate="20210101")
    fake.images += series("PAT-1", "1.2.999.2", count=3, StudyDate="20190101")
    fake.images += series("PAT-1", "1.2.999.3", count=4, StudyDate="20220101")
    for which, count in (("first", 3), ("last", 4)):
        folder = tmp_path / which
        _fetch(fake, tmp_path, folder=folder, study=which)
        assert len(list(folder.rglob("flair/*.dcm"))) == count


def test_a_list_of_patients_is_taken_by_the_letter(fake: Fake, tmp_path: Path) -> None:
    for number, patient in enumerate(("PAT-1", "PAT-12", "PAT-3")):
        fake.images += series(patient, f"1.2.999.{number}")
    (tmp_path / "list.txt").write_text("PAT-1*\nPAT-3\n")
    fetched = _fetch(fake, tmp_path, patients=tmp_path / "list.txt", query={})
    assert fetched.new == 1


def test_limits_end_the_fetch(fake: Fake, tmp_path: Path) -> None:
    for number in range(3):
        fake.images += series(f"PAT-{number}", f"1.2.999.{number}")
    with pytest.raises(StudyError, match="more than 2 studies"):
        _fetch(fake, tmp_path, studies=2)
    with pytest.raises(DataError, match=r"archive\.gb"):
        _fetch(fake, tmp_path, gb=3e-6)
    assert len(_patients(tmp_path)) < 3


def test_an_archive_that_ignores_pages_is_asked_no_more(fake: Fake, tmp_path: Path) -> None:
    fake.images += series("PAT-1", "1.2.999.1")
    fake.deaf = True
    assert _fetch(fake, tmp_path).new == 1


def test_a_login_comes_from_a_variable_or_a_file_of_the_users_own(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PACS", "reader:hunter2")
    _fetch(fake, tmp_path, login="${PACS}")
    assert fake.logins[-1].startswith("Basic ")
    token = tmp_path / "token"
    token.write_text("abc\n")
    token.chmod(0o644)
    with pytest.raises(StudyError, match="chmod 600"):
        _fetch(fake, tmp_path, token=str(token))
    token.chmod(0o600)
    _fetch(fake, tmp_path, token=str(token))
    assert fake.logins[-1] == "Bearer abc"
    monkeypatch.setenv("PACS", "hunter2")
    with pytest.raises(StudyError, match="user:password") as raised:
        _fetch(fake, tmp_path, login="${PACS}")
    assert _names_none(_told(raised.value))


def _certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server's certificate for loopback, signed by its own key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "archive")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    authority = folder / "archive.crt"
    authority.write_bytes(made.public_bytes(Encoding.PEM))
    (folder / "archive.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority, folder / "archive.key")
    return context, authority


def test_an_archives_certificate_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PAUSE", 1)
    context, authority = _certificate(tmp_path)
    with serving(Fake(images=series("PAT-1", "1.2.999.1")), context) as fake:
        with pytest.raises(DataError, match=r"certificate is not trusted.*archive\.ca"):
            _fetch(fake, tmp_path)
        assert _fetch(fake, tmp_path, ca=authority).new == 1


def test_dates_are_moved_by_as_many_days_for_all_of_a_patient(fake: Fake, tmp_path: Path) -> None:
    fake.images += series("PAT-1", "1.2.999.1", AcquisitionDate="20200202", AcquisitionTime="0930")
    _fetch(fake, tmp_path, dates="shift")
    one = read(next(_patients(tmp_path)[0].rglob("*.dcm")))
    assert one.StudyDate < "20200131"
    assert one.AcquisitionTime == "0930"
    assert not one.PatientBirthDate
    assert one.LongitudinalTemporalInformationModified == "MODIFIED"
    assert [code.CodeValue for code in one.DeidentificationMethodCodeSequence] == ["113100", "113107"]


def test_one_fetch_at_a_time(fake: Fake, tmp_path: Path) -> None:
    fetch = Fetch(_archive(fake, tmp_path))
    with fetch._pseudonyms.locked(), pytest.raises(DataError, match="at work"):
        fetch.run()
