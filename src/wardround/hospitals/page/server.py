"""Serves the page from a thread of the coordinator's process."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from wardround.errors import MissingExtra, StudyError, WardroundError
from wardround.hospitals.folders import CoordinatorFolder
from wardround.hospitals.page.access import Access, page_token
from wardround.hospitals.page.data import PageData

_START_SECONDS = 10.0
_MOST_CONNECTIONS = 100


def parse_address(text: str, *, behind_proxy: bool) -> tuple[str, int]:
    """Host and port of `127.0.0.1:8080`; port 0 is any that is free.

    Raises `StudyError` for anything else, and unless `behind_proxy` for an address that other machines reach: the page
    itself speaks no TLS.
    """
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise StudyError(f"--page {text}: write HOST:PORT, as in 127.0.0.1:8080")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not behind_proxy:
        raise StudyError(
            f"--page {text}: other machines reach this address, and the page speaks no TLS. Take 127.0.0.1, or put a "
            "proxy with TLS before it and give --page-behind-proxy"
        )
    return host, int(port)


@contextmanager
def serve_page(
    folder: CoordinatorFolder, address: str, *, behind_proxy: bool = False, say: Callable[[str], None]
) -> Iterator[str]:
    """Show a federation's folder on a page while this is entered; its address.

    A password that was just made is said, once. Raises `MissingExtra`, `StudyError` for the address, and
    `WardroundError` where it cannot be taken.
    """
    host, port = parse_address(address, behind_proxy=behind_proxy)
    try:
        import uvicorn

        from wardround.hospitals.page.app import make_app
    except ImportError:
        raise MissingExtra("the page", "page") from None
    token, new = page_token(folder.token)
    app = make_app(PageData(folder), Access(token), secure=behind_proxy)
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=2,
            lifespan="off",
        )
    )
    thread = threading.Thread(target=server.run, args=([listening],), name="page", daemon=True)
    thread.start()
    end = time.monotonic() + _START_SECONDS
    while not server.started and thread.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    say(f"The page is at {where}")
    say(f"Its password, which is shown this once: {token}" if new else f"Its password is in {folder.token}")
    try:
        yield where
    finally:
        server.should_exit = True
        thread.join(_START_SECONDS)
        listening.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise WardroundError(f"--page {host}:{port}: the address cannot be taken ({reason}); choose another") from None
