"""What is checked before a request reaches the routes: whom it is for, whom it is from, how large it is.

It is an ASGI application around another one, because a body has to be counted while it comes.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
from collections.abc import Collection
from typing import Any

import anyio

from .errors import ApiError, overloaded
from .settings import ServeRecipe

OPEN = frozenset(("/", "/page.js", "/page.css", "/icon.svg", "/health"))
"""Paths that need no key: the page, which holds no secrets, and whether the server is up."""

_HEADERS = {
    # Nothing but what this server sends, no inline script or style, no frames, no forms that leave.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Refuses what is not for ``app``, and hands on what is, its body whole.

    Args:
        app: gets the requests that are let through.
        recipe: bounds, and the names of this server.
        key: that a client has to bring to all but ``OPEN``, or None.
    """

    def __init__(self, app: Any, recipe: ServeRecipe, key: str | None):
        self.app, self.recipe = app, recipe
        self._key = None if key is None else _digest(key)
        self._names = {"localhost", recipe.host.lower(), *map(str.lower, recipe.hosts)}
        # A page elsewhere can have its own name point to this machine. Whoever listens only here is called by no name
        # but localhost; whoever listens to the network is called by names we cannot know.
        self.connections: Collection[Any] = ()  # that are open, once there is a server
        self._check_host = _is_loopback(recipe.host) or bool(recipe.hosts)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message.get("headers", ())}
                more = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *(pair for pair in more if pair[0] not in given)]
            await send(message)

        try:
            if len(self.connections) > self.recipe.max_connections:
                raise overloaded("too many connections are open, expected you to come again later")
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            self._admit(scope, headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            return await _refuse(error, with_headers)
        if body is None:
            return None  # the client left

        told = False

        async def again() -> Any:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, with_headers)

    def _admit(self, scope: Any, headers: dict[str, str]) -> None:
        if self._check_host and not self._is_ours(headers.get("host", "")):
            raise ApiError(
                421, "this server is not called so, expected localhost or a name of its recipe's `hosts`", code="host"
            )
        if self._key is not None and scope["path"] not in OPEN:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), self._key):
                raise ApiError(
                    401,
                    "the API key is missing or wrong, expected it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if scope["method"] == "POST":
            # A form on another site can send text, but not JSON, without asking first.
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, "the body is of another type, expected application/json", code="content_type")

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        name = name.strip("[]").lower()
        return name in self._names or _is_loopback(name)

    async def _body(self, headers: dict[str, str], receive: Any) -> bytes | None:
        most = self.recipe.max_body_bytes
        too_large = ApiError(413, f"the body is larger than {most:,} bytes", code="request_too_large")
        length = headers.get("content-length", "")
        if length.isdigit() and (len(length) > 18 or int(length) > most):
            raise too_large
        parts, size = [], 0
        with anyio.move_on_after(self.recipe.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                parts.append(part)
                size += len(part)
                if size > most:
                    raise too_large
                if not message.get("more_body", False):
                    return b"".join(parts)
        raise ApiError(408, f"the body took longer than {self.recipe.body_seconds:g} s", code="timeout")


async def _refuse(error: ApiError, send: Any) -> None:
    """Answer, and close: the rest of the body is not read."""
    content = json.dumps(error.content()).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"}
    pairs = [(name.lower().encode(), value.encode()) for name, value in (headers | (error.headers or {})).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})


def _digest(key: str) -> bytes:
    """Of one length, so that the comparison does not tell the key's either."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
