"""What the page's server adds to Gradio's: headers that keep requests at home, and who is listening from where."""

import ipaddress
from collections import Counter
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from starlette.datastructures import MutableHeaders

POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio's own page
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    ]
)
HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "x-dns-prefetch-control": "off"}


class Listeners:
    """ASGI middleware: sets HEADERS, and counts the open streams of each session in `listeners`."""

    def __init__(self, app: Any, listeners: Counter[str]):
        self.app, self.listeners = app, listeners

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        async def send_with_headers(message: dict) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        session = _session_of(scope)
        self.listeners[session] += 1
        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            self.listeners[session] -= 1
            if not self.listeners[session]:
                del self.listeners[session]


def _session_of(scope: dict) -> str:
    """Returns the session that a request listens for: it reads the stream of its answers; "" for other requests."""
    if scope["type"] != "http" or not scope["path"].endswith("/queue/data"):
        return ""
    return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]


def address_of(request: gr.Request) -> str:
    """Returns the client's address; behind a proxy of one's own network the one that this proxy has seen."""
    address = request.client.host if request.client else ""
    forwarded = request.headers.get("x-forwarded-for", "").rpartition(",")[2].strip()
    return forwarded if forwarded and _is_local(address) else address


def _is_local(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_private
    except ValueError:
        return False
