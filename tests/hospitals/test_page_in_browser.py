"""The live page in headless Chromium: what its script makes of what the coordinator's process says."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from tests.hospitals.loopback import federated
from tests.hospitals.test_page import _Browser, _page
from tests.toys import toy_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    # What a browser leaves open when it ends is its own.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@contextmanager
def _logged_in(browser: _Browser) -> Iterator[str]:
    """An address on loopback that shows the page as to a person who has logged in, as a site's proxy would."""

    class Forward(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = browser.ask("GET", self.path)
            self.send_response(status)
            for name in ("content-type", "content-security-policy"):
                if name in headers:
                    self.send_header(name, headers[name])
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Forward) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


def _chromium(folder: Path, *options: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=8000", "--window-size=1200,1600"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_the_page_draws_a_finished_study_and_asks_no_other_server(tmp_path: Path) -> None:
    with federated(tmp_path) as made, _page(made.place) as browser:
        made.submit(toy_study(), compare=["local"])
        made.until(lambda s: s.state == "finished")
        token = made.place.token.read_text().strip()
        browser.log_in(token)
        with _logged_in(browser) as where:
            seen = _chromium(tmp_path, "--dump-dom", where)
            picture = tmp_path / "page.png"
            _chromium(tmp_path, f"--screenshot={picture}", where)
    assert "toy" in seen
    assert "finished" in seen.lower()
    assert all(site in seen for site in ("A", "B", "C"))
    assert "<svg" in seen
    assert "<path" in seen or "<polyline" in seen
    assert token not in seen
    with Image.open(picture) as image:
        # More than an empty page: lines, text and a table have many colours.
        assert len(image.convert("RGB").resize((300, 400)).getcolors(1 << 24) or ()) > 20
