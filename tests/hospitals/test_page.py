"""The live page: who may see it, what a browser may do with it, and what it shows. Served on loopback."""

from __future__ import annotations

import http.client
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import pytest

from tests.hospitals.loopback import federated, make_federation
from tests.toys import toy_study
from wardround.errors import StudyError, WardroundError
from wardround.hospitals.folders import CoordinatorFolder, StudyFolder
from wardround.hospitals.page.access import Access, page_token
from wardround.hospitals.page.data import PageData
from wardround.hospitals.page.server import parse_address, serve_page


@contextmanager
def _page(folder: CoordinatorFolder, **how: Any) -> Iterator[_Browser]:
    pytest.importorskip("fastapi", reason="FastAPI is not installed (wardround[page])")
    pytest.importorskip("uvicorn", reason="uvicorn is not installed (wardround[page])")
    said: list[str] = []
    with serve_page(folder, "127.0.0.1:0", say=said.append, **how) as where:
        yield _Browser(where, said)


class _Browser:
    def __init__(self, where: str, said: list[str]) -> None:
        self._port, self.said = urlsplit(where).port, said
        self.cookie = ""

    def ask(self, method: str, path: str, form: dict[str, str] | None = None) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=20.0)
        try:
            headers = {"Cookie": self.cookie} if self.cookie else {}
            connection.request(method, path, None if form is None else urlencode(form), headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def log_in(self, token: str) -> tuple[int, dict[str, str], bytes]:
        status, headers, body = self.ask("POST", "/login", {"token": token})
        if "set-cookie" in headers:
            self.cookie = headers["set-cookie"].partition(";")[0]
        return status, headers, body

    def json(self, path: str) -> Any:
        status, _, body = self.ask("GET", path)
        return json.loads(body) if status == 200 else status


@pytest.fixture
def place(tmp_path: Path) -> CoordinatorFolder:
    return make_federation(tmp_path)


def test_without_the_password_there_is_nothing_to_see(place: CoordinatorFolder) -> None:
    with _page(place) as browser:
        status, _, body = browser.ask("GET", "/")
        assert status == 200
        assert b"Password" in body
        assert b"page.js" not in body
        for path in ("/api/status", "/api/studies/toy/curves", "/api/studies/toy/tests"):
            assert browser.ask("GET", path)[0] == 401
        assert browser.ask("GET", "/studies/toy/model")[0] == 303
        for path in ("/docs", "/openapi.json", "/../federation.yaml", "/page.token", "/status.json"):
            assert browser.ask("GET", path)[0] == 404
        browser.cookie = "wardround=guess"
        assert browser.ask("GET", "/api/status")[0] == 401


def test_every_answer_says_what_a_browser_may_do_with_it(place: CoordinatorFolder) -> None:
    with _page(place) as browser:
        for path in ("/", "/page.css", "/page.js", "/api/status", "/nowhere"):
            _, headers, _ = browser.ask("GET", path)
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert headers["x-frame-options"] == "DENY"
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"
            assert not [name for name in headers if name.startswith("access-control")]
            assert "server" not in headers


def test_the_password_opens_the_page_until_it_is_left(place: CoordinatorFolder) -> None:
    with _page(place) as browser:
        token = place.token.read_text().strip()
        assert any(token in line for line in browser.said)
        assert stat.S_IMODE(place.token.stat().st_mode) == 0o600
        status, headers, _ = browser.log_in(token)
        assert status == 303
        assert "httponly" in headers["set-cookie"].lower()
        assert "samesite=strict" in headers["set-cookie"].lower()
        assert token not in headers["set-cookie"]
        # Nothing runs yet, and the page works.
        assert browser.json("/api/status") | {"now": 0} == {"now": 0, "alive": False, "status": None}
        assert b"page.js" in browser.ask("GET", "/")[2]
        assert browser.ask("POST", "/logout")[0] == 303
        assert browser.ask("GET", "/api/status")[0] == 401
    with _page(place) as browser:
        assert not any(token in line for line in browser.said)


def test_who_guesses_waits(place: CoordinatorFolder) -> None:
    with _page(place) as browser:
        assert browser.log_in("wrong")[0] == 403
        status, headers, _ = browser.log_in(place.token.read_text().strip())
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        # A form of any size is not kept.
        assert browser.ask("POST", "/login", {"token": "x" * 100_000})[0] in (403, 429)


def test_guesses_are_slowed_more_and_more_by_client() -> None:
    now = [100.0]
    access = Access("right", clock=lambda: now[0])
    for pause in (1.0, 2.0, 4.0):
        assert access.open("a", "wrong") is None
        assert access.pause("a") == pause
        assert access.open("a", "right") is None
        now[0] += pause
    assert access.pause("b") == 0.0
    session = access.open("a", "right")
    assert session is not None
    assert access.is_open(session)
    assert access.open("a", "wrong") is None
    assert access.pause("a") == 1.0
    now[0] += 13 * 3600.0
    assert not access.is_open(session)
    assert not access.is_open("")
    assert not access.is_open(None)


def test_a_password_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.token"
    token, new = page_token(path)
    assert new
    assert page_token(path) == (token, False)
    path.chmod(0o644)
    with pytest.raises(WardroundError, match="can be read by others"):
        page_token(path)
    path.chmod(0o600)
    path.write_text("short\n")
    with pytest.raises(WardroundError, match="holds no password"):
        page_token(path)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WardroundError):
        page_token(path)


@pytest.mark.parametrize("text", ["127.0.0.1:8080", "localhost:1", "[::1]:8080"])
def test_loopback_is_taken(text: str) -> None:
    assert parse_address(text, behind_proxy=False)[1] == int(text.rpartition(":")[2])


@pytest.mark.parametrize("text", ["0.0.0.0:8080", "192.168.1.2:80", "hospital.example:80", "[::]:80"])
def test_an_address_that_others_reach_needs_a_proxy(text: str) -> None:
    with pytest.raises(StudyError, match="--page-behind-proxy"):
        parse_address(text, behind_proxy=False)
    assert parse_address(text, behind_proxy=True)[1] in (80, 8080)


@pytest.mark.parametrize("text", ["8080", "127.0.0.1", "127.0.0.1:", ":8080", "127.0.0.1:99999", "127.0.0.1:８０"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(StudyError, match="HOST:PORT"):
        parse_address(text, behind_proxy=True)


def test_behind_a_proxy_the_session_travels_over_tls_alone(place: CoordinatorFolder) -> None:
    with _page(place, behind_proxy=True) as browser:
        _, headers, _ = browser.log_in(place.token.read_text().strip())
        assert headers["set-cookie"].startswith("__Host-")
        assert "secure" in headers["set-cookie"].lower()


def test_the_page_shows_a_study_and_gives_its_report_and_model(tmp_path: Path) -> None:
    with federated(tmp_path) as made, _page(made.place) as browser:
        made.submit(toy_study(description="<script>alert(1)</script>"), compare=["local"])
        made.until(lambda s: s.state == "finished")
        browser.log_in(made.place.token.read_text().strip())
        said = browser.json("/api/status")
        assert said["alive"]
        (study,) = said["status"]["studies"]
        assert study["state"] == "finished"
        assert study["metrics"] == ["r", "mse"]
        curves = browser.json("/api/studies/toy/curves")["arms"]
        assert [line["round"] for line in curves["federated"]] == [1, 2, 3, 4]
        assert set(curves) == {"federated", "local/A", "local/B", "local/C"}
        tests = browser.json("/api/studies/toy/tests")
        assert {each["arm"] for each in tests["estimates"]} >= {"federated", "local"}
        out = StudyFolder(made.place.studies / "toy").out
        status, headers, body = browser.ask("GET", "/studies/toy/model")
        assert status == 200
        assert body == (out / "models" / "federated.safetensors").read_bytes()
        assert "attachment" in headers["content-disposition"]
        status, headers, body = browser.ask("GET", "/studies/toy/report")
        assert body == (out / "report.html").read_bytes()
        assert headers["content-security-policy"].endswith("sandbox")
        assert headers["x-frame-options"] == "DENY"
        for name in ("..", "../toy", "toy/../toy", "a b", "%2e%2e", "x" * 300, "\x00"):
            assert browser.json(f"/api/studies/{quote(name, safe='')}/curves") == 404
            assert browser.ask("GET", f"/studies/{quote(name, safe='')}/model")[0] == 404


def test_a_file_that_lies_elsewhere_is_not_given_out(tmp_path: Path) -> None:
    with federated(tmp_path) as made:
        made.submit()
        made.until(lambda s: s.state == "finished")
        data = PageData(made.place)
        assert data.file("toy", "report").name == "report.html"
        report = StudyFolder(made.place.studies / "toy").out / "report.html"
        report.unlink()
        report.symlink_to(made.place.federation)
        with pytest.raises(WardroundError, match="no report yet"):
            data.file("toy", "report")
