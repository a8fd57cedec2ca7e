"""An archive that does what no real one does on request: a small DICOMweb server in this process, on loopback."""

from __future__ import annotations

import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

MR = "1.2.840.10008.5.1.4.1.1.4"
_NAMES = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
_BOUNDARY = b"edge"


def image(patient: str, study: str, series: str, number: int, **values: Any) -> FileDataset:
    """A slice of an MR series as a scanner writes it, with all that tells who the patient is."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MR
    made = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    made.SOPClassUID, made.Modality = MR, "MR"
    made.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = generate_uid()
    made.PatientID, made.PatientName, made.PatientBirthDate = patient, "MUELLER^ANNA", "19510423"
    made.StudyInstanceUID, made.SeriesInstanceUID, made.FrameOfReferenceUID = study, series, f"{study}.9"
    made.StudyDate, made.StudyTime, made.AccessionNumber = "20200131", "101500", "ACC778899"
    made.InstitutionName, made.ReferringPhysicianName = "St. Elsewhere", "HOUSE^GREGORY"
    made.SeriesDescription, made.InstanceNumber = "ax flair", number
    made.add_new(0x00290010, "LO", "SIEMENS CSA HEADER")
    made.add_new(0x00291010, "OB", b"MUELLER")
    made.ImageOrientationPatient, made.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 3.0 * number]
    made.PixelSpacing, made.SliceThickness = [1, 1], "3"
    made.Rows, made.Columns, made.SamplesPerPixel = 8, 6, 1
    made.PhotometricInterpretation, made.PixelRepresentation = "MONOCHROME2", 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 12, 11
    made.PixelData = np.random.default_rng(number).integers(0, 900, (8, 6)).astype("<u2").tobytes()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def encoded(dataset: FileDataset) -> bytes:
    """The bytes of a file."""
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


@dataclass
class Fake:
    """What the server holds, and how it misbehaves: `status`, `listing` and `parts` change its answers."""

    images: list[FileDataset] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    logins: list[str] = field(default_factory=list)
    status: Callable[[str], int] = lambda path: 200
    listing: Callable[[str, bytes], bytes] = lambda path, body: body
    parts: Callable[[str, list[bytes]], list[bytes]] = lambda path, files: files
    end: bytes = b"--"
    cut: int | None = None
    location: str = ""
    deaf: bool = False  # to limit and offset
    address: str = ""

    def search(self, path: str, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        level = path.count("/") // 2
        asked = [part for part in path.split("/") if re.match(r"[\d.]+$", part)]
        found: dict[str, dict[str, Any]] = {}
        for held in self.images:
            if [str(held.get(name)) for name in _NAMES[: len(asked)]] != asked:
                continue
            wanted = query.get("PatientID", [""])[0]
            if wanted and not re.fullmatch(wanted.replace("*", ".*"), held.PatientID):
                continue
            names = (*_NAMES[: level + 1], "PatientID", "StudyDate", "StudyTime", "Modality", "SeriesDescription")
            found[str(held.get(_NAMES[level]))] = {
                f"{tag_for_keyword(name):08X}": {"vr": "LO", "Value": [str(held.get(name))]} for name in names
            }
        if self.deaf:
            return list(found.values())
        start = int(query.get("offset", ["0"])[0])
        return list(found.values())[start : start + int(query.get("limit", ["1000"])[0])]

    def files(self, path: str) -> list[bytes]:
        asked = re.findall(r"/[\d.]+", path)
        wanted = [part[1:] for part in asked]
        held = [one for one in self.images if [str(one.get(name)) for name in _NAMES[: len(wanted)]] == wanted]
        return self.parts(path, [encoded(one) for one in held])


@contextmanager
def serving(fake: Fake, context: ssl.SSLContext | None = None) -> Iterator[Fake]:
    """The fake while it answers, by TLS with a `context`."""
    import json

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is said."""

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            path = parts.path.removeprefix("/dicom-web")
            fake.asked.append(path)
            fake.logins.append(self.headers.get("Authorization", ""))
            status = fake.status(path)
            if status != 200:
                self.send_response(status)
                if fake.location:
                    self.send_header("Location", fake.location)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif "multipart" in self.headers.get("Accept", ""):
                files = fake.files(path)
                body = b"".join(
                    b"\r\n--" + _BOUNDARY + b"\r\nContent-Type: application/dicom\r\n\r\n" + one for one in files
                )
                body += b"\r\n--" + _BOUNDARY + fake.end
                self._send('multipart/related; type="application/dicom"; boundary=edge', body)
            else:
                body = fake.listing(path, json.dumps(fake.search(path, parse_qs(parts.query))).encode())
                self._send("application/dicom+json", body)

        def _send(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if fake.cut is not None and kind.startswith("multipart") and len(body) > fake.cut:
                self.wfile.write(body[: fake.cut])
                self.close_connection = True
                return
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    fake.address = f"http{'' if context is None else 's'}://127.0.0.1:{server.server_port}/dicom-web"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def series(patient: str, study: str, number: int = 1, count: int = 3, **values: Any) -> list[FileDataset]:
    """The slices of a series."""
    return [image(patient, study, f"{study}.{number}", n, **values) for n in range(1, count + 1)]


def read(path: Any) -> FileDataset:
    """A file."""
    return pydicom.dcmread(path)
