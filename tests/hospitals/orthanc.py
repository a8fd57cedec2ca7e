"""A real archive for tests: Orthanc with its DICOMweb plug-in, on loopback, in a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

USER, PASSWORD = "wardround", "loopback-only"
_PLUGIN = next(
    (
        path
        for folder in ("/usr/share/orthanc/plugins", "/usr/lib/orthanc", "/usr/local/share/orthanc/plugins")
        for path in sorted(Path(folder).glob("libOrthancDicomWeb.so*"))
    ),
    None,
)
PROGRAM = shutil.which("Orthanc", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
MISSING = PROGRAM is None or _PLUGIN is None
WHY = "Orthanc is not installed (Debian: apt-get install orthanc orthanc-dicomweb)"


@contextmanager
def orthanc(folder: Path) -> Iterator[str]:
    """Its address while it runs; it is stopped by its process id."""
    folder.mkdir()
    http, dicom = _free_port(), _free_port()
    settings = {
        "Name": "test",
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "index"),
        "Plugins": [str(_PLUGIN)],
        "HttpPort": http,
        "DicomPort": dicom,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(PROGRAM), str(folder / "orthanc.json")], stdout=log, stderr=log)
    address = f"http://127.0.0.1:{http}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError((folder / "log").read_text()[-2000:])
            try:
                send(address, "/system")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        else:
            raise RuntimeError("Orthanc does not answer: " + (folder / "log").read_text()[-2000:])
        yield address
    finally:
        # Its orderly end takes seconds, and what it holds is made up.
        process.kill()
        process.wait(20)


def send(address: str, path: str, body: bytes | None = None) -> bytes:
    """GET, or POST where there is a body, by Orthanc's own interface."""
    request = urllib.request.Request(address + path, data=body)
    manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    manager.add_password(None, address, USER, PASSWORD)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPBasicAuthHandler(manager))
    with opener.open(request, timeout=20) as answer:
        data: bytes = answer.read()
        return data


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
