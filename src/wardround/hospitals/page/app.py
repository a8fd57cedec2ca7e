"""The page's requests and answers. Imported only where FastAPI is installed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from importlib import resources
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response

from wardround.errors import WardroundError
from wardround.hospitals.page.access import SESSION_SECONDS, Access
from wardround.hospitals.page.data import PageData

# A password and its field.
_LARGEST_FORM = 1024
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
# The report is one file with its styles in it, and runs nothing.
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; sandbox"
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
Scope = MutableMapping[str, Any]
Channel = Callable[..., Awaitable[Any]]


def make_app(data: PageData, access: Access, *, secure: bool = False) -> Any:
    """The application; `secure`: browsers send the session over TLS alone, which a proxy ends."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = _Page(data, access, secure)
    for path, answer in (
        ("/", page.index),
        ("/page.css", page.style),
        ("/page.js", page.script),
        ("/favicon.ico", page.no_icon),
        ("/api/status", page.overview),
        ("/api/studies/{name}/curves", page.curves),
        ("/api/studies/{name}/tests", page.tests),
        ("/studies/{name}/report", page.report),
        ("/studies/{name}/model", page.model),
    ):
        app.add_api_route(path, answer, methods=["GET"], response_model=None)
    app.add_api_route("/login", page.login, methods=["POST"], response_model=None)
    app.add_api_route("/logout", page.logout, methods=["POST"], response_model=None)
    return _WithHeaders(app)


class _WithHeaders:
    """Every answer, errors too, with the headers that say what a browser may do with it."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Channel, send: Channel) -> None:
        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((n.lower().encode(), v.encode()) for n, v in HEADERS.items() if n.lower().encode() not in there),
                ]
            await send(message)

        await self._app(scope, receive, with_headers)


class _Page:
    def __init__(self, data: PageData, access: Access, secure: bool) -> None:
        self._data, self._access, self._secure = data, access, secure
        self._cookie = "__Host-wardround" if secure else "wardround"

    async def index(self, request: Request) -> Response:
        name = "index.html" if self._known(request) else "login.html"
        return Response(_resource(name), media_type="text/html")

    async def style(self) -> Response:
        return Response(_resource("page.css"), media_type="text/css")

    async def script(self) -> Response:
        return Response(_resource("page.js"), media_type="text/javascript")

    async def no_icon(self) -> Response:
        return Response(status_code=204)

    async def login(self, request: Request) -> Response:
        client = request.client.host if request.client else ""
        if (pause := self._access.pause(client)) > 0.0:
            headers = {"Retry-After": f"{pause + 1:.0f}"}
            text = _resource("login.html").replace("<!--said-->", f"Wait {pause + 1:.0f} s, then try again.")
            return Response(text, 429, headers, media_type="text/html")
        token = _field(await _small_body(request), "token")
        session = self._access.open(client, token)
        if session is None:
            text = _resource("login.html").replace("<!--said-->", "This is not the password.")
            return Response(text, 403, media_type="text/html")
        answer = RedirectResponse("/", 303)
        answer.set_cookie(
            self._cookie,
            session,
            max_age=int(SESSION_SECONDS),
            path="/",
            httponly=True,
            samesite="strict",
            secure=self._secure,
        )
        return answer

    async def logout(self, request: Request) -> Response:
        self._access.close(request.cookies.get(self._cookie))
        answer = RedirectResponse("/", 303)
        answer.delete_cookie(self._cookie, path="/", httponly=True, samesite="strict", secure=self._secure)
        return answer

    async def overview(self, request: Request) -> Response:
        return await self._json(request, self._data.overview)

    async def curves(self, request: Request, name: str) -> Response:
        return await self._json(request, lambda: self._data.curves(name))

    async def tests(self, request: Request, name: str) -> Response:
        return await self._json(request, lambda: self._data.tests(name))

    async def report(self, request: Request, name: str) -> Response:
        headers = {"Content-Security-Policy": _REPORT_POLICY}
        return await self._file(request, name, "report", {"headers": headers, "media_type": "text/html"})

    async def model(self, request: Request, name: str) -> Response:
        said = {"filename": f"{name}.safetensors", "media_type": "application/octet-stream"}
        return await self._file(request, name, "model", said)

    def _known(self, request: Request) -> bool:
        return self._access.is_open(request.cookies.get(self._cookie))

    async def _json(self, request: Request, read: Callable[[], dict[str, Any]]) -> Response:
        if not self._known(request):
            return JSONResponse({"error": "log in first"}, 401)
        try:
            return JSONResponse(await run_in_threadpool(read))
        except WardroundError as error:
            return JSONResponse({"error": str(error)}, 404)

    async def _file(self, request: Request, name: str, what: str, how: Mapping[str, Any]) -> Response:
        if not self._known(request):
            return RedirectResponse("/", 303)
        try:
            path = await run_in_threadpool(self._data.file, name, what)
        except WardroundError as error:
            return JSONResponse({"error": str(error)}, 404)
        return FileResponse(path, **how)


async def _small_body(request: Request) -> bytes:
    """The body of a small form; nothing of a longer one is kept."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST_FORM:
            return b""
    return body


def _field(form: bytes, name: str) -> str:
    try:
        return parse_qs(form.decode("ascii"), max_num_fields=4).get(name, [""])[0].strip()
    except ValueError:
        return ""


def _resource(name: str) -> str:
    return resources.files("wardround.hospitals.page").joinpath(name).read_text(encoding="utf-8")
