"""Refuses requests to Dagster's webserver that a page of another site may have sent: an ASGI middleware.

Dagster's webserver has no login, and takes a GraphQL mutation from any page: by GET, by a form, under any name that
leads to its address. The guard decides by what a browser adds to each request, which no page can change:

- `Host` must be a name of this server. A page whose own name leads to this server (DNS rebinding) sends another one.
- `Origin`, where it is sent, must be this server's own. Browsers send it with every request that may change something,
  and with every websocket.
- `Sec-Fetch-Site`, where it is sent, must not be another site, except for a link to a page. So no other site can show
  the UI in a frame, or load anything of it.
- GraphQL is executed by POST of JSON only, never by GET: a picture, a link or a form then starts nothing, also without
  these headers (no browser sends `Sec-Fetch-Site` to a plain HTTP address that is not loopback).

Programs that are not browsers, such as `curl` or Dagster's GraphQL client, send neither `Origin` nor `Sec-Fetch-Site`,
and work as before. A login is the task of a reverse proxy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from finetune_assets.config.errors import shown
from finetune_assets.config.hosts import HostPort, is_loopback, parse_host_port

DEFAULT_PORTS = {"http": 80, "https": 443}
GRAPHQL = "/graphql"
EXECUTABLE = ("application/json", "application/graphql")
"""Content types of a GraphQL request. A page of another site cannot send them without asking first (CORS preflight)."""
OWN_SITE = ("same-origin", "none")
"""Values of `Sec-Fetch-Site`: this server's own pages, and what the user has typed or bookmarked."""


@dataclass(frozen=True)
class Names:
    """Names of a server besides loopback.

    Attributes:
        host: Address that it listens on.
        allowed: Other names under which browsers reach it, each with a port if it is not the usual one.
    """

    host: str
    allowed: tuple[HostPort, ...] = ()


class Refusal(NamedTuple):
    """Why a request is refused.

    Attributes:
        status: HTTP status code.
        reason: What is wrong, and what to do.
    """

    status: int
    reason: str


class RequestGuard:
    """ASGI middleware that passes on only what a program, or a page of this server, has sent.

    Args:
        app: Application that gets the other requests.
        server: Names of this server besides loopback.
    """

    def __init__(self, app: ASGIApp, server: Names) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif refused := refusal(HTTPConnection(scope), self.server):
            await _refuse(refused, scope, receive, send)
        else:
            await self.app(scope, receive, _unframed(send))


def refusal(connection: HTTPConnection, server: Names) -> Refusal | None:
    """Why a request or a websocket is refused; None if it is not."""
    headers, method = connection.headers, connection.scope.get("method", "GET")
    hosts = headers.getlist("host")
    host = parse_host_port(hosts[0]) if len(hosts) == 1 else None
    if host is None:
        return Refusal(400, f"Invalid Host header {shown(', '.join(hosts))}: expected one name, such as localhost:3000")
    if not is_loopback(host.name) and host.name not in (server.host, *(known.name for known in server.allowed)):
        return Refusal(
            403,
            f"Host {shown(host.name)} is not a name of this server. To use this name, start it with "
            "`finetune ui --allow-host NAME`, or list the name in FINETUNE_UI_HOSTS.",
        )
    for origin in headers.getlist("origin"):
        if not _is_own(origin, host, server.allowed):
            return Refusal(
                403,
                f"Origin {shown(origin)} is not this server ({shown(hosts[0])}): a page of another site may not use "
                "it. Behind a reverse proxy with another name, start it with `finetune ui --allow-host NAME`.",
            )
    is_graphql = connection.scope["path"].rstrip("/").endswith(GRAPHQL)
    site = headers.get("sec-fetch-site", OWN_SITE[0])
    is_link = (
        method == "GET"
        and headers.get("sec-fetch-mode") == "navigate"
        and headers.get("sec-fetch-dest") == "document"
        and not is_graphql
    )
    if site not in OWN_SITE and not is_link:
        return Refusal(403, f"Sec-Fetch-Site is {shown(site)}: pages of other sites may only link to pages of the UI.")
    if is_graphql and connection.scope["type"] == "http":
        return _of_graphql(method, connection)
    return None


def _of_graphql(method: str, connection: HTTPConnection) -> Refusal | None:
    """Why a GraphQL request is refused; Dagster answers a GET for HTML with its query editor, and executes nothing."""
    if method == "GET" and "text/html" not in connection.headers.get("accept", ""):
        return Refusal(405, "GraphQL by GET is refused, because any page can send it: use POST with JSON.")
    content_type = connection.headers.get("content-type", "").partition(";")[0].strip().lower()
    if method == "POST" and content_type not in EXECUTABLE:
        return Refusal(415, f"Content-Type {shown(content_type)} is refused: send GraphQL as application/json.")
    return None


def _is_own(origin: str, host: HostPort, allowed: Sequence[HostPort]) -> bool:
    """Whether a page's origin is the server that the request is for, or an allowed name of it.

    A reverse proxy may replace `Host` by the address behind it. The page then has the proxy's name, at the usual port
    or at the port that is allowed; another port of the same name as in `Host` is another site.
    """
    scheme, separator, netloc = origin.partition("://")
    page, default_port = parse_host_port(netloc), DEFAULT_PORTS.get(scheme)
    if not separator or page is None or default_port is None:
        return False  # also `null`, of a file or a frame without an origin
    if page.name == host.name:
        return page.is_at(host, default_port)
    return any(page.is_at(name, default_port) for name in allowed)


async def _refuse(refused: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    headers = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Connection": "close"}
    response = PlainTextResponse(f"{refused.reason}\n", refused.status, headers)
    if scope["type"] == "http":
        await response(scope, receive, send)
    elif "websocket.http.response" in scope.get("extensions", {}):
        await WebSocket(scope, receive, send).send_denial_response(response)
    else:
        await send({"type": "websocket.close", "code": 1008, "reason": "refused"})


def _unframed(send: Send) -> Send:
    """Add a header that refuses frames of other sites, for addresses to which browsers send no `Sec-Fetch-Site`."""

    async def send_unframed(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).setdefault("X-Frame-Options", "SAMEORIGIN")
        await send(message)

    return send_unframed


def parse_names(texts: Sequence[str]) -> tuple[HostPort, ...]:
    """Parse names of a server, as `name` or `name:port`; IPv6 addresses may have no brackets.

    Raises:
        ValueError: naming the text that is neither.
    """
    names = []
    for text in texts:
        bare = f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text
        name = parse_host_port(bare)
        if name is None:
            suggestion = urlsplit(text).hostname if "://" in text else None
            raise ValueError(f"{shown(text)} is not a host name; write it as {suggestion or 'dagster.example.org'}")
        names.append(name)
    return tuple(names)
