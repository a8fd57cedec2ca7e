"""Whether a site reaches its coordinator, and why not: each cause in plain words, with what to do."""

from __future__ import annotations

import errno
import os
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from wardround.hospitals.certificates import client_context, handshake_reason
from wardround.wire.files import reason

#: Seconds for the name, the connection, the handshake and the first answer, each.
TIMEOUT = 10.0
# Bytes of the coordinator's answer that are looked at for its clock.
_ANSWER = 4096
# Seconds for a refusal to arrive before anything is asked.
_REFUSAL = 1.0
_HUNG_UP = "a firewall or proxy that looks into TLS does this: ask IT to let this connection pass unopened"
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


@dataclass(frozen=True)
class Reached:
    """What came of a connection: whether TLS was agreed on at both ends, the fault, and the coordinator's clock.

    `answered`: whether the coordinator said anything after that. `ahead` is by how many seconds this computer's clock
    is before the coordinator's, where that says its time.
    """

    connected: bool
    fault: str = ""
    fix: str = ""
    answered: bool = False
    ahead: float | None = None


def reach(host: str, port: int, certificates: Path, timeout: float = TIMEOUT) -> Reached:
    """Connect to a coordinator with a site's certificate, ask nothing but the time, and hang up.

    Raises `CertificateError` where the site's own certificate cannot be used.
    """
    context = client_context(certificates)
    where = f"{host}, port {port}"
    try:
        plain = socket.create_connection((host, port), timeout)
    except socket.gaierror:
        return Reached(
            False, f"the name {host} is not known here (DNS)", "ask IT to resolve it, or the coordinator for its name"
        )
    except TimeoutError:
        return Reached(
            False,
            f"{where}: no answer within {timeout:.0f} s, so a firewall drops it on the way",
            f"ask IT for outgoing TCP to {where}; nothing comes in",
        )
    except ConnectionRefusedError:
        return Reached(
            False, f"{where}: refused", "ask the coordinator whether its service runs, and at which port; or a firewall"
        )
    except OSError as error:
        unreachable = error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)
        fix = "look at this computer's network, or ask IT for a route" if unreachable else "ask IT"
        return Reached(False, f"{where}: {reason(error)}", fix)
    with plain:
        try:
            with context.wrap_socket(plain, server_hostname=host) as secure:
                return _greeted(secure, host, timeout)
        except ssl.SSLEOFError:
            return Reached(False, f"{where}: it hung up during the handshake", _HUNG_UP)
        except ssl.SSLError as error:
            return Reached(False, *_handshake(error, where))
        except TimeoutError:
            return Reached(
                False,
                f"{where}: it takes connections and says nothing in TLS",
                "ask the coordinator whether this is its port; a proxy or firewall may hold TLS back",
            )
        except OSError as error:
            return Reached(False, f"{where}: it hung up during the handshake ({reason(error)})", _HUNG_UP)


def _greeted(secure: ssl.SSLSocket, host: str, timeout: float) -> Reached:
    """Ask for the time; in TLS 1.3 the coordinator says only now whether it takes our certificate."""
    first = _refusal(secure, min(_REFUSAL, timeout)) if secure.version() == "TLSv1.3" else b""
    if first is None:
        return Reached(True)
    secure.settimeout(timeout)
    secure.sendall(f"HEAD / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("ascii"))
    answer = first
    # NVFlare's port may say nothing to this question, and may just hang up.
    with suppress(TimeoutError, ConnectionResetError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
        while len(answer) < _ANSWER and b"\r\n\r\n" not in answer:
            if not (part := secure.recv(_ANSWER)):
                break
            answer += part
    return Reached(True, answered=bool(answer), ahead=_ahead(answer))


def _refusal(secure: ssl.SSLSocket, seconds: float) -> bytes | None:
    """Wait for a refusal, which raises `SSLError`: a question that is sent into it would lose it. None: it hung up."""
    secure.settimeout(seconds)
    with suppress(TimeoutError):
        return secure.recv(_ANSWER) or None
    return b""


def _ahead(answer: bytes) -> float | None:
    for line in answer.decode("latin-1").split("\r\n"):
        name, _, value = line.partition(":")
        if name.lower() == "date":
            with suppress(ValueError, TypeError, OverflowError):
                return time.time() - parsedate_to_datetime(value.strip()).timestamp()
    return None


def _handshake(error: ssl.SSLError, where: str) -> tuple[str, str]:
    """What failed, and what to do."""
    cause = error.reason or ""
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_code in (18, 19, 20, 21):
        return (
            f"{where}: what answers has a certificate of another authority than this federation's",
            "a proxy that opens TLS does this: ask IT to let this connection pass unopened. Else the address is wrong, "
            "or the kit is of another federation",
        )
    if cause in ("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return f"{where}: what answers speaks no TLS", "ask the coordinator for the right port; or a proxy answers"
    text, _, fix = handshake_reason(error).partition("; ")
    return f"{where}: {text}", fix


def proxy_note() -> str | None:
    """What proxy settings of this process mean for the connection; nothing where there are none."""
    return _proxy_note(os.environ)


def _proxy_note(environment: Mapping[str, str]) -> str | None:
    named = [name for name in _PROXIES if environment.get(name)]
    if not named:
        return None
    return (
        f"{', '.join(named)} is set, and the connection to the coordinator does not use it: it goes there directly, "
        "with TLS that no proxy may open"
    )
